"""Budgets of measured time, and the options that are left out for being slower than dense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import nn

import tinycomp as tc
from tinycomp.edits import Replace
from tinycomp.eval.timing import Timing
from tinycomp.layer_times import LayerTimes, _masked, masks_over_dense
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
    config = tc.Auto(ratio=ratio, budget="time", guard_speed=guard, families=("svd", "widthprune"), screen=0, bits=())
    report = tc.compress_(model, config, DATA, progress=False)
    assert 0.85 * ratio * whole < seconds_of(report) <= ratio * whole * (1 + 1e-6)


def test_costs_of_units_share_the_time_of_their_linears(seconds_per_number: None) -> None:
    """One second per weight: a unit costs a million microseconds per weight that goes with it."""
    model = FAMILIES["llama"].build()
    expected = {g.kind: 1e6 * g.parameters_per_unit for g in tc.unit_groups(model)}
    assert tc.unit_costs(model) == pytest.approx(expected)
    assert tc.unit_costs(model, tc.unit_groups(model)[:1]).keys() == {"qk"}


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


@pytest.mark.parametrize("weights", [True, False])
def test_masks_that_lose_to_the_dense_kernel_are_refused_until_accepted(
    weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[Any, Any]] = []

    def masks_over_dense(kept: Any, config: Any, dtype: torch.dtype) -> float:
        asked.append(dict(kept))
        return 1.25 if config.rows == 1 else 0.8

    monkeypatch.setattr("tinycomp.layer_times.masks_over_dense", masks_over_dense)
    model = FAMILIES["llama"].build()
    source = model if weights else model.config
    fields: dict[str, Any] = {"ratio": 0.5, "structured": False}
    with pytest.raises(ValueError, match=r"1\.25 times as long .* at 1 rows in float32, allowed .*guard_speed=False"):
        tc.plan(source, tc.Wanda(**fields), DATA, progress=False)
    assert {sum(1 for w in widths if 0 < w < n) for (_, n), widths in asked[-1].items()} - {0}
    assert tc.plan(source, tc.Wanda(**fields, rows=32), DATA, progress=False)["modules"]
    calls = len(asked)
    assert tc.plan(source, tc.Wanda(**fields, guard_speed=False), DATA, progress=False)["modules"]
    assert len(asked) == calls
    if weights:
        with pytest.raises(ValueError, match="guard_speed=False"):
            tc.compress_(model, tc.Wanda(**fields), DATA, progress=False)
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_masks_are_timed_beside_the_dense_kernel_and_weighted_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([(3.0, 1.0), (2.0, 4.0)])

    def timed(runs: Any, repeats: int) -> dict[str, Timing]:
        for run in runs.values():
            run()
        return {name: Timing((value,)) for name, value in zip(runs, next(seconds), strict=True)}

    monkeypatch.setattr("tinycomp.layer_times.time_interleaved", timed)
    config = tc.Wanda(structured=False, value_bits=8)
    found = masks_over_dense({(24, 40): [4, 8], (40, 24): [3]}, config, torch.bfloat16)
    assert found == pytest.approx((2 * 3 + 2) / (2 * 1 + 4))


def test_layers_of_masks_are_timed_with_their_own_places() -> None:
    edit = Replace("w", layer="MaskedLinear", kwargs={"in_features": 40, "out_features": 24, "nnz": 24 * 7})
    layer = _masked(tc.layers.LAYERS[edit.layer](**edit.kwargs))
    assert ((layer.dense_weight() != 0).sum(1) == 7).all()
