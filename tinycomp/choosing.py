"""Every unit's options, screened and guarded, and the choice among them under one budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from tinycomp.budget import Candidate, Group, Resource, allocate, uniform
from tinycomp.calib import StatsStore
from tinycomp.errors import UsageError
from tinycomp.io import Entry, Journal
from tinycomp.layer_times import LayerTimes, require_fast_masks
from tinycomp.methods import Method, MethodConfig, Option, Unit
from tinycomp.methods._curing import stored_numbers
from tinycomp.methods._options import dense_option
from tinycomp.methods._rounding import default_group, rounded_bits
from tinycomp.models import ModelSpec
from tinycomp.parallel import in_order
from tinycomp.progress import Bars
from tinycomp.targets import UnitSpec, gather, shapes

Families = Sequence[tuple[Method, MethodConfig]]
Found = dict[str, list[tuple[Method, MethodConfig, list[Option]]]]


@dataclass
class Choices:
    """What to build: unit name -> the method's choice; units that stay dense are absent.

    sizes: unit name -> (stored numbers, bits on disk) of that choice.
    kept: why a targeted linear that is not among them stays as it is.
    """

    by_unit: dict[str, dict[str, Any]]
    allocation: str
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: str = "kept dense: no smaller form is worth its loss"


def choose(
    model: nn.Module, spec: ModelSpec, method: Method, config: MethodConfig, families: Families,
    units: list[UnitSpec], store: StatsStore | None, journal: Journal | None, key: str, bars: Bars,
    weights: Mapping[str, Sequence[float]],
) -> Choices:  # fmt: skip
    """The options to build, by the method's own rule or by one budget; journalled, since it is dear to repeat."""
    entry = journal.get(f"{key}:choices") if journal else None
    if entry is not None:
        return Choices(**entry.details)
    paths = sorted({p for u in units for p in u.paths}, key=spec.linears.index)
    hidden = None if store is None else [store.last_hidden[b.path] for b in spec.blocks if b.path in store.last_hidden]
    assigned = method.assign(spec, shapes(model, paths), hidden or None, config)
    if assigned is not None:
        at = shapes(model, assigned)
        width = {p: model.get_submodule(p).weight.element_size() * 8 for p in assigned}  # type: ignore[union-attr, operator]
        sizes = {p: stored_numbers(*at[p], choice["rank"]) for p, choice in assigned.items()}
        found = Choices(assigned, "published rule", sizes={p: (n, n * width[p]) for p, n in sizes.items()})
    else:
        found = _budgeted(model, config, families, units, store, bars, method.families is not None, weights)
    kept: dict[tuple[int, int], list[int]] = {}
    for path, choice in found.by_unit.items():
        if "kept_per_row" in choice:
            kept.setdefault(shapes(model, [path])[path], []).append(choice["kept_per_row"])
    weight = next(model.parameters())
    require_fast_masks(config, kept, weight.dtype, weight.device)
    if journal:
        journal.put(f"{key}:choices", Entry(details=json.loads(json.dumps(vars(found)))))
    return found


def _budgeted(
    model: nn.Module,
    config: MethodConfig,
    families: Families,
    units: list[UnitSpec],
    store: StatsStore | None,
    bars: Bars,
    competing: bool,
    weights: Mapping[str, Sequence[float]],
) -> Choices:
    resource: Resource = getattr(config, "budget", "bytes" if type(config).__name__ == "Rounding" else "parameters")
    notes: list[str] = []
    if competing and resource == "bytes" and config.ratio is not None and config.allocation == "global":
        families = _only_rounding_where_it_fits(model, config.ratio, families, units, notes)
    table = _options(model, config, families, units, store, bars, notes, competing)
    if weights:
        table = {u.name: [_weighted(c, weights, u.index) for c in table[u.name]] for u in units}
    groups = _groups(units, table)
    dense = {u.name: _dense_cost(model, u, resource, table[u.name]) for u in units}
    if config.ratio is None:
        chosen = [_only(entry) for group in groups for entry in group.alternatives[0]]
        allocation = "as configured"
    elif config.allocation == "uniform":
        chosen = uniform(groups, config.ratio, dense, resource)
        allocation = f"uniform: every unit keeps {config.ratio:g} of its {resource}"
    else:
        alone = {p for u in units if u.kind == "linear" for p in u.paths}
        budget = config.ratio * sum(dense[u.name] for u in units if u.kind == "linear" or not alone & set(u.paths))
        chosen = allocate(groups, budget, resource)
        allocation = f"global: {config.ratio:g} of the targeted {resource}, spread by predicted loss"
    chosen = [c for c in chosen if not c.option.choice.get("dense")]
    sizes = {c.unit: (c.option.size, c.option.bits) for c in chosen}
    return Choices({c.unit: c.option.choice for c in chosen}, allocation, notes, sizes)


def _weighted(candidate: Candidate, weights: Mapping[str, Sequence[float]], block: int) -> Candidate:
    """The candidate with its loss multiplied by its family's factor for this block; dense ones lose nothing anyway."""
    if candidate.method not in weights:
        return candidate
    loss = candidate.option.loss * float(weights[candidate.method][block])
    return replace(candidate, option=replace(candidate.option, loss=loss))


def _only_rounding_where_it_fits(
    model: nn.Module, ratio: float, families: Families, units: list[UnitSpec], notes: list[str]
) -> Families:
    """Int8 rounding alone, where the budget has room for every target in it.

    Its loss is next to nothing and it is fitted to nothing. The others minimise the very loss they are compared by, so
    that at int8's own bytes they look better than they are: on SmolLM2 they cost 0.9 % of perplexity, int8 0.5 %.
    """
    rounding = [f for f in families if f[0].name == "Rounding" and getattr(f[1], "bits", None) in (8, None)]
    paths = {p for u in units if u.kind == "linear" for p in u.paths}
    if not rounding or not {p for u in units for p in u.paths} <= paths:
        return families
    width = {p: model.get_submodule(p).weight.element_size() for p in paths}  # type: ignore[union-attr, operator]
    at = shapes(model, sorted(paths))
    int8 = sum(rounded_bits(*at[p], 8, default_group(8), 8 * width[p]) // 8 for p in paths)
    dense = sum(at[p][0] * at[p][1] * width[p] for p in paths)
    if int8 > ratio * dense * (1 + 1e-9):
        return families
    notes.append("the budget holds every target in 8 bits: no other method was weighed")
    return rounding


def _dense_cost(model: nn.Module, unit: UnitSpec, resource: Resource, candidates: list[Candidate]) -> float:
    if resource == "time":
        return next(c.option.seconds for c in candidates if c.option.choice.get("dense"))
    weights = [model.get_submodule(p).weight for p in unit.paths]
    return float(sum(w.numel() * (w.element_size() if resource == "bytes" else 1) for w in weights))  # type: ignore[union-attr, operator, misc, arg-type]


def _only(entry: Sequence[Candidate]) -> Candidate:
    """The single non-dense candidate of a config that needs no ratio."""
    found = [c for c in entry if not c.option.choice.get("dense")]
    if len(found) != 1:
        raise UsageError(
            f"ratio: got none, and {entry[0].method} has {len(found)} candidate sizes for {entry[0].unit}; give ratio= "
            "in (0, 1], or a fixed size where the method has one (rank=, bits=)"
        )
    return found[0]


def _options(
    model: nn.Module, config: MethodConfig, families: Families, units: list[UnitSpec], store: StatsStore | None,
    bars: Bars, notes: list[str], competing: bool,
) -> dict[str, list[Candidate]]:  # fmt: skip
    """Candidates of every unit. Families that never win on the first few blocks are dropped, by kind of linear."""
    screen = getattr(config, "screen", 0) if len(families) > 1 else 0
    blocks = sorted({u.index for u in units})
    probes = {blocks[(i + 1) * len(blocks) // (screen + 1)] for i in range(screen)} if screen else set()
    found: Found = {}
    losers: set[tuple[str, str]] = set()
    for part in (sorted(probes), [b for b in blocks if b not in probes]):
        jobs = [[u for u in units if u.index == index] for index in part]

        def weigh(block: list[UnitSpec], losers: set[tuple[str, str]] = losers) -> Found:
            return {u.name: _offers(model, u, families, losers, store) for u in block}

        for offers in in_order(weigh, jobs, next(model.parameters()).device):
            found |= offers
            bars.update("weighing options", len(found), len(units))
        if part and probes and not losers:
            losers = _losers(found, units, families)
            notes += [
                f"{name} dropped for {kind}: never the best size on {len(probes)} blocks"
                for name, kind in sorted(losers)
            ]
    # Timed when nothing else runs any more.
    guarded = competing and getattr(config, "guard_speed", False)
    timed = guarded or getattr(config, "budget", "") == "time"
    times = LayerTimes(model, config.rows) if timed else None  # type: ignore[attr-defined]
    lost: Counter[str] = Counter()
    seen = lost if guarded else None
    table = {u.name: _candidates(gather(model, u, store), found[u.name], times, seen, competing) for u in units}
    notes += [f"{what}: {n} sizes slower than dense at {config.rows} rows, not offered" for what, n in lost.items()]  # type: ignore[attr-defined]
    return table


def _offers(
    model: nn.Module, spec: UnitSpec, families: Families, losers: set[tuple[str, str]], store: StatsStore | None
) -> list[tuple[Method, MethodConfig, list[Option]]]:
    """What each family can do for this unit."""
    unit = gather(model, spec, store)
    return [
        (method, family, _remembered(store, method, family, unit))
        for method, family in families
        if method.unit_kind == spec.kind and (method.name, _kind(spec)) not in losers
    ]


def _kind(spec: UnitSpec) -> str:
    return spec.name.rsplit(".", 1)[-1]


def _losers(found: Found, units: list[UnitSpec], families: Families) -> set[tuple[str, str]]:
    """(family, kind of linear) pairs whose options were dominated in every block tried."""
    known = {u.name: _kind(u) for u in units if u.name in found}
    tried: set[tuple[str, str]] = set()
    won: set[tuple[str, str]] = set()
    for name, offers in found.items():
        candidates = [Candidate(method.name, name, o) for method, _, options in offers for o in options]
        for method, _, _ in offers:
            tried.add((method.name, known[name]))
            if _ever_best(method.name, candidates):
                won.add((method.name, known[name]))
    return tried - won


def _candidates(
    unit: Unit, offers: list[tuple[Method, MethodConfig, list[Option]]], times: LayerTimes | None,
    lost: Counter[str] | None, competing: bool,
) -> list[Candidate]:  # fmt: skip
    """All options of one unit, tagged where methods compete; those slower than dense are left out into `lost`."""
    mine: list[Candidate] = []
    for method, family, options in offers:
        offered = options if times is None else times.timed(unit, method, family, options)
        if lost is not None and times is not None:
            fast = [o for o in offered if o.seconds <= times.dense(unit)]
            if len(fast) < len(offered):
                lost[f"{method.name} on {unit.name.rsplit('.', 1)[-1]}"] += len(offered) - len(fast)
            offered = fast
        mine += [Candidate(method.name, unit.name, _tagged(o, method.name) if competing else o) for o in offered]
    if not any(c.option.choice.get("dense") for c in mine) and (competing or not mine):
        whole = dense_option(unit)
        mine.append(
            Candidate("dense", unit.name, whole if times is None else replace(whole, seconds=times.dense(unit)))
        )
    return mine


def _remembered(store: StatsStore | None, method: Method, config: MethodConfig, unit: Unit) -> list[Option]:
    """Options do not depend on the ratio, so a run with other ratios on the same statistics need not repeat them."""
    if store is None:
        return method.options(unit, config)
    key = (method.name, unit.name, config.model_dump_json(exclude={"ratio", "sequential", "allocation"}))
    if key not in store.options:
        store.options[key] = method.options(unit, config)
    return store.options[key]


def _tagged(option: Option, family: str) -> Option:
    return replace(option, choice=option.choice | {"family": family})


def _ever_best(name: str, candidates: list[Candidate]) -> bool:
    """Whether any option of this family is undominated in numbers, bits and loss by the other families."""
    others = [c.option for c in candidates if c.method != name and not c.option.choice.get("dense")]
    return any(
        not any(o.size <= c.option.size and o.bits <= c.option.bits and o.loss <= c.option.loss for o in others)
        for c in candidates
        if c.method == name and not c.option.choice.get("dense")
    )


def _groups(units: list[UnitSpec], table: dict[str, list[Candidate]]) -> list[Group]:
    """A feed-forward unit and the linears inside it exclude each other; every other unit stands alone."""
    by_path = {u.paths[0]: u for u in units if u.kind == "linear"}
    taken: set[str] = set()
    groups = []
    for unit in units:
        if unit.kind == "ffn":
            inside = [by_path[p] for p in unit.paths if p in by_path]
            alternatives: list[tuple[tuple[Candidate, ...], ...]] = [(tuple(table[unit.name]),)]
            if inside:
                alternatives.append(tuple(tuple(table[u.name]) for u in inside))
            taken |= {u.name for u in inside}
            groups.append(Group(tuple(alternatives)))
    groups += [Group(((tuple(table[u.name]),),)) for u in units if u.kind == "linear" and u.name not in taken]
    return groups
