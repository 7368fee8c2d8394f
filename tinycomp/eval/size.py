"""Sizes: parameters, bytes in memory and on disk, FLOPs per token, and which bytes a compression touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tinycomp import ops
from tinycomp.layers import CompressedLinear
from tinycomp.models import is_linear, spec_of

_BY_NUMBER = ("rms_norm", "rotary_embedding", "silu_and_mul")  # ops that multiply no matrices

ENCODER_TOKENS = 128


@dataclass(frozen=True)
class Size:
    """What a model occupies and what one token costs.

    parameters: stored numbers, shared ones once; compressed layers say theirs (a rounded weight counts as one number,
        index tensors are bytes but no parameters), elsewhere they are the floating-point parameters.
    linear_parameters: those of `parameters` in the linear layers, dense or compressed, of the repeated blocks, biases
        left out: what `ratio` is a fraction of by default.
    bytes_memory: parameters and persistent buffers, each byte of each storage once.
    bytes_disk: of the folder's safetensors files; None without a folder.
    flops_per_token: a multiply-add counts 2; None where it was not asked for.
    """

    parameters: int
    linear_parameters: int
    bytes_memory: int
    bytes_disk: int | None = None
    flops_per_token: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)


def size_of(model: nn.Module, folder: str | Path | None = None, *, flops: bool = True) -> Size:
    """Measure a model, also one on meta (then without FLOPs).

    Args:
        model: dense or compressed.
        folder: where it is saved; adds `bytes_disk`.
        flops: run one forward to count `flops_per_token`.
    """
    return Size(
        parameters=_numbers((module for _, module in _outer_modules(model)), biases=True),
        linear_parameters=_numbers(_block_linears(model), biases=False),
        bytes_memory=bytes_in_memory(_owned(model)),
        bytes_disk=None if folder is None else bytes_on_disk(folder),
        flops_per_token=flops_per_token(model) if flops else None,
    )


def bytes_on_disk(folder: str | Path) -> int:
    """Total size of the safetensors files in `folder`. Raises FileNotFoundError when there are none."""
    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"size: no *.safetensors in {str(folder)!r}; pass the folder that save_pretrained wrote"
        )
    return sum(file.stat().st_size for file in files)


def bytes_in_memory(tensors: Iterable[Tensor]) -> int:
    """Bytes that the tensors cover: ties, overlapping views and views into one mapped file count once."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for tensor in tensors:
        if tensor.numel():
            last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = int(tensor.storage_offset()) * tensor.element_size()
            end = begin + (last + 1) * tensor.element_size()
            ranges.setdefault(tensor.untyped_storage()._cdata, []).append((begin, end))
    total = 0
    for spans in ranges.values():
        reached = 0
        for begin, end in sorted(spans):
            total += max(0, end - max(begin, reached))
            reached = max(reached, end)
    return total


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that decoding one token must read: all but embedding tables that are not also a head."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return bytes_in_memory(t for t in _owned(model) if id(t) not in tables - multiplied)


def flops_per_token(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> int:
    """FLOPs of one forward divided by its tokens; matrix products, convolutions, attention and tinycomp's ops count.

    A decoder runs on one token, an encoder-decoder on one each side, an encoder of text on 128, one of images on one
    image, whose patches are its tokens.

    Args:
        model: runs where it is; not on meta.
        batch: inputs to use instead; `tokens_of` says how many tokens they are.

    Raises:
        ValueError: no batch was given and the config says neither vocabulary nor image size.
    """
    single = is_causal(model) or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    inputs = dict(example_inputs(model, 1 if single else encoder_tokens(model)) if batch is None else batch)
    # Norms and the like do not count, whether they are one op or eight.
    counted = {name: op for name, op in ops.OPS.items() if name not in _BY_NUMBER}
    mapping = {getattr(torch.ops.tinycomp, name): _op_flops(op) for name, op in counted.items()}
    mapping[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _cpu_attention_flops
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            output = model(**inputs)
    finally:
        model.train(training)
    return counter.get_total_flops() // max(tokens_of(inputs, output), 1)


def tokens_of(inputs: Mapping[str, Any], output: Any) -> int:
    """Tokens of one forward: ids on the input side, or rows of the output (patches) where there are no ids."""
    ids = inputs.get("input_ids")
    if ids is not None:
        return ids.numel()
    rows = output if isinstance(output, Tensor) else output[0]
    return rows.shape[0] * (rows.shape[1] if rows.dim() == 3 else 1)


def encoder_tokens(model: nn.Module) -> int:
    """Length on which encoders of text are measured: 128, or all positions of a model that has fewer."""
    return min(ENCODER_TOKENS, getattr(getattr(model, "config", None), "max_position_embeddings", ENCODER_TOKENS))


def coverage(model: nn.Module, touched: Iterable[str] = ()) -> dict[str, Any]:
    """How many bytes of the model a compression touched, per module class.

    Args:
        model: the compressed model.
        touched: paths of modules that were changed; tinycomp's own layers count without being named.

    Returns:
        `touched_bytes`, `untouched_bytes` and `classes`: rows `{module, touched, modules, bytes}`, largest first.
        Shared tensors count once, where they are met first.
    """
    names = set(touched)
    rows: dict[tuple[str, bool], list[int]] = {}
    seen: set[tuple[int, int]] = set()
    for path, module in _outer_modules(model):
        whole = _compressed(module)
        own = _owned(module) if whole else _own_tensors(module)
        new = [tensor for tensor in own if _where(tensor) not in seen]
        if not new:
            continue
        seen.update(_where(tensor) for tensor in new)
        row = rows.setdefault((type(module).__name__, whole or path in names), [0, 0])
        row[0] += 1
        row[1] += bytes_in_memory(new)
    classes = [
        {"module": name, "touched": hit, "modules": modules, "bytes": size}
        for (name, hit), (modules, size) in sorted(rows.items(), key=lambda item: -item[1][1])
    ]
    hits = sum(size for (_, hit), (_, size) in rows.items() if hit)
    total = sum(size for _, size in rows.values())
    return {"touched_bytes": hits, "untouched_bytes": total - hits, "classes": classes}


def _where(tensor: Tensor) -> tuple[int, int]:
    """Storage and offset: equal for tied tensors, also on meta."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _compressed(module: nn.Module) -> bool:
    return isinstance(module, CompressedLinear)


def _outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, without the insides of compressed layers."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        yield path, module
        if _compressed(module):
            inside += (f"{path}.",)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers that belong to the module itself."""
    kept = [b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set]
    return [tensor for tensor in (*module._parameters.values(), *kept) if tensor is not None]


def _owned(module: nn.Module) -> Iterator[Tensor]:
    for owner in module.modules():
        yield from _own_tensors(owner)


def _block_linears(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers, dense or compressed, of the repeated blocks."""
    blocks = tuple(f"{block.path}." for stack in spec_of(model).stacks for block in stack.blocks)
    for path, module in _outer_modules(model):
        if path.startswith(blocks) and (is_linear(module) or _compressed(module)):
            yield module


def _numbers(modules: Iterable[nn.Module], biases: bool) -> int:
    """Stored numbers that belong to the modules themselves, tensors that share their memory once."""
    counted: dict[tuple[int, int], int] = {}
    compressed = 0
    for module in modules:
        names = set(module._parameters) if biases else set(module._parameters) - {"bias"}
        if isinstance(module, CompressedLinear):
            compressed += module.stored_numbers
            names &= {"bias"}
        for name in names:
            parameter = module._parameters[name]
            if parameter is not None and parameter.is_floating_point():
                counted[_where(parameter)] = max(counted.get(_where(parameter), 0), parameter.numel())
    return compressed + sum(counted.values())


def _op_flops(op: ops.Op) -> Any:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return op.cost(*args, **kwargs).flops

    count._get_raw = True  # type: ignore[attr-defined]  # flop_counter: pass tensors, not their shapes
    return count


def _cpu_attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def example_inputs(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """Inputs for one forward: `tokens` ids, or one blank image of the size the config names.

    Raises:
        ValueError: the config says neither vocabulary nor image size.
    """
    config: Any = getattr(model, "config", None)
    first = next(model.parameters(), torch.empty(0))
    if not hasattr(config, "vocab_size"):
        image = getattr(config, "image_size", None)
        if image is None:
            raise ValueError(
                f"example inputs: the config of {type(model).__name__} has no vocab_size or image_size; "
                "pass batch= to flops_per_token"
            )
        height, width = image if isinstance(image, list | tuple) else (image, image)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.zeros(shape, dtype=first.dtype, device=first.device)}
    ids = torch.arange(tokens, device=first.device)[None] % config.vocab_size
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def is_causal(model: nn.Module) -> bool:
    """Whether the model generates left to right on its own: transformers' `can_generate`, encoder-decoders excepted."""
    can = getattr(model, "can_generate", None)
    return bool(can and can()) and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
