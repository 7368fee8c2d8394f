"""One checkpoint for every ratio: units are stored once, in the order in which they are kept.

`make_elastic_` permutes a model, `set_ratio_` chooses a prefix of every weight, `export` makes one size a model of its
own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinycomp import __version__, hf
from tinycomp.edits import Edit, Plan, Replace
from tinycomp.layers import elastic_layers, set_ratio_
from tinycomp.layers.elastic import BILLIONTHS, require_elastic
from tinycomp.methods import Linear, Result, WidthPrune
from tinycomp.methods._slicing import Cut, slice_edits, slice_units
from tinycomp.models import Chunk, UnitGroup, UnitPath, spec_of, unit_groups
from tinycomp.pipeline import statistics_of
from tinycomp.planning import after_edits
from tinycomp.surgery import apply_


def make_elastic_(
    model: nn.Module, path: UnitPath, *, groups: Sequence[UnitGroup] | None = None, round_to: int = 8,
    cost: Literal["parameters"] | Mapping[str, float] | None = "parameters", uniform: bool = False,
) -> None:  # fmt: skip
    """Bring a model's units into the order of a path, so that every ratio is a prefix of its weights.

    The model computes what it did, at ratio 1; `set_ratio_` chooses another one. Its weights are as large as before;
    an index of four bytes is added per row or column that can be left out, of twelve in attention.

    Args:
        model: a dense transformers model of the architecture table, changed in place.
        path: the order, from a search or `UnitPath.from_scores`.
        groups: the units that may go; those of `unit_groups(model)` that the path ranks unless given.
        round_to: widths are multiples of this.
        cost: see `UnitPath.ranking`.
        uniform: groups of equal size have equal widths at every ratio; needed for plain exports.

    Raises:
        ValueError: the path is another model's, or the model cannot be compressed; the model is as it was.
    """
    hf.check_compressible(model)
    if groups is None:
        groups = [group for group in unit_groups(model) if group.name in path.entry]
    if not groups:
        raise ValueError(
            f"make_elastic_: got a path of {', '.join(list(path.entry)[:3])}, ..., and no group of that name to order; "
            "use the path of this model"
        )
    chunks = path.chunks(groups, round_to, cost, uniform)
    edits: list[Edit] = []
    tensors: dict[str, Tensor] = {}
    for name, cut in _ranked_cuts(groups, chunks).items():
        linear = _linear(model, name, None)
        edits += cut.edits()
        tensors |= cut.tensors(linear)
    record = {"method": "elastic", "config": path.config, "round_to": round_to, "uniform": uniform}
    hf.edit_(model, [(Plan(edits, [record | {"version": __version__}]), tensors)])
    set_ratio_(model, 1.0)


def _ranked_cuts(groups: Sequence[UnitGroup], chunks: Sequence[Chunk]) -> dict[str, Cut]:
    """For every linear of the groups, its rows or columns in the order of the chunks; features of no group first."""
    cuts: dict[str, Cut] = {}
    features: dict[tuple[str, int], list[Tensor]] = {}
    enters: dict[tuple[str, int], list[Tensor]] = {}
    by_group: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_group.setdefault(chunk.group, []).append(chunk)
    for group in groups:
        own = by_group[group.name]
        units = torch.cat([chunk.units for chunk in own])
        starts = torch.cat([torch.full((len(c.units),), round(c.enters * BILLIONTHS), dtype=torch.int32) for c in own])
        for member in group.members:
            cuts.setdefault(member.path, Cut(member, group.kind != "ffn", group.config_field))
            key = member.path, member.dim
            features.setdefault(key, []).append(member.features[units].flatten())
            enters.setdefault(key, []).append(starts.repeat_interleave(member.features.shape[1]))
    for (path, dim), parts in features.items():
        cut = cuts[path]
        ranked, start = torch.cat(parts), torch.cat(enters[path, dim])
        free = torch.ones(cut.member.shape[dim], dtype=torch.bool)
        free[ranked] = False
        always = free.nonzero().flatten()
        ranked, start = torch.cat([always, ranked]), torch.cat([start.new_zeros(len(always)), start])
        order = start.argsort(stable=True)
        side = "columns" if dim else "rows"
        setattr(cut, side, ranked[order])
        cut.enters[side] = start[order]
    return cuts


def export(
    model: nn.Module, ratio: float | None = None, data: Any = None, *, refit: bool = False, tokenizer: Any = None,
    num_calibration_samples: int = 48, max_seq_length: int = 512, batch_size: int = 8, progress: bool = True,
) -> nn.Module:  # fmt: skip
    """One size of an elastic model as a model of its own; the elastic one stays as it is.

    Feed-forward linears become narrower plain ones; attention linears that lost units stay index layers. The result is
    a plain transformers model, without tinycomp, where its config expresses all of it: all widths of a field are equal
    (an elastic model made with `uniform=True`) and attention is whole.

    Args:
        model: from `make_elastic_`, or loaded from what that saved.
        ratio: fraction of the units' parameters that is kept, in (0, 1]; the model's own ratio unless given.
        data: calibration data for `refit`, in any of the forms of `tinycomp.data.batches`; None is the bundled text.
        refit: solve the projections that read units anew, by least squares on those that stay. Prefixes of one weight
            cannot hold a refit for each ratio, so only an export has it.
        tokenizer: needed for text.
        num_calibration_samples: windows of text.
        max_seq_length: tokens per window.
        batch_size: windows per batch.
        progress: show progress bars.

    Raises:
        ValueError: the model is not elastic, or the ratio is out of range.
    """
    ratio = _ratio(model) if ratio is None else ratio
    kept, dense = _kept_units(model, ratio), _dense_copy(model)
    groups, spec = unit_groups(dense), spec_of(dense)
    store = None
    if refit:
        store = statistics_of(
            dense, [WidthPrune(selection="energy")], data, tokenizer=tokenizer, max_seq_length=max_seq_length,
            num_calibration_samples=num_calibration_samples, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    result = Result()
    for block in spec.blocks:
        own = [group for group in groups if group.block == block.path]
        paths = list(dict.fromkeys(member.path for group in own for member in group.members))
        stats = store.get(paths) if store else {}
        linears = {path: _linear(dense, path, stats[path].gram if store else None) for path in paths}
        result.extend(slice_units(linears, own, kept, method="export"))
    record = {"method": "export", "ratio": ratio, "refit": refit, "version": __version__}
    hf.edit_(dense, [(Plan(result.edits, [record]), result.tensors)])
    return dense


def size_at(model: nn.Module, ratio: float | None = None) -> dict[str, Any]:
    """{"ratio", "parameters", "bytes"} of what `export` makes: the ratio that is reached, tensors on disk."""
    kept, (stock, _) = _kept_units(model, _ratio(model) if ratio is None else ratio), _stock(model)
    groups = [group for group in unit_groups(stock) if group.name in kept]
    whole = sum(group.count * group.parameters_per_unit for group in groups)
    left = sum(len(kept[group.name]) * group.parameters_per_unit for group in groups)
    return {"ratio": left / whole} | after_edits(stock, slice_edits(groups, kept))


def _ratio(model: Any) -> float:
    return float(getattr(model.config, "ratio", 1.0))


def _stock(model: Any) -> tuple[Any, Plan]:
    """On meta, the model as it was before `make_elastic_`, and the plan it had then."""
    layers, plan = elastic_layers(model), hf.plan_of(model) or Plan()
    rest = Plan([e for e in plan.edits if not (isinstance(e, Replace) and e.path in layers)], plan.methods)
    stock = hf.stock_skeleton(model)
    apply_(stock, rest, replay=True)
    return stock, rest


def _dense_copy(model: Any) -> Any:
    """A copy with the linears that the elastic layers were made of."""
    stock, rest = _stock(model)
    memo: dict[int, Any] = {}  # takes the linears' place in the copy
    for path, layer in elastic_layers(model).items():
        weight, bias = layer.full.weight.detach(), None if layer.bias is None else layer.bias.detach()
        linear: Any = stock.get_submodule(path)
        linear = linear.to(weight.dtype).to_empty(device=weight.device).train(layer.training)
        if layer.scatter:
            back = layer.outputs.argsort()
            weight, bias = weight[back], None if bias is None else bias[back]
        if layer.gather:
            weight = weight[:, layer.inputs.argsort()]
        with torch.no_grad():
            linear.weight.copy_(weight if isinstance(linear, nn.Linear) else weight.T)
            if bias is not None:
                linear.bias.copy_(bias)
        memo[id(layer)] = linear
    dense = copy.deepcopy(model, memo)
    del dense.config.ratio
    hf.set_plan_(dense, rest)
    return dense


def _kept_units(model: Any, ratio: float) -> dict[str, Tensor]:
    """Group name -> units that are active at a ratio, for the groups that the elastic model may cut."""
    layers = require_elastic("export", model, ratio)
    kept: dict[str, Tensor] = {}
    for group in unit_groups(_stock(model)[0]):
        member = group.members[-1] if group.members[-1].dim else group.members[0]
        layer = layers.get(member.path)
        if layer is None or not (layer.ranked_in if member.dim else layer.ranked_out):
            continue
        active = layer.sizes_at(ratio)[0 if member.dim else 1]
        index = layer.inputs if layer.gather else layer.outputs if layer.scatter else torch.arange(layer.in_features)
        there = torch.zeros(member.shape[member.dim], dtype=torch.bool)
        there[index[:active].cpu()] = True
        kept[group.name] = there[member.features[:, 0]].nonzero().flatten()
    return kept


def _linear(model: nn.Module, path: str, gram: Tensor | None) -> Linear:
    module: Any = model.get_submodule(path)
    transposed = not isinstance(module, nn.Linear)
    weight = module.weight.detach().T if transposed else module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return Linear(path, weight, bias, gram, transposed=transposed, dtype=weight.dtype)
