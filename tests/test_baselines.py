"""Score-based pruning: brute force, exact sizes, predicted losses, the layers that are applied."""

from __future__ import annotations

import dataclasses
import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from matrices import linear_unit, moment, normal
from pydantic import ValidationError
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.edits import Plan, Slice
from tinycomp.methods import magnitude, random, ria, rounding, spp_mask, wanda
from tinycomp.methods._base import Linear, Method, Unit
from tinycomp.methods._pruning import removal_losses, row_places
from tinycomp.models import FFNSpec
from tinycomp.surgery import apply_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRUNERS: dict[str, ModuleType] = {
    "Wanda": wanda,
    "RIA": ria,
    "SPPMask": spp_mask,
    "Magnitude": magnitude,
    "Random": random,
}


def ffn_unit(hidden: int = 16, width: int = 40, *, gated: bool = True, dtype: torch.dtype = torch.float32) -> Unit:
    names = ("gate", "up") if gated else ("up",)
    inputs = [
        Linear(f"mlp.{name}", normal(width, hidden, seed=i), normal(width, seed=i + 20), moment(hidden), dtype=dtype)
        for i, name in enumerate(names)
    ]
    down = Linear("mlp.down", normal(hidden, width, seed=7), None, moment(width), moment(hidden, seed=4), dtype=dtype)
    spec = FFNSpec("mlp", tuple(x.path for x in inputs), "mlp.down", width, "intermediate_size", gated)
    return Unit("mlp", "ffn", (*inputs, down), ffn=spec)


def pruner(name: str, **fields: Any) -> tuple[Method, Any]:
    module = PRUNERS[name]
    config = getattr(module, name)(**{"structured": True, **fields})
    return (module.METHOD if config.structured else module.MASKED), config


# --- masks -------------------------------------------------------------------


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_bits", [0, 8, 4])
def test_masks_keep_the_same_number_per_row_and_apply(name, dtype, value_bits):
    unit = linear_unit(dtype=dtype)
    method, config = pruner(name, structured=False, ratio=0.35, value_bits=value_bits)
    option = next(o for o in method.options(unit, config) if o.choice.get("kept_per_row") == 7)
    result = method.build(unit, option.choice, config)
    stored = {k: t for k, t in result.tensors.items() if k != "fc.bias"}
    assert option.bits == 8 * sum(t.nbytes for t in stored.values())
    assert option.size == 12 * 7
    model = nn.ModuleDict({"fc": nn.Linear(20, 12, dtype=dtype)})
    apply_(model, Plan(result.edits), result.tensors)
    layer: Any = model["fc"]
    dense = layer.dense_weight().detach().float()
    if value_bits == 0:
        assert (dense != 0).sum(1).tolist() == [7] * 12
        assert torch.equal(dense[dense != 0], unit.linears[0].weight[dense != 0])
    loss = unit.linears[0].predicted_loss(unit.linears[0].weight - dense)
    assert result.records[0]["predicted_loss"] == pytest.approx(loss, rel=1e-4)
    assert option.loss == pytest.approx(loss, rel=1e-4)


def test_wanda_masks_are_the_best_of_each_row_by_its_score():
    linear = linear_unit(4, 6).linears[0]
    assert linear.gram is not None
    scores = wanda.weight_scores(linear, wanda.Wanda())
    torch.testing.assert_close(scores, linear.weight.abs() * linear.gram.diagonal().sqrt())
    keep = row_places(scores) < 3
    for row in range(4):
        best = max(itertools.combinations(range(6), 3), key=lambda c: float(scores[row, list(c)].sum()))
        assert keep[row].nonzero().flatten().tolist() == list(best)


def test_ria_scores_number_by_number():
    linear = linear_unit(4, 6).linears[0]
    w, gram = linear.weight.abs().tolist(), linear.gram
    assert gram is not None
    scores = ria.weight_scores(linear, ria.RIA())
    for i, j in itertools.product(range(4), range(6)):
        share = w[i][j] / sum(row[j] for row in w) + w[i][j] / sum(w[i])
        assert float(scores[i, j]) == pytest.approx(share * float(gram[j, j]) ** 0.25, rel=1e-5)


def test_a_path_over_independent_inputs_is_wandas_order_and_sees_what_wanda_does_not():
    linear = linear_unit(6, 16).linears[0]
    assert linear.gram is not None
    config = spp_mask.SPPMask(steps=400)
    alone = dataclasses.replace(linear, gram=linear.gram.diagonal().diag())
    ours, theirs = (
        row_places(s) < 8 for s in (spp_mask.weight_scores(alone, config), wanda.weight_scores(alone, wanda.Wanda()))
    )
    assert (ours & theirs).sum() >= 0.9 * theirs.sum()
    gram = torch.eye(8)
    gram[0, 1] = gram[1, 0] = 0.99  # inputs 0 and 1 are alike, and their weights cancel
    weight = torch.tensor([[1.0, -1.0, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1]])
    twins = dataclasses.replace(linear, weight=weight, bias=None, gram=gram, output_gram=None)
    losses = {}
    for module, cfg in ((spp_mask, config), (wanda, wanda.Wanda())):
        keep = row_places(module.weight_scores(twins, cfg)) < 4
        losses[module] = twins.relative_error(weight * ~keep)
    assert losses[spp_mask] < losses[wanda]


def test_twins_of_four_inputs_compete():
    linear = dataclasses.replace(linear_unit(6, 22).linears[0], gram=torch.eye(22))
    entered = {}
    for pattern in ("row", "2:4"):
        scores = spp_mask.weight_scores(linear, spp_mask.SPPMask(pattern=pattern))
        entered[pattern] = torch.nn.functional.pad(scores >= 1, (0, 2)).reshape(6, 6, 4).sum(2)
    assert int(entered["row"].max()) > 2
    assert int(entered["2:4"].max()) == 2
    assert int((entered["2:4"] == 2).sum()) >= int((entered["row"] >= 2).sum()) > 0


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("inputs", [20, 22])
def test_two_of_four_keeps_the_best_pair_of_every_group(name, inputs):
    unit = linear_unit(12, inputs)
    method, config = pruner(name, structured=False, pattern="2:4", ratio=0.5)
    option, _ = method.options(unit, config)
    result = method.build(unit, option.choice, config)
    model = nn.ModuleDict({"fc": nn.Linear(inputs, 12)})
    apply_(model, Plan(result.edits), result.tensors)
    layer: Any = model["fc"]
    dense = ops.unpack_masked(ops.masked_formats.Packed(layer.values, layer.mask, None, None), 12, inputs, "2:4")
    linear = unit.linears[0]
    scores = PRUNERS[name].weight_scores(linear, config)
    for i, start in itertools.product(range(12), range(0, inputs, 4)):
        group = scores[i, start : start + 4]
        best = group.argsort(descending=True, stable=True)[:2]
        expected = torch.zeros_like(group)
        expected[best] = linear.weight[i, start : start + 4][best]
        assert torch.equal(dense[i, start : start + 4], expected)
    assert option.loss == pytest.approx(linear.predicted_loss(linear.weight - dense), rel=1e-4)
    with pytest.raises(ValidationError, match="allowed with structured=False"):
        pruner(name, pattern="2:4")


def test_ties_keep_the_earlier_inputs():
    assert row_places(torch.ones(2, 5)).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_scores_that_know_more_cost_less():
    unit = linear_unit(24, 48)
    losses = []
    for name in ("Wanda", "Magnitude", "Random"):
        method, config = pruner(name, structured=False, ratio=0.5)
        losses.append(next(o.loss for o in method.options(unit, config) if o.size == 24 * 24))
    assert losses[0] < losses[1] < losses[2]


# --- feed-forward units ------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("has_output_gram", [True, False])
def test_removal_losses_match_the_masked_down_projection(gated, has_output_gram):
    down = ffn_unit(width=24, gated=gated).linears[-1]
    down.output_gram = down.output_gram if has_output_gram else None
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    losses = removal_losses(down, order)
    assert float(losses[0]) == 0.0
    for count in (1, 7, 24):
        error = torch.zeros_like(down.weight)
        error[:, order[:count]] = down.weight[:, order[:count]]
        assert float(losses[count]) == pytest.approx(down.predicted_loss(error), rel=1e-3)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sliced_units_equal_the_masked_sublayer(name, gated, dtype):
    unit = ffn_unit(gated=gated, dtype=dtype)
    method, config = pruner(name, ratio=0.6)
    assert method.unit_kind == "ffn"
    option = next(o for o in method.options(unit, config) if o.choice.get("width") == 24)
    result = method.build(unit, option.choice, config)
    assert option.size == unit.size * 24 // 40
    assert option.bits == option.size * 8 * dtype.itemsize
    assert sum(row["size_after"] for row in result.records) == option.size
    assert sum(row["predicted_loss"] for row in result.records) == pytest.approx(option.loss, rel=1e-3)
    assert {e.config_field for e in result.edits if isinstance(e, Slice)} == {"intermediate_size"}
    model = nn.ModuleDict({"mlp": nn.ModuleDict()})
    mlp: Any = model["mlp"]
    for x in unit.linears:
        mlp[x.path.split(".")[1]] = nn.Linear(x.in_features, x.out_features, bias=x.bias is not None, dtype=dtype)
    apply_(model, Plan(result.edits), result.tensors)
    kept = [int(i) for i in _kept(unit, mlp["down"].weight)]
    assert len(kept) == 24
    for x in unit.linears[:-1]:
        layer = mlp[x.path.split(".")[1]]
        assert torch.equal(layer.weight, x.weight.to(dtype)[kept])
        assert x.bias is not None
        assert torch.equal(layer.bias, x.bias.to(dtype)[kept])
        assert layer.out_features == 24


def _kept(unit: Unit, sliced: Tensor) -> list[int]:
    """Columns of the down projection that are in the sliced one, in order."""
    full = unit.linears[-1].weight.to(sliced.dtype)
    return [j for j in range(full.shape[1]) if any(torch.equal(full[:, j], c) for c in sliced.T)]


def test_conv1d_storage_is_input_by_output():
    unit = ffn_unit(gated=False)
    for x in unit.linears:
        x.transposed = True
    method, config = pruner("Magnitude")
    tensors = method.build(unit, {"width": 24}, config).tensors
    assert tensors["mlp.up.weight"].shape == (16, 24)
    assert tensors["mlp.down.weight"].shape == (24, 16)
    assert tensors["mlp.up.weight"].is_contiguous()


def test_unit_scores():
    unit = ffn_unit(width=6)
    gate, up, down = unit.linears
    torch.testing.assert_close(
        wanda.unit_scores(unit, wanda.Wanda()),
        torch.stack([(down.weight[:, j].abs() * down.gram[j, j].sqrt()).mean() for j in range(6)]),  # type: ignore[index]
    )
    scores = magnitude.unit_scores(unit, magnitude.Magnitude())
    torch.testing.assert_close(scores[2], gate.weight[2].norm() * up.weight[2].norm() * down.weight[:, 2].norm())


def test_widths_are_rounded_and_losses_fall():
    method, config = pruner("Wanda", round_to=4, ratio=0.5)
    found = method.options(ffn_unit(), config)
    assert all(o.choice["width"] % 4 == 0 for o in found[:-1])
    assert 20 in [o.choice["width"] for o in found[:-1]]
    assert found[-1].choice == {"dense": True}
    for smaller, larger in itertools.pairwise(found):
        assert smaller.size < larger.size


def test_random_follows_its_seed_and_differs_between_matrices():
    method, config = pruner("Random", structured=False)
    unit = linear_unit(statistics=False)
    choice = {"kept_per_row": 10}
    first, again = (method.build(unit, choice, config).tensors["fc.mask"] for _ in range(2))
    _, other_seed = pruner("Random", structured=False, seed=1)
    assert torch.equal(first, again)
    assert not torch.equal(first, method.build(unit, choice, other_seed).tensors["fc.mask"])
    unit.linears[0].path = "other"
    assert not torch.equal(first, method.build(unit, choice, config).tensors["other.mask"])


@pytest.mark.parametrize("name", PRUNERS)
def test_statistics_are_asked_for_only_where_they_matter(name):
    method, config = pruner(name, allocation="uniform")
    assert method.needs(config) == ({"gram"} if name in ("Wanda", "RIA", "SPPMask") else frozenset())
    method, config = pruner(name)
    assert method.needs(config) == {"gram", "output_gram"}


# --- bad input ---------------------------------------------------------------


def test_dead_inputs_are_pruned_first():
    unit = linear_unit()
    gram = unit.linears[0].gram
    assert gram is not None
    gram[:8], gram[:, :8] = 0.0, 0.0
    method, config = pruner("Wanda", structured=False)
    result = method.build(unit, {"kept_per_row": 12}, config)
    assert result.records[0]["relative_error"] == pytest.approx(0.0, abs=1e-6)


def test_wanda_without_statistics_says_what_to_pass():
    method, config = pruner("Wanda", structured=False)
    with pytest.raises(ValueError, match=r"fc: got no calibration statistics.*`data`"):
        method.options(linear_unit(statistics=False), config)


@pytest.mark.parametrize("name", [*PRUNERS, "Rounding"])
def test_nan_weights_are_refused_by_name(name):
    unit = linear_unit()
    unit.linears[0].weight[1, 2] = float("nan")
    method, config = (rounding.METHOD, rounding.Rounding()) if name == "Rounding" else pruner(name, structured=False)
    with pytest.raises(ValueError, match=r"fc\.weight"):
        method.options(unit, config)
