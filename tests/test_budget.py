"""The allocation against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycomp.budget import Candidate, Group, allocate, uniform
from tinycomp.methods import Option


def candidate(unit: str, size: int, loss: float) -> Candidate:
    return Candidate("m", unit, Option(size, 8 * size, loss, {"size": size}))


def curve(unit: str, losses: list[float]) -> tuple[Candidate, ...]:
    """Sizes 1, 2, ... with losses that fall."""
    ordered = sorted(losses, reverse=True)
    return tuple(candidate(unit, i + 1, value) for i, value in enumerate(ordered))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(0, 10), min_size=2, max_size=5), min_size=2, max_size=4),
    st.floats(0.3, 1.0),
)
def test_close_to_exhaustive_and_never_over_budget(curves: list[list[float]], share: float) -> None:
    entries = [curve(f"u{i}", losses) for i, losses in enumerate(curves)]
    budget = max(share * sum(len(e) for e in entries), len(entries))
    chosen = allocate([Group(((e,),)) for e in entries], budget)
    assert sum(c.option.size for c in chosen) <= budget
    assert {c.unit for c in chosen} == {e[0].unit for e in entries}
    best = min(
        sum(c.option.loss for c in combination)
        for combination in itertools.product(*entries)
        if sum(c.option.size for c in combination) <= budget
    )
    # A Lagrangian choice plus greedy upgrades misses at most one candidate's step.
    slack = max(a.option.loss - b.option.loss for e in entries for a, b in itertools.pairwise(e))
    assert sum(c.option.loss for c in chosen) <= best + slack + 1e-9


def test_alternatives_exclude_each_other() -> None:
    widths = (candidate("ffn", 2, 1.0), candidate("ffn", 6, 0.0))
    ranks = tuple((candidate(f"w{i}", 1, 0.1), candidate(f"w{i}", 2, 0.0)) for i in range(3))
    chosen = allocate([Group(((widths,), ranks))], 3)
    assert {c.unit for c in chosen} == {"w0", "w1", "w2"}
    (only,) = allocate([Group(((widths,), ranks))], 2)
    assert only.unit == "ffn"


def test_unreachable_budget_names_the_least() -> None:
    with pytest.raises(ValueError, match="allowed at least 2"):
        allocate([Group(((curve("a", [1, 0]),),)), Group(((curve("b", [1, 0]),),))], 1)


def test_uniform_gives_every_unit_its_own_share() -> None:
    groups = [Group(((curve("a", [3, 2, 1, 0]),),)), Group(((curve("b", [9, 0]),),))]
    chosen = {c.unit: c.option.size for c in uniform(groups, 0.5, {"a": 4.0, "b": 2.0}, "parameters")}
    assert chosen == {"a": 2, "b": 1}
