"""Rounding: brute force, exact sizes, predicted losses, the layers that are applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import linear_unit, moment, normal
from pydantic import ValidationError
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.edits import Plan
from tinycomp.methods import rounding
from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._rounding import feedback, rounded, spread_errors
from tinycomp.surgery import apply_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (8, 4), (4, 0), (4, 6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_stores_what_it_says_and_applies(bits, group_size, dtype):
    unit = linear_unit(dtype=dtype)
    config = rounding.Rounding(bits=bits, group_size=group_size)
    (option,) = rounding.options(unit, config)
    result = rounding.build(unit, option.choice, config)
    stored = {name: t for name, t in result.tensors.items() if name != "fc.bias"}
    assert option.bits == 8 * sum(t.nbytes for t in stored.values())
    assert option.size == 12 * 20
    model = nn.ModuleDict({"fc": nn.Linear(20, 12, dtype=dtype)})
    apply_(model, Plan(result.edits), result.tensors)
    layer: Any = model["fc"]
    linear = unit.linears[0]
    error = linear.weight - layer.dense_weight().float()
    assert result.records[0]["predicted_loss"] == pytest.approx(linear.predicted_loss(error), rel=1e-4)
    assert option.loss == pytest.approx(result.records[0]["predicted_loss"], rel=1e-6)
    assert linear.relative_error(error) < (0.02 if bits == 8 else 0.2)
    assert linear.bias is not None
    torch.testing.assert_close(layer.bias.detach(), linear.bias.to(dtype))


def test_eight_bits_round_each_row_to_the_nearest_level():
    w = normal(5, 9)
    q, scales, zeros = rounded(w, 8, 0)
    assert zeros is None
    levels = torch.arange(-127, 128) * scales[:, :, None]
    nearest = (w[:, :, None] - levels).abs().amin(2)
    torch.testing.assert_close((w - q * scales).abs(), nearest, rtol=1e-4, atol=1e-7)


def test_four_bits_are_exact_on_a_grid_of_sixteen_levels():
    w = (torch.arange(64).reshape(4, 16) % 16 - 6) * 0.25
    packed = rounded(w, 4, 16, torch.ones(16))
    torch.testing.assert_close(ops.dequantize(*packed, 16, 4, 16), w)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 40),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([0, 2, 6, 16]),
    seed=st.integers(0, 99),
)
def test_the_clip_search_never_costs_more_than_plain_rounding(m, n, bits, group_size, seed):
    w, importance = normal(m, n, seed=seed) ** 3, normal(n, seed=seed + 1).square()

    def cost(packed: ops.Quantized) -> float:
        return float((importance * (w - ops.dequantize(*packed, n, bits, group_size)).square()).sum())

    plain = cost(rounded(w, bits, group_size))
    assert cost(rounded(w, bits, group_size, importance)) <= plain * (1 + 1e-4) + 1e-9


def test_the_clip_search_pays_at_four_bits():
    linear = Linear("fc", normal(64, 128), gram=torch.diag(torch.logspace(1, -3, 128)))
    errors = []
    for search in (False, None):
        config = rounding.Rounding(bits=4, search=search)
        errors.append(rounding.build(Unit("fc", "linear", (linear,)), {"bits": 4}, config).records[0]["relative_error"])
    assert errors[1] < 0.95 * errors[0]


def test_open_bits_offer_both_widths_and_dense():
    found = rounding.options(linear_unit(64, 128), rounding.Rounding())
    assert [o.choice for o in found] == [{"bits": 8}, {"bits": 4}, {"dense": True}]
    assert found[1].bits < found[0].bits < found[2].bits
    assert found[1].loss > found[0].loss > found[2].loss == 0.0


def test_rounding_asks_only_for_the_statistics_it_uses():
    assert rounding.needs(rounding.Rounding(bits=8)) == frozenset()
    assert rounding.needs(rounding.Rounding(bits=4)) == {"gram"}
    assert rounding.needs(rounding.Rounding()) == {"gram", "output_gram"}


@pytest.mark.parametrize("fields", [{"bits": 3}, {"group_size": 7}, {"group_size": -2}, {"ratio": 1.5}])
def test_impossible_roundings_are_refused(fields):
    with pytest.raises(ValidationError):
        rounding.Rounding(**fields)


@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 16), (4, 0)])
def test_spread_errors_never_cost_more_than_nearest_levels_and_usually_much_less(bits, group_size):
    mixing = normal(70, 70, seed=5)
    w, h = normal(24, 70), mixing.T @ moment(70) @ mixing
    nearest = rounded(w, bits, group_size)
    spread = spread_errors(w, nearest, bits, group_size, feedback(h), h)

    def cost(packed: Any) -> Tensor:
        error = w - ops.dequantize(*packed, 70, bits, group_size)
        return ((error @ h) * error).sum(1)

    assert (cost(spread) <= cost(nearest) * (1 + 1e-5)).all()
    assert cost(spread).sum() < 0.7 * cost(nearest).sum()
    assert torch.equal(spread.scales, nearest.scales)
