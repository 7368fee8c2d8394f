"""Sizes of a compression before it is done: from shapes alone, or from the choices made on a real model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tinycomp.choosing import Choices
from tinycomp.edits import Edit, Plan
from tinycomp.errors import UsageError
from tinycomp.eval.machine import ceilings
from tinycomp.layer_times import require_fast_masks
from tinycomp.methods import SPP, Method, MethodConfig, StrategicFusion, spp, strategic_fusion, swsc
from tinycomp.methods._curing import break_even_rank, stored_numbers
from tinycomp.methods._low_rank import rank_for, stored_bits, stored_size
from tinycomp.methods._pruning import Pruning, mask_width, masked_bits
from tinycomp.methods._rounding import rounded_bits
from tinycomp.methods._slicing import cuts_of, slice_edits
from tinycomp.methods.cur import CUR
from tinycomp.methods.rounding import Rounding
from tinycomp.methods.svd import SVD
from tinycomp.methods.swsc import SWSC, candidates
from tinycomp.models import ModelSpec, UnitGroup, UnitPath, spec_of
from tinycomp.signals.collect import the_stack
from tinycomp.surgery import apply_
from tinycomp.targets import UnitSpec, find_targets, shapes, unit_specs
from tinycomp.train.search_time import step_seconds

LIBRARIES_BYTES = 500_000_000  # torch and transformers themselves


def skeleton_of(source: Any) -> nn.Module:
    """The model itself, or one without weights (on meta) built from a config, a folder or a config.json."""
    if isinstance(source, nn.Module):
        return source
    from transformers import AutoConfig, PretrainedConfig

    from tinycomp.io.load import model_class

    name = "the config"
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        source = AutoConfig.from_pretrained(os.path.dirname(name) or "." if name.endswith(".json") else name)
    if not isinstance(source, PretrainedConfig):
        raise TypeError(f"plan: got {type(source).__name__}, allowed a model, a config, a folder or a config.json")
    cls = model_class(source, name)
    make = cls.from_config if cls.__name__.startswith("Auto") else cls._from_config
    with torch.device("meta"):
        return make(source, dtype=source.dtype or torch.float32)


def from_choices(model: nn.Module, paths: Sequence[str], units: Sequence[UnitSpec], choices: Choices) -> dict[str, Any]:
    """The plan of a real model: what every unit will become."""
    at = shapes(model, paths)
    rows = []
    by_name = {u.name: u for u in units}
    for name, choice in choices.by_unit.items():
        size, bits = choices.sizes[name]
        dims = [at[p] for p in by_name[name].paths]
        rows.append(_row(name, dims, size, bits, choice))
    return _totals(model, rows, {p for n in choices.by_unit for p in by_name[n].paths}, paths, choices.notes)


def from_shapes(model: nn.Module, spec: ModelSpec, method: Method, config: MethodConfig) -> dict[str, Any]:
    """The plan of a model without weights: `ratio` in every unit."""
    targets = find_targets(model, spec, config)
    at = shapes(model, targets.paths)
    bits = 8 * next(model.parameters()).dtype.itemsize
    assigned = method.assign(spec, at, None, config)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    if assigned is not None:
        notes.append("which layers are taken depends on calibration data; their number and sizes do not")
        for path, choice in assigned.items():
            size = stored_numbers(*at[path], choice["rank"])
            rows.append(_row(path, [at[path]], size, size * bits, choice))
        return _totals(model, rows, set(assigned), targets.paths, notes)
    if config.allocation == "global" and config.ratio is not None:
        notes.append("the run keeps this total and spreads it over the matrices by predicted loss")
    notes += mask_notes(config)
    kind = method.unit_kind if method.families is None else "linear"
    touched: set[str] = set()
    masks: dict[tuple[int, int], list[int]] = {}
    for unit in unit_specs(spec, targets.paths, {kind}, method.name):
        dims = [at[p] for p in unit.paths]
        size, stored, choice = _sizes(dims, kind, method, config, bits)
        rows.append(_row(unit.name, dims, size, stored, choice))
        touched |= set(unit.paths)
        if "kept_per_row" in choice:
            masks.setdefault(dims[0], []).append(choice["kept_per_row"])
    weight = next(model.parameters())
    require_fast_masks(config, masks, weight.dtype, weight.device)
    return _totals(model, rows, touched, touched, notes)


def mask_notes(config: MethodConfig) -> list[str]:
    """What to know before masks are packed without a look at their speed."""
    if getattr(config, "structured", True) or getattr(config, "guard_speed", False):
        return []
    return ["packed masks save bytes, not time: expect no speed-up over dense linears; measure with `tinycomp bench`"]


def from_blocks(model: nn.Module, spec: ModelSpec, config: StrategicFusion) -> dict[str, Any]:
    """The plan of a removal of whole blocks: as if the last ones went. Which ones go depends on data."""
    stack = the_stack(spec)
    depth = len(stack.blocks)
    inside = find_targets(model, spec, config).paths
    droppable = strategic_fusion.droppable_blocks(spec, inside)
    gone = droppable[len(droppable) - config.count(depth, droppable) :]
    bits = 8 * next(model.parameters()).dtype.itemsize
    at = shapes(model, spec.linears)
    rows = [_row(path, [at[path]], 0, 0, {}) for index in gone for path in stack.blocks[index].linears]
    paths = [path for index in droppable for path in stack.blocks[index].linears]
    plan = _totals(model, rows, {r["path"] for r in rows}, paths, strategic_fusion.costs(config, depth, droppable))
    others = sum(
        p.numel()
        for index in gone
        for name, p in model.get_submodule(stack.blocks[index].path).named_parameters()
        if f"{stack.blocks[index].path}.{name.removesuffix('.weight')}" not in at
    )  # biases and norms go as well
    plan["parameters_after"] -= others
    plan["bytes_after"] -= others * bits // 8
    return plan


def from_units(model: nn.Module, spec: ModelSpec, config: SPP) -> dict[str, Any]:
    """The plan of a ranking of units: exact where the path is known, else as if every group kept its share."""
    targets = find_targets(model, spec, config)
    groups = spp.groups_of(model, spec, config, targets.paths)
    known = config.path is not None and os.path.exists(config.path)
    path = (
        UnitPath.load(str(config.path))
        if known
        else UnitPath.from_scores({g.name: torch.ones(g.count) for g in groups})
    )
    kept = spp.kept_units(config, path, groups, uniform=not known)
    cuts = cuts_of(groups, kept)
    bits = 8 * next(model.parameters()).dtype.itemsize
    rows = []
    for name, (m, n) in shapes(model, list(cuts)).items():
        height, width = cuts[name].sizes
        rows.append(_row(name, [(m, n)], height * width, height * width * bits, {"rows": height, "columns": width}))
    inside = {member.path for group in groups for member in group.members}
    notes = [] if known else ["which units go depends on the search; here every sublayer keeps the same share"]
    plan = _totals(model, rows, set(cuts), inside, notes if known else notes + _search_costs(model, groups, config))
    after = after_edits(model, slice_edits(groups, kept))
    return plan | {"parameters_after": after["parameters"], "bytes_after": after["bytes"]}


def _search_costs(model: Any, groups: Sequence[UnitGroup], config: SPP) -> list[str]:
    """What a search will take: passes of activations forward and backward; the weights get no gradient."""
    units = sum(g.count for g in groups)
    losses = (
        "predicted losses: the calibration samples forward, some of them backward, then an elimination per sublayer"
    )
    if not config.steps:
        return [f"{losses}; no search"]
    search = f"search: {config.steps} steps on {units} masks" + (f"; before it, {losses}" if config.warm else "")
    if getattr(model, "main_input_name", "") != "input_ids":
        return [f"{search}; its time and memory depend on the size of the inputs"]
    tokens = config.samples * config.length
    sizes = shapes(model, spec_of(model).linears).values()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary, hidden = (0, 0) if head is None else head.weight.shape
    passes = 3 if config.loss == "distill" or head is None else 2  # the dense model's answers are the third
    flops = 2 * passes * (sum(m * n for m, n in sizes) + vocabulary * hidden) * tokens * config.steps
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    measured = step_seconds(model, config, {g.kind for g in groups})
    seconds = flops / ceilings().gemm_gf_s / 1e9 if measured is None else measured * config.steps
    how = "at this machine's matrix rate, often twice that" if measured is None else "by steps on a few of its blocks"
    memory = weights + 4 * tokens * (4 * vocabulary + 3 * sum(m for m, _ in sizes)) + LIBRARIES_BYTES
    return [
        f"{search}, {config.samples} x {config.length} tokens each: {flops / 1e12:.3g} TFLOP, about "
        f"{seconds:.0f} s {how}, about {memory / 1e9:.1f} GB of memory"
    ]


def after_edits(model: nn.Module, edits: Sequence[Edit]) -> dict[str, int]:
    """{"parameters", "bytes" of the tensors on disk} of a model after `edits`; weights are not looked at."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, empty)  # unlike a copy that is moved to meta, it keeps ties
    apply_(skeleton, Plan(list(edits)))
    skip = tuple(getattr(skeleton, "_keys_to_ignore_on_save", None) or ())
    stored = {id(t): t for name, t in skeleton.state_dict(keep_vars=True).items() if name not in skip}.values()
    return {"parameters": sum(p.numel() for p in skeleton.parameters()), "bytes": sum(t.nbytes for t in stored)}


def _sizes(
    dims: list[tuple[int, int]], kind: str, method: Method, config: MethodConfig, bits: int
) -> tuple[int, int, dict[str, Any]]:
    """(stored numbers, bits on disk, choice) of one unit at the config's ratio or fixed size."""
    dense = sum(m * n for m, n in dims)
    (m, n) = dims[-1]
    dtype = {16: torch.float16, 32: torch.float32, 64: torch.float64}[bits]
    if isinstance(config, Rounding):
        width = int(config.bits or 8)
        return dense, rounded_bits(m, n, width, config.group(width), bits), {"bits": width}
    if isinstance(config, SWSC) and (config.fixed or config.ratio):
        pairs = max(candidates(m, n, bits, config), key=lambda p: _within(m, n, p, config))
        k, r = max(pairs, key=lambda p: swsc.stored_numbers(m, n, *p, **config.layout))
        size = swsc.stored_numbers(m, n, k, r, **config.layout)
        return size, swsc.stored_bits(m, n, k, r, number_bits=bits, **config.stored), {"clusters": k, "rank": r}
    if isinstance(config, SVD | CUR) and (config.rank or config.ratio):
        pivoted = config.pivoted if isinstance(config, SVD) else config.form == "rows"
        rank = config.rank or rank_for(m, n, config.ratio or 1.0, pivoted)
        if isinstance(config, CUR) and config.trainable:
            size = stored_numbers(m, n, rank)
            return size, size * bits, {"rank": rank}
        return stored_size(m, n, rank, pivoted), stored_bits(m, n, rank, dtype, pivoted, config.bits), {"rank": rank}
    if isinstance(config, Pruning) and not config.structured and config.ratio:
        kept = mask_width(n, config.ratio, config)
        return m * kept, masked_bits(m, n, kept, config, bits), {"kept_per_row": kept}
    if config.ratio is None:
        raise UsageError(f"ratio: got none, allowed a number in (0, 1] for {method.name}; give ratio=")
    if kind == "ffn":
        step = getattr(config, "round_to", 1)
        width = max(int(config.ratio * n / step), 1) * step
        return dense // n * width, dense // n * width * bits, {"width": width}
    size = int(config.ratio * dense)
    return size, size * bits, {"ratio": config.ratio}


def _within(m: int, n: int, pairs: list[tuple[int, int]], config: SWSC) -> float:
    """Size of the largest pair, or -1 when it exceeds the ratio."""
    size = max(swsc.stored_numbers(m, n, k, r, **config.layout) for k, r in pairs)
    return size if config.ratio is None or size <= config.ratio * m * n else -1


def _row(name: str, dims: list[tuple[int, int]], size: int, bits: int, choice: dict[str, Any]) -> dict[str, Any]:
    m, n = dims[-1]
    return {
        "path": name,
        "shape": [m, n],
        "size_before": sum(a * b for a, b in dims),
        "size_after": size,
        "bits_after": bits,
        "break_even_rank": break_even_rank(m, n),
        **choice,
    }


def _totals(
    model: nn.Module, rows: list[dict[str, Any]], touched: set[str], targeted: Iterable[str], notes: list[str]
) -> dict[str, Any]:
    tensors = {id(t): t for t in (*model.parameters(), *_saved_buffers(model))}
    before = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    bytes_before = sum(t.numel() * t.element_size() for t in tensors.values())
    saved = sum(r["size_before"] - r["size_after"] for r in rows)
    dense_bytes = sum(_weight(model, p).numel() * _weight(model, p).element_size() for p in touched)
    targeted_size = sum(_weight(model, p).numel() for p in targeted)
    return {
        "modules": rows,
        "parameters_before": before,
        "parameters_after": before - saved,
        "bytes_before": bytes_before,
        "bytes_after": bytes_before - dense_bytes + sum(r["bits_after"] for r in rows) // 8,
        "ratio_achieved": 1 - saved / max(targeted_size, 1),
        "notes": notes,
    }


def _weight(model: nn.Module, path: str) -> torch.Tensor:
    return model.get_submodule(path).weight  # type: ignore[return-value]


def _saved_buffers(model: nn.Module) -> list[torch.Tensor]:
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
