"""For tests of saving and loading: random replacements, cut widths, dropped blocks, the round trip through files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import FAMILIES, OTHERS, output
from torch import Tensor, nn

from tinycomp.edits import Drop, Edit, Plan, Replace, Slice
from tinycomp.hf import edit_
from tinycomp.layers import LAYERS, MaskedLinear, QuantLinear, SWSCLinear
from tinycomp.models import FFNSpec, config_after_drop, spec_of

LAYER_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LowRankLinear", {"rank": 5, "pivoted": True}),
    ("CURLinear", {"rank": 6}),
    ("SWSCLinear", {"clusters": 7, "rank": 2, "scaled": True}),
    ("QuantLinear", {"bits": 4, "group_size": 8, "symmetric": False}),
    ("SWSCLinear", {"clusters": 6, "rank": 0, "axis": 1}),
    ("MaskedLinear", {"format": "bitmask"}),
    ("QuantLinear", {"bits": 8}),
    ("LowRankLinear", {"rank": 4}),
)


def dense(model: nn.Module, path: str) -> nn.Linear:
    """The linear at `path` as an nn.Linear, also where it is a Conv1D."""
    module: Any = model.get_submodule(path)
    w = module.weight.detach().T if hasattr(module, "nf") else module.weight.detach()
    layer = nn.Linear(w.shape[1], w.shape[0], bias=module.bias is not None, dtype=w.dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    return layer


def replaced(model: nn.Module, path: str, kind: int, seed: int = 0) -> tuple[Replace, dict[str, Tensor]]:
    """A replacement of the linear at `path` by one of LAYER_KINDS, filled with random or rounded values."""
    name, kwargs = LAYER_KINDS[kind % len(LAYER_KINDS)]
    old = dense(model, path)
    sizes = {"in_features": old.in_features, "out_features": old.out_features, "bias": old.bias is not None}
    generator = torch.Generator().manual_seed(seed)
    layer: Any
    if name == "QuantLinear":
        layer = QuantLinear.from_linear(old, kwargs["bits"], kwargs.get("group_size", 0), kwargs.get("symmetric", True))
    elif name == "MaskedLinear":
        layer = MaskedLinear.from_linear(old, torch.rand(old.weight.shape, generator=generator) < 0.3)
        kwargs = {**kwargs, "nnz": layer.nnz}
    else:
        layer = LAYERS[name](**sizes, **kwargs, dtype=old.weight.dtype)
        with torch.no_grad():
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.is_floating_point():
                    fan = max(*tensor.shape[-1:], 1) if tensor.ndim == 2 else 1
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan**0.5)
                elif isinstance(layer, SWSCLinear):
                    tensor.copy_(torch.randint(layer.clusters, tensor.shape, generator=generator))
                else:
                    tensor.copy_(torch.randperm(tensor.numel(), generator=generator))
    tensors = {f"{path}.{n}": t for n, t in layer.state_dict().items() if n not in ("weight", "bias")}
    return Replace(path, layer=name, kwargs={**sizes, **kwargs}), tensors


def narrowed(model: nn.Module, ffn: FFNSpec, keep: int) -> tuple[list[Edit], dict[str, Tensor]]:
    """Slices that keep the first `keep` hidden units of one feed-forward sublayer."""
    edits: list[Edit] = []
    tensors: dict[str, Tensor] = {}
    for path, dim in (*((p, 0) for p in ffn.inputs), (ffn.down, 1)):
        module: Any = model.get_submodule(path)
        axis = 1 - dim if hasattr(module, "nf") else dim
        tensors[f"{path}.weight"] = module.weight.detach().narrow(axis, 0, keep)
        if dim == 0 and module.bias is not None:
            tensors[f"{path}.bias"] = module.bias.detach()[:keep]
        edits.append(Slice(path, dim=dim, keep=keep, config_field=ffn.config_field))
    return edits, tensors


def run(model: nn.Module, edits: list[Edit], tensors: dict[str, Tensor] | None = None, **record: Any) -> None:
    """Apply and attach one plan."""
    edit_(model, [(Plan(edits, [record] if record else []), tensors or {})])


def replace_some(model: nn.Module, step: int = 3, seed: int = 0) -> None:
    """Replace every `step`-th linear, cycling through the kinds of layers."""
    edits: list[Edit] = []
    tensors: dict[str, Tensor] = {}
    for kind, path in enumerate(spec_of(model).linears[::step]):
        edit, values = replaced(model, path, kind, seed + kind)
        edits.append(edit)
        tensors |= values
    run(model, edits, tensors, method="test", seed=seed)


def narrow_all(model: nn.Module, keeps: tuple[int, ...]) -> None:
    """Cut feed-forward widths, block by block, cycling through `keeps`; one value gives a uniform model."""
    edits: list[Edit] = []
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(spec_of(model).blocks):
        assert block.ffn is not None
        more, values = narrowed(model, block.ffn, keeps[index % len(keeps)])
        edits += more
        tensors |= values
    run(model, edits, tensors)


def drop_one(model: nn.Module, stack: int = -1, index: int = 1) -> None:
    """Drop one block."""
    spec = spec_of(model)
    chosen = spec.stacks[stack]
    config = config_after_drop(model.config, spec, chosen, index)
    run(model, [Drop(chosen.blocks[index].path, config=config)])


def reload(family: str, directory: Path, **kwargs: Any) -> Any:
    return getattr(transformers, (FAMILIES | OTHERS)[family].auto).from_pretrained(directory, **kwargs)


def stored_bytes(directory: Path) -> int:
    """Bytes of all tensors in a checkpoint, headers excluded."""
    total = 0
    for file in directory.glob("*.safetensors"):
        header = int.from_bytes(file.open("rb").read(8), "little")
        total += file.stat().st_size - 8 - header
    return total


def memory_bytes(model: nn.Module) -> int:
    """Bytes of the storages that hold a model's persistent tensors; an mmapped or oversized storage would show."""
    tensors = [t for t in model.state_dict().values() if t.numel()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def check_round_trip(model: Any, family: str, tmp_path: Path) -> Any:
    """Save, load, compare logits; save again, compare files; returns the loaded model."""
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    loaded = reload(family, first)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, family), output(model, family))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.save_pretrained(second)
    files = sorted(p.name for p in first.iterdir())
    assert files == sorted(p.name for p in second.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    in_file, in_memory = stored_bytes(first), memory_bytes(loaded)
    recomputed = sum(loaded.get_parameter(name).nbytes for name in loaded._keys_to_ignore_on_save)
    assert in_file <= in_memory <= in_file + recomputed + 64 * len(loaded.state_dict())
    return loaded


def is_plain(directory: Path) -> bool:
    return "tinycomp" not in (directory / "config.json").read_text()


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]
