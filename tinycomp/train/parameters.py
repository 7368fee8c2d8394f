"""Which parameters a recovery trains, as a context: gradients elsewhere are off, adapters come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tinycomp.models import is_linear, spec_of
from tinycomp.train.config import Distill


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Within it all floating-point tensors of the model are float32; afterwards they have their own dtypes again."""
    tensors = [(t, t.dtype) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    for tensor, _ in tensors:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in tensors:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def training_parameters(model: nn.Module, config: Distill) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters to train, by name; tied ones once. Gradients of all others are off within.

    LoRA adapters are merged into the weights at the end, also after an error, so that the modules stay those of the
    model.

    Raises:
        ValueError: the model has no parameter of the wanted kind.
        RuntimeError: LoRA without peft.
    """
    flags = {id(p): p.requires_grad for p in model.parameters()}
    adapters = config.train == "lora"
    if adapters:
        _attach_adapters(model, config)
    chosen = _chosen(model, config.train)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        if adapters:
            _merge_adapters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(flags[id(parameter)])
            parameter.grad = None


def _chosen(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    compressed = {path: m for path, m in model.named_modules() if getattr(m, "is_tinycomp_layer", False)}
    if kind == "u":
        wanted = [f"{path}.u.weight" for path in compressed]
    elif kind == "factors":
        wanted = [f"{path}.{name}" for path, m in compressed.items() for name, _ in m.named_parameters()]
    else:
        wanted = [name for name, _ in model.named_parameters() if kind == "all" or ".lora_" in name]
    found = {name: p for name, p in model.named_parameters() if name in set(wanted) and p.is_floating_point()}
    if not found:
        there = sorted({type(m).__name__ for m in compressed.values()}) or ["none"]
        raise ValueError(
            f"recover: got train={kind!r}, but the compressed layers ({', '.join(there)}) have no such parameter; "
            'allowed here are "lora" and "all"' + (', and "factors"' if compressed and kind == "u" else "")
        )
    return found


def _attach_adapters(model: nn.Module, config: Distill) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise RuntimeError("recover: train='lora' needs the package peft; install tinycomp[train]") from error
    blocks = tuple(b.path + "." for b in spec_of(model).blocks)
    names = [n for n, m in model.named_modules() if n.startswith(blocks) and is_linear(m)]
    torch.manual_seed(config.seed)
    inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=names), model)


def _merge_adapters(model: Any) -> None:
    """Add every adapter to its weight and put the plain linear back."""
    for path, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
