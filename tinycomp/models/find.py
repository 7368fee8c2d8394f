"""Build a `ModelSpec` from a module tree: with a table row where one fits, from repeated blocks otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tinycomp.models.spec import AttentionSpec, BlockSpec, FFNSpec, ModelSpec, Stack
from tinycomp.models.table import TABLE, AttentionNames, FFNNames, Row, StackNames

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # their forward reads the weights of their linears itself
_READ_DIRECTLY = ("dt_proj",)  # of Mamba, Jamba and others: the block uses its weight without calling it
_HEAD_DIM_NAMES = ("head_dim", "attention_head_size", "key_value_proj_dim")


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is an uncompressed dense layer: nn.Linear or transformers' Conv1D (weight stored transposed).

    A subclass with a forward of its own may be anything, a router for one; it counts when its name says Linear and it
    maps a row of `in_features` to one of `out_features`, which a block-diagonal one does not.
    """
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or _is_row_map(module)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_row_map(module: nn.Linear) -> bool:
    if not type(module).__name__.endswith("Linear"):
        return False
    try:
        with torch.no_grad():
            return module(module.weight.new_zeros(1, module.in_features)).shape == (1, module.out_features)
    except (RuntimeError, ValueError, TypeError):
        return False


def spec_of(model: nn.Module) -> ModelSpec:
    """Find blocks, linears, attention and feed-forward sublayers of a model, also on meta or already compressed.

    Args:
        model: any module; a transformers model is recognised by `model.config.model_type`, whatever its head.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", "") or ""
    row = TABLE.get(model_type)
    if row is None:
        known = ", ".join(sorted(TABLE))
        note = f"architecture {model_type!r} has no row (known: {known}); add one to tinycomp/models/table.py"
    else:
        stacks, note = _row_stacks(model, config, row)
        if stacks:
            return ModelSpec(model_type, True, stacks, _per_layer_fields(config, stacks), _uncovered(model, stacks))
        note = f"the row {model_type!r} does not fit {type(model).__name__}: {note}; update tinycomp/models/table.py"
    seen: set[int] = set()
    stacks = tuple(
        Stack(
            path, tuple(BlockSpec(f"{path}.{name}", _linears(f"{path}.{name}", block, seen)) for name, block in blocks)
        )
        for path, blocks in _repeated_blocks("", model)
    )
    return ModelSpec(model_type, False, stacks, (), _uncovered(model, stacks), note)


def _compressed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_tinycomp_layer", False))


def _walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but shared modules appear at every path; layers that must stay whole are not entered."""
    yield path, module
    if _compressed(module) or isinstance(module, _FUSED):
        return
    for name, child in module.named_children():
        yield from _walk(f"{path}.{name}" if path else name, child)


def _get(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def _linears(prefix: str, block: nn.Module, seen: set[int], first: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Linears of a block, those in `first` before the others; a module shared with an earlier block is not repeated."""
    here: dict[str, None] = {}
    for path, module in _walk(prefix, block):
        if is_linear(module) and id(module) not in seen and path.rpartition(".")[2] not in _READ_DIRECTLY:
            seen.add(id(module))
            here[path] = None
    ordered = [path for path in dict.fromkeys(first) if path in here]
    return tuple(ordered + [path for path in here if path not in ordered])


def _row_stacks(model: nn.Module, config: Any, row: Row) -> tuple[tuple[Stack, ...], str]:
    """Stacks the row finds, or no stacks and what was looked for and seen."""
    found: list[Stack] = []
    taken: set[str] = set()
    seen: set[int] = set()
    for names in row.stacks:
        for path, module in _walk("", model):
            if path in taken or not isinstance(module, nn.ModuleList) or not f".{path}".endswith(f".{names.suffix}"):
                continue
            owner = _get(model, path.rpartition(".")[0])
            if names.decoder is not None and bool(getattr(owner, "is_decoder", False)) != names.decoder:
                continue
            taken.add(path)
            blocks = []
            for index, block in module.named_children():
                spec, problem = _row_block(f"{path}.{index}", block, config, row, names, seen)
                if spec is None:
                    return (), problem
                blocks.append(spec)
            found.append(Stack(path, tuple(blocks), row.shared, names.depth_field))
    wanted = ", ".join(names.suffix for names in row.stacks)
    return tuple(found), "" if found else f"no list of blocks named {wanted}"


def _row_block(
    path: str, block: nn.Module, config: Any, row: Row, names: StackNames, seen: set[int]
) -> tuple[BlockSpec | None, str]:
    attention = [spec for a in row.attention if (spec := _attention(path, block, config, a))][:1]
    if not attention:
        wanted = " or ".join(a.q for a in row.attention)
        return None, f"no attention in {path} (looked for {wanted}, it has {[n for n, _ in block.named_children()]})"
    attention += [cross for a in row.cross if (cross := _attention(path, block, config, a))]
    ffn = next((found for f in row.ffn if (found := _ffn(path, block, f, names.width_field))), None)
    first = tuple(p for a in attention for p in (a.q, a.k, a.v, a.o)) + ((*ffn.inputs, ffn.down) if ffn else ())
    return BlockSpec(path, _linears(path, block, seen, first), tuple(attention), ffn), ""


def _attention(path: str, block: nn.Module, config: Any, names: AttentionNames) -> AttentionSpec | None:
    owner = _get(block, names.path)
    parts = [_get(block, p) for p in (names.q, names.k, names.v, names.o)]
    if owner is None or any(part is None for part in parts):
        return None
    head_dim = next((int(getattr(owner, n)) for n in _HEAD_DIM_NAMES if isinstance(getattr(owner, n, None), int)), 0)
    if not head_dim:
        head_dim = config.hidden_size // config.num_attention_heads
    _, k, _, o = parts
    num_heads = _features(o)[0] // head_dim
    num_kv_heads = num_heads if names.k == names.v else _features(k)[1] // head_dim
    q, k_path, v, o_path = (f"{path}.{p}" for p in (names.q, names.k, names.v, names.o))
    return AttentionSpec(f"{path}.{names.path}", q, k_path, v, o_path, num_heads, num_kv_heads, head_dim, names.kind)


def _features(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a dense or compressed layer."""
    if hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.nf)
    return int(module.in_features), int(module.out_features)


def _ffn(path: str, block: nn.Module, names: FFNNames, width_field: str | None) -> FFNSpec | None:
    owner = _get(block, names.path)
    if owner is None or any(_get(owner, p) is None for p in (*names.inputs, names.down)):
        return None
    full = f"{path}.{names.path}" if names.path else path
    width = _features(_get(owner, names.down))[0]
    inputs = tuple(f"{full}.{p}" for p in names.inputs)
    return FFNSpec(full, inputs, f"{full}.{names.down}", width, width_field, len(inputs) > 1)


def _per_layer_fields(config: Any, stacks: tuple[Stack, ...]) -> tuple[str, ...]:
    """Config lists with one entry per block, such as `layer_types`; models with two stacks have none."""
    if len(stacks) != 1 or stacks[0].depth_field is None:
        return ()
    depth = len(stacks[0].blocks)
    return tuple(
        name
        for name, value in config.to_dict().items()
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth
    )


def config_after_drop(config: Any, spec: ModelSpec, stack: Stack, index: int) -> dict[str, Any]:
    """Config fields, with their values after block `index` of `stack` is dropped: what `Drop.config` holds.

    Raises:
        ValueError: the architecture cannot lose a block.
    """
    if stack.depth_field is None:
        why = spec.note or "its config has no depth field because the blocks share their weights"
        raise ValueError(f"drop: got a block of {stack.path}, which cannot lose one: {why}")
    fields: dict[str, Any] = {stack.depth_field: len(stack.blocks) - 1}
    for name in spec.per_layer_fields:
        values = list(getattr(config, name))
        fields[name] = values[:index] + values[index + 1 :]
    if getattr(config, "stage_names", None):  # a vision config counts its blocks as backbone stages: stem, stage1, ...
        fields["stage_names"] = config.stage_names[:-1]
        out = sorted({i - 1 if i > index else i for i in config.out_indices})
        fields["out_features"] = [fields["stage_names"][i] for i in out]
        fields["out_indices"] = out
    return fields


def _repeated_blocks(path: str, module: nn.Module) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    """Outermost lists of blocks that hold linears; a list of stages gives way to the lists of blocks inside it."""
    if _compressed(module):
        return []
    found = []
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        blocks = list(child.named_children())
        if not _is_block_list(child, blocks):
            found += _repeated_blocks(full, child)
            continue
        inner = [item for n, block in blocks for item in _repeated_blocks(f"{full}.{n}", block)]
        held = {id(m) for _, items in inner for _, block in items for m in block.modules()}
        outside = [m for _, block in blocks for m in block.modules() if is_linear(m) and id(m) not in held]
        uniform = all(len({type(b) for _, b in items}) == 1 for _, items in inner)
        if inner and uniform and len(outside) <= len(blocks):  # at most one projection per stage beside its blocks
            found += inner
        else:
            found.append((full, blocks))
    return found


def _is_block_list(module: nn.Module, blocks: list[tuple[str, nn.Module]]) -> bool:
    if isinstance(module, nn.Sequential):  # a plain chain of layers is no list of blocks; blocks of one class are
        if len({type(b) for _, b in blocks}) != 1 or len(blocks) < 2:
            return False
    elif not isinstance(module, nn.ModuleList):
        return False
    return any(is_linear(m) or _compressed(m) for _, b in blocks for m in b.modules() if m is not b) and not any(
        is_linear(b) or _compressed(b) for _, b in blocks
    )


def _uncovered(model: nn.Module, stacks: tuple[Stack, ...]) -> tuple[tuple[str, int, str], ...]:
    """Weights of two or more dimensions inside blocks that no linear holds: fused experts, convolutions, tables."""
    rows: dict[int, tuple[str, int, str]] = {}
    for block in (block for stack in stacks for block in stack.blocks):
        root = _get(model, block.path)
        for path, module in _walk(block.path, root) if root is not None else ():
            if is_linear(module) or _compressed(module):
                continue
            fused = isinstance(module, _FUSED)
            for name, parameter in module.named_parameters(recurse=fused):
                if parameter.ndim >= 2:
                    rows.setdefault(
                        id(parameter), (f"{path}.{name}", parameter.numel(), _reason(module, parameter.ndim))
                    )
    return tuple(rows.values())


def _reason(module: nn.Module, ndim: int) -> str:
    """Why a parameter is not compressed."""
    if isinstance(module, _FUSED):
        return f"{type(module).__name__} reads its weights without calling its linears"
    if isinstance(module, nn.Embedding):
        return "embedding table"
    if "Conv" in type(module).__name__:
        return "convolution weight"
    if ndim == 3:
        return "fused 3-D expert parameter"
    return f"parameter of {type(module).__name__}, which is no linear layer"
