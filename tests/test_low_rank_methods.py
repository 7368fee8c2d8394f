"""SVD, CUR and width pruning as pure functions: exactness, sizes, orderings, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinycomp.edits import Plan
from tinycomp.layers import LAYERS, LowRankLinear, QuantLowRankLinear
from tinycomp.methods import CUR, METHODS, SVD, Linear, Unit, WidthPrune, svd
from tinycomp.methods._low_rank import FactorRounding, Factors, rank_for, rank_grid, stored_size
from tinycomp.models import FFNSpec, UnitPath


def linear(
    m: int = 24, n: int = 16, seed: int = 0, *, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Linear:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(m, n, generator=g)
    if rank is not None:
        w = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    x = torch.randn(200, n, generator=g) * torch.logspace(0, -1, n)
    y = torch.randn(200, m, generator=g) * torch.logspace(0, -1, m)
    return Linear("layer", w, torch.randn(m, generator=g), x.T @ x / 200, y.T @ y / 200, dtype=dtype)


def build(config: Any, unit: Unit, choice: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """(W' as the layer computes it, record), after a JSON round trip of the edit."""
    method = METHODS[type(config).__name__]
    result = method.build(unit, choice, config)
    (edit,) = Plan.from_dict(json.loads(json.dumps(Plan(result.edits).to_dict()))).edits
    layer = LAYERS[edit.layer](**edit.kwargs)  # type: ignore[attr-defined]
    layer.load_state_dict({k.removeprefix("layer."): v for k, v in result.tensors.items()}, strict=False)
    return layer.dense_weight().detach().float(), result.records[0]


CONFIGS = [
    SVD(ratio=0.5),
    SVD(ratio=0.5, weighting="inputs"),
    SVD(ratio=0.5, weighting="none"),
    SVD(ratio=0.5, pivoted=False),
    CUR(ratio=0.5),
    CUR(ratio=0.5, selection="qdeim"),
    CUR(ratio=0.5, form="cur", selection="sketch-qr"),
    CUR(ratio=0.5, form="cur", selection="leverage", link="qr", trainable=True),
]
LOW_BIT = [
    SVD(ratio=0.5, bits=8),
    SVD(ratio=0.5, bits=4),
    SVD(ratio=0.5, bits=8, weighting="none", pivoted=False),
    CUR(ratio=0.5, bits=8),
    CUR(ratio=0.5, bits=4, form="cur", selection="sketch-qr", activation_bits=8),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (13, 13)])
def test_exact_at_the_weights_own_rank(config: Any, shape: tuple[int, int]) -> None:
    target = linear(*shape, rank=4)
    new, row = build(config, Unit("layer", "linear", (target,)), {"rank": 4})
    assert (new - target.weight).norm() <= 2e-3 * target.weight.norm()
    assert row["relative_error"] < 2e-3


@pytest.mark.parametrize("config", CONFIGS + LOW_BIT, ids=str)
def test_options_fall_in_loss_and_say_what_build_stores(config: Any) -> None:
    unit = Unit("layer", "linear", (linear(),))
    method = METHODS[type(config).__name__]
    options = [o for o in method.options(unit, config) if not o.choice.keys() & {"dense", "full"}]
    assert options
    for option in options[:: max(len(options) // 4, 1)]:
        result = method.build(unit, option.choice, config)
        row = result.records[0]
        assert row["size_after"] == option.size == stored_size(24, 16, row["rank"], *_form(config)) + _link(config, row)
        stored = [t for name, t in result.tensors.items() if not name.endswith("bias")]
        assert sum(8 * t.nbytes for t in stored) == option.bits == result.records[0]["bits_after"]
        if row.get("bits", 16) == 16:
            floats = [t for t in stored if t.is_floating_point()]
            assert sum(t.numel() for t in floats) == option.size
        if not (isinstance(config, SVD) and config.weighting != "loss"):
            reached = row["predicted_loss"]
            assert reached == pytest.approx(option.loss, rel=0.35, abs=1e-4)
    if not (isinstance(config, CUR) and config.selection == "leverage") and config.bits != 4:
        # sampling is not monotone, nor is 4-bit rounding, which costs more than the last ranks gain
        losses = [o.loss for o in options]
        assert all(b <= a * 1.05 + 1e-6 for a, b in itertools.pairwise(losses))


def _form(config: Any) -> tuple[bool]:
    return (config.pivoted if isinstance(config, SVD) else config.form == "rows",)


def _link(config: Any, row: dict[str, Any]) -> int:
    return row["rank"] ** 2 if getattr(config, "trainable", False) else 0


@pytest.mark.parametrize("config", LOW_BIT, ids=str)
def test_rounding_is_recorded_apart_and_its_layer_is_what_the_record_says(config: Any) -> None:
    target = linear(48, 40)
    new, row = build(config, Unit("layer", "linear", (target,)), {"rank": 12})
    assert row["bits"] == config.bits
    assert row["predicted_loss"] == pytest.approx(target.predicted_loss(target.weight - new), rel=1e-3)
    assert 0 < row["rounding_loss"] < (1.0 if config.bits == 4 else 0.01) * row["truncation_loss"]
    assert row["predicted_loss"] == pytest.approx(row["truncation_loss"] + row["rounding_loss"], rel=0.3)


def test_refitting_the_second_factor_to_the_rounded_first_pays() -> None:
    target = linear(96, 80)
    exact = Factors(*svd.decompose(target, 24, SVD(ratio=0.5)))
    layer = QuantLowRankLinear.from_low_rank(LowRankLinear.from_factors(*exact), 4, 64, symmetric=False)
    plain = target.predicted_loss(exact.dense() - layer.dense_weight())
    assert FactorRounding(target, 4).loss(exact) < 0.8 * plain


def test_contradictory_bits_are_refused() -> None:
    for fields, message in (
        ({"form": "cur", "selection": "qdeim", "trainable": True, "bits": 8}, "trainable=False"),
        ({"activation_bits": 8}, "set bits=8"),
        ({"bits": 2}, "16, 8 or 4"),
    ):
        with pytest.raises(ValueError, match=message):
            CUR(ratio=0.5, **fields)


def test_kept_rows_are_real_rows() -> None:
    target = linear()
    new, _ = build(CUR(ratio=0.5), Unit("layer", "linear", (target,)), {"rank": 6})
    exact = (new == target.weight).all(1)
    assert int(exact.sum()) == 6


def test_weighting_both_sides_is_never_worse_in_predicted_loss() -> None:
    target = linear()
    unit = Unit("layer", "linear", (target,))
    losses = {
        w: build(SVD(ratio=0.5, weighting=w), unit, {"rank": 6})[1]["predicted_loss"]
        for w in ("loss", "inputs", "none")
    }
    assert losses["loss"] <= losses["inputs"] * 1.0001
    assert losses["loss"] <= losses["none"] * 1.0001


@pytest.mark.parametrize(("m", "n"), [(24, 16), (16, 24), (5, 5)])
def test_grid_sizes(m: int, n: int) -> None:
    assert all(stored_size(m, n, r) < m * n for r in rank_grid(m, n))
    for ratio in (0.1, 0.5, 0.9):
        rank = rank_for(m, n, ratio)
        assert rank == 1 or stored_size(m, n, rank) <= ratio * m * n


def ffn(seed: int = 0, *, transposed: bool = False) -> Unit:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(300, 20, generator=g) * torch.logspace(0, -1.5, 20)
    inputs = tuple(
        Linear(name, torch.randn(20, 6, generator=g), torch.randn(20, generator=g), torch.eye(6), torch.eye(20))
        for name in ("block.gate", "block.up")
    )
    down = Linear(
        "block.down", torch.randn(6, 20, generator=g), None, hidden.T @ hidden / 300, torch.eye(6), transposed
    )
    spec = FFNSpec("block", ("block.gate", "block.up"), "block.down", 20, "intermediate_size", True)
    return Unit("block#ffn", "ffn", (*inputs, down), 0, spec)


@pytest.mark.parametrize(
    "fields",
    [{}, {"refit": False}, {"selection": "energy"}, {"path": "order.safetensors"}],
    ids=["surgeon", "no-refit", "energy", "path"],
)
def test_width_options_predict_what_build_reaches(
    fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    UnitPath.from_scores({"block.ffn": torch.arange(20.0)}).save("order.safetensors")
    config = WidthPrune(ratio=0.5, round_to=1, damping=1e-8, **fields)
    unit, method = ffn(), METHODS["WidthPrune"]
    for option in method.options(unit, config)[:-1:4]:
        result = method.build(unit, option.choice, config)
        down = next(r for r in result.records if r["path"] == "block.down")
        assert down["predicted_loss"] == pytest.approx(option.loss, rel=0.1, abs=1e-5)
        weights = sum(t.numel() for name, t in result.tensors.items() if name.endswith("weight"))
        assert weights == option.size


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_width_options_say_what_build_stores_and_loses(bits: int) -> None:
    config = WidthPrune(ratio=0.5, round_to=1, damping=1e-8, bits=bits)
    unit, method = ffn(), METHODS["WidthPrune"]
    options = method.options(unit, config)
    for option in (*options[8::4], options[-1]):
        result = method.build(unit, option.choice, config)
        assert sum(r["bits_after"] for r in result.records) == option.bits
        assert sum(r["size_after"] for r in result.records) == option.size
        stored = {f"{r['path']}.{name}" for r in result.records for name in ("qweight", "scales", "zeros")}
        assert 8 * sum(t.nbytes for name, t in result.tensors.items() if name in stored) == option.bits
        lost = sum(r["truncation_loss"] + r["rounding_loss"] for r in result.records)
        assert lost == pytest.approx(option.loss, rel=0.3)
        assert lost == pytest.approx(sum(r["predicted_loss"] for r in result.records), rel=0.2)


def test_refit_beats_no_refit_and_surgeon_beats_energy() -> None:
    unit, method = ffn(), METHODS["WidthPrune"]

    def reached(**fields: Any) -> float:
        config = WidthPrune(ratio=0.5, round_to=1, **fields)
        return method.build(unit, {"width": 8}, config).records[-1]["predicted_loss"]

    assert reached() <= reached(refit=False)
    assert reached() <= reached(selection="energy") * 1.001


def test_width_units_in_the_order_of_a_path(tmp_path: Path) -> None:
    file = tmp_path / "order.safetensors"
    entry = torch.full((20,), -1, dtype=torch.int32)
    entry[[7, 2, 11]] = torch.tensor([5, 9, 5], dtype=torch.int32)
    tie = torch.rand(20, generator=torch.Generator().manual_seed(1))
    tie[11] = 2.0  # of the two that entered together
    path = UnitPath({"block.ffn": entry}, {"block.ffn": tie})
    path.save(file)
    never = [u for u in tie.argsort(descending=True).tolist() if entry[u] < 0]
    assert path.order("block.ffn").tolist() == [11, 7, 2, *never]
    config = WidthPrune(ratio=0.5, round_to=1, path=str(file))
    assert config.selection == "path"
    unit, method = ffn(), METHODS["WidthPrune"]
    built = method.build(unit, {"width": 4}, config)
    kept = sorted([11, 7, 2, never[0]])
    assert torch.equal(built.tensors["block.gate.weight"], unit.linears[0].weight[kept])
    with pytest.raises(ValueError, match=r"path='x', allowed is a path with selection='path'"):
        WidthPrune(ratio=0.5, selection="energy", path="x")
    with pytest.raises(ValueError, match="path=None"):
        WidthPrune(ratio=0.5, selection="path")
    UnitPath.from_scores({"block.ffn": torch.ones(19), "block.v": torch.ones(20)}).save(file)
    with pytest.raises(ValueError, match="ranks 19 neurons of this block, allowed 20"):
        method.options(unit, config)


def test_transposed_storage() -> None:
    plain = METHODS["WidthPrune"].build(ffn(), {"width": 8}, WidthPrune(ratio=0.5))
    turned = METHODS["WidthPrune"].build(ffn(transposed=True), {"width": 8}, WidthPrune(ratio=0.5))
    assert torch.equal(plain.tensors["block.down.weight"].T, turned.tensors["block.down.weight"])


@pytest.mark.parametrize("name", ["SVD", "CUR"])
def test_bad_weights_and_ranks_are_refused(name: str) -> None:
    method = METHODS[name]
    target = linear()
    with pytest.raises(ValueError, match="got rank 17, allowed 1 to 16"):
        method.options(Unit("layer", "linear", (target,)), method.config(rank=17))
    target.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.weight: got"):
        method.options(Unit("layer", "linear", (target,)), method.config(rank=2))


def test_dead_inputs_and_outputs_do_not_break() -> None:
    target = linear()
    assert target.gram is not None
    assert target.output_gram is not None
    target.gram[3, :] = target.gram[:, 3] = 0
    target.output_gram[5, :] = target.output_gram[:, 5] = 0
    for config in (SVD(ratio=0.5), CUR(ratio=0.5)):
        new, row = build(config, Unit("layer", "linear", (target,)), {"rank": 6})
        assert torch.isfinite(new).all()
        assert row["predicted_loss"] >= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_take_the_modules_dtype(dtype: torch.dtype) -> None:
    target = linear(dtype=dtype)
    for config in (SVD(ratio=0.5), CUR(ratio=0.5)):
        result = METHODS[type(config).__name__].build(Unit("layer", "linear", (target,)), {"rank": 6}, config)
        assert {t.dtype for t in result.tensors.values() if t.is_floating_point()} == {dtype}


def test_config_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match="ratio"):
        SVD(ratio=1.5)
    with pytest.raises(ValueError, match="selection: got 'best'"):
        CUR(ratio=0.5, selection="best")
    with pytest.raises(ValueError, match="no link U to train"):
        CUR(ratio=0.5, trainable=True)


def test_paper_preset_is_the_release() -> None:
    config = CUR(preset="paper")
    assert (config.form, config.selection, config.link, config.signed, config.trainable) == (
        "cur", "released", "pinv", False, True,
    )  # fmt: skip
    assert not config.sequential
    assert CUR(preset="paper", selection="qdeim").selection == "qdeim"  # each step can still be switched
