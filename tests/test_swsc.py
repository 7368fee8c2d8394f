"""SWSC: the published bit counts, monotone alternation, edits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrices import moment, normal
from pydantic import ValidationError
from torch import Tensor, nn

from tinycomp.edits import Plan
from tinycomp.methods import swsc
from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._kmeans import Lloyd
from tinycomp.methods._shared_weights import (
    Metric,
    average_bits,
    fit,
    low_rank,
    model_average_bits,
    paper_split,
    stored_bits,
    stored_numbers,
)
from tinycomp.surgery import apply_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unit(weight: Tensor, gram: Tensor | None = None, output_gram: Tensor | None = None, **fields) -> Unit:
    return Unit("fc", "linear", (Linear("fc", weight, gram=gram, output_gram=output_gram, **fields),))


# --- accounting --------------------------------------------------------------


@pytest.mark.parametrize(("k", "r", "bits"), [(256, 0, 1.004), (256, 128, 2.004), (256, 256, 3.004), (128, 192, 2.004)])
def test_published_average_bits(k, r, bits):
    assert average_bits(4096, 4096, k, r) == pytest.approx(bits, abs=5e-4)
    assert average_bits(4096, 4096, k, r) == 16 * (k + 1 + 2 * r) / 4096
    assert average_bits(4096, 4096, k, r, axis=1) == average_bits(4096, 4096, k, r)


def test_two_bit_projections_leave_a_13_8_bit_model():
    matrix = 4096 * 4096
    whole = model_average_bits([(matrix, average_bits(4096, 4096, 256, 128))] * 64, 6_738_415_616 - 64 * matrix)
    assert whole == pytest.approx(13.8, abs=0.05)


def test_rectangular_sizes_follow_the_axis():
    assert stored_numbers(192, 576, 10, 7) == 10 * 576 + 192 + 7 * (192 + 576)
    assert stored_numbers(192, 576, 10, 7, axis=1, scaled=True) == 10 * 192 + 2 * 576 + 7 * (192 + 576)
    assert stored_bits(8, 6, 2, 1, number_bits=16) == 16 * (2 * 6 + 14) + 8 * 8
    assert stored_bits(600, 6, 300, 0, number_bits=32) == 32 * 300 * 6 + 32 * 600


def test_the_paper_halves_its_nominal_budget():
    assert paper_split(4096, 4096, 2 / 16 * 4096**2) == (256, 128)
    assert paper_split(4096, 4096, 3 / 16 * 4096**2) == (384, 192)


# --- the fit -----------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("k", "r"), [("all", 0), (1, "all")])
def test_all_clusters_or_full_rank_is_exact(axis, weighted, k, r):
    w = normal(33, 20)
    metric = Metric.of(moment(20), moment(33, seed=3), axis, 1e-4) if weighted else None
    k, r = (w.shape[axis] if k == "all" else k), (20 if r == "all" else r)
    factors, _ = fit(w, k, r, axis=axis, metric=metric)
    assert float((factors.dense() - w).norm() / w.norm()) < (1e-3 if weighted else 1e-5)


def test_low_rank_matches_the_svd():
    for a in (normal(30, 12), normal(12, 30)):
        left, right = low_rank(a, 5)
        _, s, _ = torch.linalg.svd(a)
        assert float((a - left @ right).norm()) == pytest.approx(float(s[5:].norm()), rel=1e-5)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # an even split
        torch.testing.assert_close(left.T @ left, torch.diag(s[:5]), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@example(m=22, n=11, axis=1, scaled=True, balanced=True, statistics="rank-deficient", seed=1)
@given(
    m=st.integers(4, 30),
    n=st.integers(4, 30),
    axis=st.integers(0, 1),
    scaled=st.booleans(),
    balanced=st.booleans(),
    statistics=st.sampled_from(["none", "inputs", "both", "rank-deficient"]),
    seed=st.integers(0, 99),
)
def test_no_half_step_raises_the_error(m, n, axis, scaled, balanced, statistics, seed):
    w = normal(m, n, seed=seed)
    gram = {"none": None, "rank-deficient": moment(n, rank=max(n // 3, 1))}.get(statistics, moment(n))
    output_gram = moment(m, seed=2) if statistics in ("both", "rank-deficient") else None
    metric = Metric.of(gram, output_gram, axis, 1e-4)
    k, r = max(w.shape[axis] // 3, 1), min(m, n) // 3
    lloyd = Lloyd(scaled=scaled, balanced=balanced, tolerance=0.0, seed=seed)
    factors, history = fit(w, k, r, axis=axis, metric=metric, iterations=4, lloyd=lloyd)
    # Leaving a metric of condition 1e4 costs four of float32's seven digits.
    slack = 1e-3 if statistics == "rank-deficient" else 1e-4
    for before, after in itertools.pairwise(history):
        assert after <= before * (1 + slack)
    linear = Linear("fc", w, gram=gram, output_gram=output_gram)
    assert torch.isfinite(factors.dense()).all()
    assert linear.predicted_loss(w - factors.dense()) <= 0.5 * history[-1] ** 2 * (1 + 1e-2)


def test_refinement_beats_one_pass():
    clustered = normal(6, 40, seed=1)[torch.arange(48) % 6] + 0.3 * normal(48, 40)
    w = clustered + normal(48, 3, seed=7) @ normal(3, 40, seed=8)
    _, history = fit(w, 6, 3, iterations=8, lloyd=Lloyd(tolerance=0.0))
    assert history[-1] < 0.98 * history[0]


def test_weighting_pays_on_the_outputs():
    w, gram = normal(48, 40), moment(40)
    linear = Linear("fc", w, gram=gram)
    plain, _ = fit(w, 6, 8)
    weighted, _ = fit(w, 6, 8, metric=Metric.of(gram, None, 0, 1e-4))
    assert linear.relative_error(w - weighted.dense()) < 0.8 * linear.relative_error(w - plain.dense())


def test_input_channels_in_a_metric_beat_clustering_that_ignores_the_coupling():
    w, gram = normal(24, 36), moment(36)
    linear = Linear("fc", w, gram=gram)
    coupled, _ = fit(w, 9, 0, axis=1, metric=Metric.of(gram, None, 1, 1e-4))
    plain, _ = fit(w, 9, 0, axis=1)
    assert linear.relative_error(w - coupled.dense()) < 0.8 * linear.relative_error(w - plain.dense())


def test_the_paper_preset_is_one_pass_of_kmeans_and_svd():
    config = swsc.SWSC(preset="paper", clusters=4, rank=2)
    assert (config.weighted, config.iterations, config.allocation, config.sequential) == (False, 0, "uniform", False)
    assert config.targets == swsc.PAPER_TARGETS
    assert swsc.needs(config) == frozenset()
    w = normal(16, 12)
    built = swsc.build(unit(w, gram=moment(12)), {"clusters": 4, "rank": 2}, config).tensors
    labels = built["fc.labels"].long()
    for c in range(4):  # the representative is the mean of the members
        torch.testing.assert_close(built["fc.centroids.weight"][c], w[labels == c].mean(0))
    error = w - built["fc.centroids.weight"][labels]
    u, s, vt = torch.linalg.svd(error)
    torch.testing.assert_close(
        built["fc.a.weight"] @ built["fc.b.weight"], u[:, :2] @ torch.diag(s[:2]) @ vt[:2], rtol=1e-4, atol=1e-4
    )


def test_the_paper_preset_spends_two_bits_by_default():
    (only,) = swsc.options(unit(normal(96, 96), dtype=torch.bfloat16), swsc.SWSC(preset="paper"))
    assert only.choice == {"clusters": 6, "rank": 3}
    assert 16 * only.size / 96**2 == pytest.approx(2 + 16 / 96)


# --- the method --------------------------------------------------------------


@pytest.mark.parametrize("axis", ["output", "input"])
def test_options_rise_in_size_fall_in_loss_and_predict_what_build_reaches(axis):
    subject = unit(normal(40, 30), moment(30), moment(40, seed=3), dtype=torch.float32)
    config = swsc.SWSC(ratio=0.47, axis=axis)
    one_pass = config.model_copy(update={"iterations": 0})
    found = swsc.options(subject, config)
    assert found[-1].choice == {"dense": True}
    assert all(a.size <= b.size for a, b in itertools.pairwise(found))
    assert max(o.size for o in found if o.size <= 0.47 * 1200) > 0.4 * 1200
    assert found[-2].loss < 0.2 * found[0].loss
    for option in found[:-1:6]:
        (row,) = swsc.build(subject, option.choice, config).records
        assert row["size_after"] == option.size
        assert row["bits_after"] == option.bits
        assert 0.3 * option.loss <= row["predicted_loss"] <= option.loss * 1.001
        (once,) = swsc.build(subject, option.choice, one_pass).records
        assert once["predicted_loss"] == pytest.approx(option.loss, rel=0.05)  # but for the damping


@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_bits_are_a_budget_of_stored_bits(factor_bits):
    subject = unit(normal(64, 48), dtype=torch.bfloat16)
    (only,) = swsc.options(subject, swsc.SWSC(bits=6.0, factor_bits=factor_bits))
    assert 5.0 < only.bits / (64 * 48) <= 6.0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_of_rounding_is_predicted_and_apart_from_that_of_sharing(weighted, bits):
    subject = unit(normal(40, 30), moment(30), moment(40, seed=3), dtype=torch.float32)
    exact, low = (swsc.SWSC(ratio=0.6, weighted=weighted, iterations=0, factor_bits=b) for b in (16, bits))
    for before, after in list(zip(swsc.options(subject, exact), swsc.options(subject, low), strict=True))[:-1:6]:
        assert after.bits < 0.55 * before.bits
        (row,) = swsc.build(subject, after.choice, low).records
        assert 0 < row["rounding_loss"] < (row["truncation_loss"] if bits == 8 else row["predicted_loss"])
        assert row["predicted_loss"] == pytest.approx(row["truncation_loss"] + row["rounding_loss"], rel=0.1)
        if weighted:
            assert after.loss - before.loss == pytest.approx(row["rounding_loss"], rel=0.5)
        assert after.loss > before.loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("factor_bits", [16, 8, 4])
def test_the_applied_layer_is_the_matrix_that_was_fitted(dtype, axis, rank, factor_bits):
    model = nn.ModuleDict({"fc": nn.Linear(20, 28, dtype=dtype)})
    before: Any = model["fc"]
    w, bias = before.weight.detach().float(), before.bias.detach().clone()
    subject = unit(w, moment(20), moment(28, seed=3), bias=bias, dtype=dtype)
    config = swsc.SWSC(axis=axis, clusters=7, rank=rank, scaled=True, factor_bits=factor_bits)
    (option,) = swsc.options(subject, config)
    result = swsc.build(subject, option.choice, config)
    stored = {name: t for name, t in result.tensors.items() if name != "fc.bias"}
    assert option.bits == 8 * sum(t.nbytes for t in stored.values())
    if factor_bits != 4:  # where two numbers share a byte
        assert option.size == sum(t.numel() for name, t in stored.items() if not name.endswith("_scales"))
    apply_(model, Plan(result.edits), result.tensors)
    layer: Any = model["fc"]
    error = w - layer.dense_weight().detach().float()
    linear = subject.linears[0]
    assert result.records[0]["relative_error"] == pytest.approx(linear.relative_error(error), rel=0.02)
    x = normal(3, 20, seed=9).to(dtype)
    expected = x.float() @ layer.dense_weight().float().T + bias.float()
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.05)


def test_large_cluster_counts_store_int32_labels():
    result = swsc.build(unit(normal(300, 4)), {"clusters": 257, "rank": 0}, swsc.SWSC(clusters=257, rank=0))
    assert result.tensors["fc.labels"].dtype == torch.int32


def test_the_same_seed_builds_the_same_tensors():
    subject, config = unit(normal(30, 20), moment(20)), swsc.SWSC(clusters=6, rank=3)
    first, again = (swsc.build(subject, {"clusters": 6, "rank": 3}, config).tensors for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_dead_inputs_and_zero_statistics_are_survived(axis):
    gram = moment(20)
    gram[:5], gram[:, :5] = 0.0, 0.0
    for statistics in (gram, torch.zeros(20, 20)):
        subject = unit(normal(16, 20), statistics, torch.zeros(16, 16))
        config = swsc.SWSC(axis=axis, clusters=4, rank=2, scaled=True)
        (row,) = swsc.build(subject, {"clusters": 4, "rank": 2}, config).records
        assert np.isfinite(row["relative_error"])
        assert torch.isfinite(torch.tensor(swsc.options(subject, config)[0].loss))


def test_bad_input_is_refused_by_name():
    w = normal(8, 6)
    w[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"fc\.weight"):
        swsc.options(unit(w), swsc.SWSC(ratio=0.5))
    gram = moment(6)
    gram[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"fc\.gram"):
        swsc.build(unit(normal(8, 6), gram), {"clusters": 2, "rank": 1}, swsc.SWSC(clusters=2, rank=1))
    with pytest.raises(ValueError, match=r"clusters=9.*1\.\.8"):
        swsc.options(unit(normal(8, 6)), swsc.SWSC(clusters=9, rank=1))
    with pytest.raises(ValueError, match=r"rank=7.*0\.\.6"):
        swsc.options(unit(normal(8, 6)), swsc.SWSC(clusters=2, rank=7))
    with pytest.raises(ValueError, match="budget"):
        swsc.options(unit(normal(8, 600)), swsc.SWSC(bits=0.1))


@pytest.mark.parametrize(
    "fields", [{"rank": 3}, {"ratio": 0.5, "bits": 2.0}, {"clusters": 0}, {"axis": "rows"}, {"cluster": 4}]
)
def test_contradictory_configs_are_refused(fields):
    with pytest.raises(ValidationError):
        swsc.SWSC(**fields)
