"""Budgets of measured time, and the options that are left out for being slower than dense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import nn

import tinycomp as tc
from tinycomp.layer_times import LayerTimes
from tinycomp.methods import Linear, Option, Unit, svd

DATA = [{"input_ids": torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]
SLOWER = 1.3  # of a stored number in a low-rank layer than in a dense one, on the machine of these tests


@pytest.fixture
def seconds_per_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a dense linear takes one second per weight, and a compressed one SLOWER per stored number."""

    def layer(self: LayerTimes, edit: Any, copies: int) -> tuple[Any, int]:
        built = tc.layers.LAYERS[edit.layer](**edit.kwargs)
        return SLOWER * sum(p.numel() for p in built.parameters() if p.ndim == 2), 1

    monkeypatch.setattr(LayerTimes, "_linear", lambda self, m, n: (m * n, 1))
    monkeypatch.setattr(LayerTimes, "_layer", layer)
    monkeypatch.setattr(LayerTimes, "_measure", lambda self, runs: {name: float(t) for name, (t, _) in runs.items()})


def seconds_of(report: Any) -> float:
    """On the machine above; records of untouched linears do not exist, so add what was skipped."""
    slower = {"SVD": SLOWER, "CUR": SLOWER, "WidthPrune": 1.0}
    used = sum(slower[r["method"]] * r["size_after"] for r in report.records)
    return float(used + sum(s["parameters"] for s in report.skipped if "worth its loss" in s["reason"]))


@pytest.mark.parametrize("ratio", [0.9, 0.6])
@pytest.mark.parametrize("guard", [True, False])
def test_a_budget_of_time_is_kept_and_used(ratio: float, guard: bool, seconds_per_number: None) -> None:
    model = FAMILIES["llama"].build()
    whole = sum(m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n)
    config = tc.Auto(ratio=ratio, budget="time", guard_speed=guard, families=("svd", "widthprune"), screen=0)
    report = tc.compress_(model, config, DATA, progress=False)
    assert 0.85 * ratio * whole < seconds_of(report) <= ratio * whole * (1 + 1e-6)


def test_layers_slower_than_dense_are_not_offered(seconds_per_number: None) -> None:
    model = FAMILIES["llama"].build()
    report = tc.compress_(model, tc.Auto(ratio=0.9, families=("svd", "cur")), DATA, progress=False)
    assert report.records
    assert all(SLOWER * r["size_after"] <= r["size_before"] for r in report.records)
    assert any("slower than dense" in note for note in report.notes)


def test_auto_with_one_family() -> None:
    model = FAMILIES["llama"].build()
    report = tc.compress_(model, tc.Auto(ratio=0.7, families=("svd",), guard_speed=False), DATA, progress=False)
    assert {r["method"] for r in report.records} == {"SVD"}


def test_measured_times_grow_with_the_size() -> None:
    weight = torch.randn(192, 256, generator=torch.Generator().manual_seed(0))
    unit = Unit("w", "linear", (Linear("w", weight, gram=torch.eye(256), output_gram=torch.eye(192)),))
    config = tc.SVD()
    options = svd.options(unit, config)
    found = LayerTimes(nn.Linear(2, 2), 1).timed(unit, svd.METHOD, config, options)
    ranked = sorted((o for o in found if not o.choice.get("dense")), key=lambda o: o.bits)
    assert all(0 < a.seconds <= b.seconds for a, b in itertools.pairwise(ranked))
    dense = [o for o in found if o.choice.get("dense")]
    assert [isinstance(o, Option) and o.seconds > 0 for o in dense] == [True]
