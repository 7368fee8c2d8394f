"""One budget spread over many units: Lagrangian selection of sizes, then greedy upgrades with what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tinycomp.methods._base import Option

Resource = Literal["parameters", "bytes"]


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
    """What the budget counts: stored numbers, or bytes."""
    return option.size if resource == "parameters" else option.bits / 8


def allocate(groups: Sequence[Group], budget: float, resource: Resource = "parameters") -> list[Candidate]:
    """The candidates with least total predicted loss whose cost is at most `budget`.

    For a price p each list takes argmin(loss + p cost); the price is bisected until the total just fits, then single
    candidates are upgraded by best loss per cost while anything fits.

    Raises:
        ValueError: even the smallest candidates cost more than `budget`.
    """
    smallest = [_cheapest(group, resource) for group in groups]
    least = sum(cost(c.option, resource) for chosen in smallest for c in chosen)
    if least > budget:
        raise ValueError(
            f"budget: got {budget:,.0f} {resource} for the targeted weights, allowed at least {least:,.0f} with these "
            "methods; raise `ratio`, or allow smaller ranks"
        )
    best = smallest
    low, high = -60.0, 20.0  # log of the price
    for _ in range(80):
        middle = (low + high) / 2
        chosen = [_at_price(group, math.exp(middle), resource) for group in groups]
        if sum(cost(c.option, resource) for part in chosen for c in part) <= budget:
            best, high = chosen, middle
        else:
            low = middle
    return _upgrade([c for part in best for c in part], groups, budget, resource)


def _cheapest(group: Group, resource: Resource) -> list[Candidate]:
    return min(
        (
            [min(entry, key=lambda c: cost(c.option, resource)) for entry in alternative]
            for alternative in group.alternatives
        ),
        key=lambda chosen: sum(cost(c.option, resource) for c in chosen),
    )


def _at_price(group: Group, price: float, resource: Resource) -> list[Candidate]:
    def value(candidate: Candidate) -> float:
        return candidate.option.loss + price * cost(candidate.option, resource)

    return min(
        ([min(entry, key=value) for entry in alternative] for alternative in group.alternatives),
        key=lambda chosen: sum(value(c) for c in chosen),
    )


def _upgrade(chosen: list[Candidate], groups: Sequence[Group], budget: float, resource: Resource) -> list[Candidate]:
    """Spend what is left: repeatedly the upgrade of one unit that gains most loss per cost and still fits."""
    lists = {entry[0].unit: entry for group in groups for alternative in group.alternatives for entry in alternative}
    current = {c.unit: c for c in chosen}
    left = budget - sum(cost(c.option, resource) for c in chosen)
    while True:
        best: tuple[float, Candidate] | None = None
        for unit, now in current.items():
            for other in lists[unit]:
                extra = cost(other.option, resource) - cost(now.option, resource)
                gain = now.option.loss - other.option.loss
                if 0 < extra <= left and gain > 0 and (best is None or gain / extra > best[0]):
                    best = (gain / extra, other)
        if best is None:
            return list(current.values())
        left -= cost(best[1].option, resource) - cost(current[best[1].unit].option, resource)
        current[best[1].unit] = best[1]


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
