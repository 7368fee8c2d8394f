"""One budget spread over many units: Lagrangian selection of sizes, then greedy upgrades with what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinycomp.methods._base import Option

Resource = Literal["parameters", "bytes", "time"]


UNITS = {"parameters": "parameters", "bytes": "bytes", "time": "seconds"}


@dataclass(frozen=True)
class Candidate:
    """An option, and which method and unit it belongs to."""

    method: str
    unit: str
    option: Option


@dataclass(frozen=True)
class Group:
    """Units decided together: exactly one alternative is taken, and in it one candidate of every list.

    A feed-forward sublayer has two alternatives, for instance: one list of widths, or three lists of ranks.
    """

    alternatives: tuple[tuple[tuple[Candidate, ...], ...], ...]


def cost(option: Option, resource: Resource) -> float:
    """What the budget counts: stored numbers, bytes, or measured seconds per call."""
    return {"parameters": option.size, "bytes": option.bits / 8, "time": option.seconds}[resource]


def allocate(groups: Sequence[Group], budget: float, resource: Resource = "parameters") -> list[Candidate]:
    """The candidates with least total predicted loss whose cost is at most `budget`.

    For a price p each list takes argmin(loss + p cost); the price is bisected until the total just fits, then single
    candidates are upgraded by best loss per cost while anything fits.

    Raises:
        ValueError: even the smallest candidates cost more than `budget`.
    """
    tables = [[[_Table(entry, resource) for entry in part] for part in group.alternatives] for group in groups]
    best = [_pick(alternatives, lambda t: t.costs) for alternatives in tables]
    least = _total(best)
    if least > budget * (1 + 1e-9):
        raise ValueError(
            f"budget: got {budget:,.6g} {UNITS[resource]} for the targeted weights, allowed at least {least:,.6g} "
            "with these methods; raise `ratio`, or allow smaller ranks"
        )
    low, high = -60.0, 20.0  # log of the price
    for _ in range(60):
        price = math.exp((low + high) / 2)
        chosen = [_pick(alternatives, _priced(price)) for alternatives in tables]
        if _total(chosen) <= budget:
            best, high = chosen, (low + high) / 2
        else:
            low = (low + high) / 2
    return _upgrade([choice for part in best for choice in part], budget)


class _Table:
    """The candidates of one unit as arrays."""

    def __init__(self, entry: Sequence[Candidate], resource: Resource) -> None:
        self.entry = entry
        self.costs = np.array([cost(c.option, resource) for c in entry])
        self.losses = np.array([c.option.loss for c in entry])


_Choice = tuple[_Table, int]


def _priced(price: float) -> Callable[[_Table], np.ndarray]:
    return lambda table: table.losses + price * table.costs


def _pick(alternatives: list[list[_Table]], value: Callable[[_Table], np.ndarray]) -> list[_Choice]:
    """The alternative, and in it the candidate of every unit, with the least total value."""
    found = []
    for part in alternatives:
        values = [value(table) for table in part]
        places = [int(v.argmin()) for v in values]
        total = sum(float(v[i]) for v, i in zip(values, places, strict=True))
        found.append((total, list(zip(part, places, strict=True))))
    return min(found, key=lambda pair: pair[0])[1]


def _total(chosen: list[list[_Choice]]) -> float:
    return sum(float(table.costs[i]) for part in chosen for table, i in part)


def _upgrade(chosen: list[_Choice], budget: float) -> list[Candidate]:
    """Spend what is left: repeatedly the upgrade of one unit that gains most loss per cost and still fits."""
    places = [i for _, i in chosen]
    left = budget - sum(float(table.costs[i]) for table, i in chosen)
    while True:
        best = (0.0, 0, 0)
        for number, (table, _) in enumerate(chosen):
            now = places[number]
            extra = table.costs - table.costs[now]
            gain = table.losses[now] - table.losses
            rate = np.where((extra > 0) & (extra <= left), gain / np.where(extra > 0, extra, 1.0), 0.0)
            top = int(rate.argmax())
            best = max(best, (float(rate[top]), number, top))
        if best[0] <= 0.0:
            return [table.entry[i] for (table, _), i in zip(chosen, places, strict=True)]
        _, number, top = best
        left -= float(chosen[number][0].costs[top] - chosen[number][0].costs[places[number]])
        places[number] = top


def uniform(groups: Sequence[Group], ratio: float, sizes: dict[str, float], resource: Resource) -> list[Candidate]:
    """Every unit gets its own largest candidate within `ratio` times its size (the smallest one when none fits)."""
    chosen = []
    for group in groups:
        for entry in group.alternatives[0]:
            limit = ratio * sizes[entry[0].unit]
            fits = [c for c in entry if cost(c.option, resource) <= limit * (1 + 1e-9)]
            key = lambda c: cost(c.option, resource)  # noqa: E731
            chosen.append(max(fits, key=key) if fits else min(entry, key=key))
    return chosen
