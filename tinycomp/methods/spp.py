"""SPP: units leave in the order in which a differential inclusion lets them in; one search serves every ratio.

Masks on feed-forward neurons and on query/key and value indices of every head follow a split Bregman path on the
frozen model (`tinycomp.train.path_search`). Units that enter late, or never, are sliced off; what reads the kept ones
is refit.

Source: Adaptive Pruning of Pretrained Transformer via Differential Inclusions, arXiv 2501.03289, ICLR 2025, and its
repository. Differs from the repository (`preset="paper"`): masks are coupled to their sparse twins as the paper's
theory has it, every head has its own indices, entry steps are exact, one ranking by entry time per parameter covers
attention and feed-forward, the dual starts from predicted losses, widths are multiples of 8, the softmax scale stays,
kept weights are refit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tinycomp.calib import collect
from tinycomp.methods._base import Linear, Method, MethodConfig, Result
from tinycomp.methods._slicing import cuts_of, slice_units, without_dead_heads
from tinycomp.models import ModelSpec, UnitGroup, UnitPath, unit_groups
from tinycomp.train.path_search import PathSearch, search_path

Batch = dict[str, Tensor]
NO_RATIO = "SPP: got no ratio, allowed a number in (0, 1]; give ratio=0.8"


class SPP(PathSearch, MethodConfig):
    """Structured pruning along a split Bregman path. Fields of the search: see `tinycomp.train.path_search.PathSearch`.

    Args:
        attention: also remove query/key and value indices; else feed-forward neurons only.
        path: file of the path: read when it exists, else written after the search, for other ratios.
        refit: solve the projections that read units anew on those that stay.
        round_to: widths are multiples of this.
        cost: units are ranked by entry time per "parameters", per "unit", or per measured cost of a unit of each
            kind, {"ffn": 1.0, "qk": 2.4, "v": 1.3}: `tinycomp.unit_costs(model)` measures microseconds.
        released_scale: divide attention scores by the root of the kept head width, as the repository does.
    """

    attention: bool = True
    path: str | None = None
    refit: bool = True
    round_to: int = Field(default=8, ge=1)
    cost: Literal["parameters", "unit"] | dict[str, float] = "parameters"
    released_scale: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_released(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return {"refit": False, "round_to": 1, "cost": "unit", "released_scale": True} | values
        return values


def groups_of(model: nn.Module, spec: ModelSpec, config: SPP, targets: Sequence[str]) -> tuple[UnitGroup, ...]:
    """The unit groups whose linears are all targeted.

    Raises:
        ValueError: there are none.
    """
    wanted = set(targets)
    found = tuple(
        g
        for g in unit_groups(model, spec)
        if (config.attention or g.kind == "ffn") and {m.path for m in g.members} <= wanted
    )
    if not found:
        raise ValueError(
            "SPP: got no sublayer to prune, allowed are models whose feed-forward or attention linears are dense and "
            "all targeted; change targets or ignore"
        )
    return found


def kept_units(
    config: SPP, path: UnitPath, groups: Sequence[UnitGroup], uniform: bool | None = None
) -> dict[str, Tensor]:
    """Group name -> units that stay at the config's ratio; `uniform` overrides its allocation.

    Heads without values lose their queries and keys, too, so the size may end below the ratio.

    Raises:
        ValueError: no ratio, or a path of another model.
    """
    if config.ratio is None:
        raise ValueError(NO_RATIO)
    missing = {g.kind for g in groups} - set(config.cost) if isinstance(config.cost, dict) else set()
    if missing:
        raise ValueError(f"SPP: got cost {config.cost}, allowed one for every kind of unit; add {', '.join(missing)}")
    uniform = config.allocation == "uniform" if uniform is None else uniform
    cost = None if config.cost == "unit" else config.cost
    return without_dead_heads(groups, path.kept(groups, config.ratio, config.round_to, uniform, cost))


def choose(
    model: nn.Module, spec: ModelSpec, config: SPP, groups: Sequence[UnitGroup],
    batches: Callable[[], Sequence[Batch]], folder: Path | None, progress: Callable[..., None],
) -> tuple[Result, dict[str, Any]]:  # fmt: skip
    """The edits, and what they were based on.

    Args:
        model: left as it is.
        spec: of the model.
        config: how to search, and how much to keep.
        groups: from `groups_of`.
        batches: gives the calibration data.
        folder: for checkpoints of the search.
        progress: called with (description, done, total, note).

    Raises:
        ValueError: no ratio, or a path of another model.
    """
    if config.ratio is None:
        raise ValueError(NO_RATIO)
    started = time.perf_counter()
    path = _path(model, config, groups, batches, folder, progress)
    seconds = time.perf_counter() - started
    kept = kept_units(config, path, groups)
    result = slice_units(
        _linears(model, spec, config, groups, kept, batches, progress), groups, kept, refit=config.refit,
        damping=config.damping, released_scale=config.released_scale,
    )  # fmt: skip
    half = _half_at(path, groups, config)
    details = {
        "search_seconds": seconds,
        "search": path.config,
        "curve": path.curve,
        "groups": [_summary(group, path, kept[group.name]) | {"half_at": half[group.name]} for group in groups],
    }
    return result, details


def _path(
    model: nn.Module, config: SPP, groups: Sequence[UnitGroup], batches: Callable[[], Sequence[Batch]],
    folder: Path | None, progress: Callable[..., None],
) -> UnitPath:  # fmt: skip
    """Read from the file where it is there, else searched, and written."""
    if config.path is not None and Path(config.path).exists():
        return UnitPath.load(config.path)
    search = PathSearch(**{name: getattr(config, name) for name in PathSearch.model_fields})
    path = search_path(model, groups, batches(), search, folder=folder, progress=progress)
    if config.path is not None:
        path.save(config.path)
    return path


def _linears(
    model: nn.Module, spec: ModelSpec, config: SPP, groups: Sequence[UnitGroup], kept: dict[str, Tensor],
    batches: Callable[[], Sequence[Batch]], progress: Callable[..., None],
) -> dict[str, Linear]:  # fmt: skip
    """The linears that lose something, with input statistics where they are refit."""
    cuts = cuts_of(groups, kept)
    readers = [path for path, cut in cuts.items() if cut.columns is not None]
    stats: dict[str, Any] = {}
    if config.refit and readers:
        store = collect(
            model, spec, list(batches()), frozenset({"gram"}), paths=readers, seed=config.seed, progress=progress
        )
        stats = store.get(readers)
    found = {}
    for path in cuts:
        module: Any = model.get_submodule(path)
        transposed = not isinstance(module, nn.Linear)
        weight, bias = module.weight.detach(), module.bias
        found[path] = Linear(
            path, (weight.T if transposed else weight).float(), None if bias is None else bias.detach().float(),
            stats[path].gram if path in stats else None, transposed=transposed, dtype=weight.dtype,
        )  # fmt: skip
    return found


def _summary(group: UnitGroup, path: UnitPath, kept: Tensor) -> dict[str, Any]:
    """One row of the report: sizes, and when the group's units entered."""
    entry = path.entry[group.name]
    entered = entry[entry >= 0].float()
    return {
        "group": group.name,
        "kind": group.kind,
        "units": group.count,
        "kept": len(kept),
        "heads_kept": len(torch.unique(kept // (group.count // group.heads))),
        "entered": len(entered),
        "median_entry": float(entered.median()) if len(entered) else None,
    }


def _half_at(path: UnitPath, groups: Sequence[UnitGroup], config: SPP) -> dict[str, float]:
    """Group name -> ratio from which on half of its units are kept, in one ranking of all: its place in the order."""
    missing = {g.name: g.count / 2 for g in groups}
    found: dict[str, float] = {}
    for chunk in path.chunks(groups, config.round_to, None if config.cost == "unit" else config.cost):
        missing[chunk.group] -= len(chunk.units)
        if missing[chunk.group] <= 0:
            found.setdefault(chunk.group, chunk.enters)
    return found


METHOD = Method(
    "SPP", SPP, lambda _: frozenset(), lambda *_: [], lambda *_: Result(), units=(groups_of, choose),
)  # fmt: skip
