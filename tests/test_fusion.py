"""Layer pruning: signals on known cases, the regressor and its file, the search, and the method end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from torch import nn

from tinycomp.compression import shadow_of
from tinycomp.edits import Plan
from tinycomp.models import spec_of
from tinycomp.signals import (
    SIGNALS,
    TWELVE,
    BlockEdit,
    FusionModel,
    Search,
    SignalTable,
    Transition,
    baseline,
    collect_signals,
    estimators,
    quality,
    training_rows,
)
from tinycomp.signals.registry import columns, price, rank, rank_correlations
from tinycomp.surgery import apply_

DATA = [{"input_ids": torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(i))} for i in range(4)]
LABELLED = [batch | {"labels": (batch["input_ids"][:, 1] > 30).long()} for batch in DATA]
DEPTH = {"gpt2": "n_layer"}


def build(family: str, depth: int = 5) -> Any:
    return FAMILIES[family].build(**{DEPTH.get(family, "num_hidden_layers"): depth})


def search_on(model: nn.Module, batches: Any = DATA, **fields: Any) -> Search:
    def edited(edits: Any) -> nn.Module:
        copy = shadow_of(model)
        apply_(copy, Plan(edits), {})
        return copy

    return Search(edited, model, batches[:2], batches[2:], gradient_samples=4, **fields)


def make_identity(model: nn.Module, index: int) -> None:
    """Zero what the block adds to the residual stream."""
    block = spec_of(model).blocks[index]
    with torch.no_grad():
        for path in (block.attention[0].o, block.ffn.down):
            for parameter in model.get_submodule(path).parameters():
                parameter.zero_()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_an_identity_block_is_the_first_choice_where_that_is_meaningful(family):
    model = build(family)
    make_identity(model, 2)
    table = collect_signals(model, spec_of(model), DATA, gradient_samples=8)
    wanted = [f"{n}@update" if s.update else n for n, s in SIGNALS.items() if s.identity_first]
    assert {c: rank(table.values, c)[0] for c in wanted} == dict.fromkeys(wanted, 2)
    assert len(wanted) == 7
    assert set(table.values) == set(columns()) - {"skip_loss", "entry_time"}
    search = search_on(model)
    assert search.skip_losses()[2] == pytest.approx(search.quality(()).loss, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_probing_gives_the_losses_of_the_shorter_models(family):
    model = build(family)
    data = LABELLED if family == "bert" else DATA
    whole = quality(model, data).loss
    search = search_on(model, data[2:] * 2, probe=True, recompute=False)  # signals and quality on the same data
    values = search.table(()).values["skip_loss"]
    assert values == pytest.approx(search.skip_losses(), rel=1e-5)
    assert quality(model, data).loss == whole  # all blocks run again
    assert search.by_signal("skip_loss", 2) == [int(i) for i in np.argsort(values)[:2]]


def test_one_pass_gives_the_twelve_and_leaves_the_model_alone():
    model = build("llama")
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    before = {n: p.clone() for n, p in model.named_parameters()}
    implementation = model.config._attn_implementation
    table = collect_signals(model, spec_of(model), DATA, gradient_samples=3)
    handle.remove()
    assert len(calls) == 3 + len(DATA)  # three samples one by one, the rest of the first batch, the other batches
    assert set(TWELVE) <= set(table.values)
    assert len(TWELVE) == 12
    assert {len(v) for v in table.values.values()} == {5}
    assert model.config._attn_implementation == implementation
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    again = collect_signals(model, spec_of(model), DATA, gradient_samples=3)
    assert again.values == table.values


def test_signals_match_plain_formulas():
    model = build("llama", 3)
    batch = {"input_ids": DATA[0]["input_ids"][:1]}
    table = collect_signals(model, spec_of(model), [batch], gradient_samples=1)
    model.set_attn_implementation("eager")
    found = model(**batch, output_hidden_states=True, output_attentions=True, labels=batch["input_ids"])
    found.loss.backward()
    a, b = found.hidden_states[1][0].detach(), found.hidden_states[0][0].detach()
    theta = [p for p in model.model.layers[0].parameters()]
    gradient = torch.cat([p.grad.flatten() for p in theta])
    flat = torch.cat([p.detach().flatten() for p in theta])
    maps = found.attentions[0][0]
    expected = {
        "inhibition": a.mean(),
        "intensity": a.norm(dim=1).mean(),
        "energy@update": (a - b).pow(2).sum(1).mean(),
        "gradient_magnitude": gradient.norm(),
        "gradient_fisher": gradient.pow(2).sum(),
        "gradient_taylor": (gradient * flat).sum().abs(),
        "weight_norm": flat.norm() / len(flat) ** 0.5,
        "attention_weight": maps.amax(-1).mean(),
        "attention_entropy": -(maps * maps.clamp(min=1e-30).log()).sum(-1).mean(),
        "block_influence": 1 - nn.functional.cosine_similarity(a, b).mean(),
        "angular_distance": nn.functional.cosine_similarity(a, b).acos().mean() / torch.pi,
    }
    got = {name: table.values[name][0] for name in expected}
    assert got == pytest.approx({k: float(v.detach()) for k, v in expected.items()}, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_signal(side):
    ids = DATA[0]["input_ids"]
    parts = [[ids, torch.zeros(8, 5, dtype=torch.int64)], [torch.ones(8, 16), torch.zeros(8, 5)]]
    names = ("input_ids", "attention_mask")
    padded = {
        name: torch.cat(pair if side == "right" else pair[::-1], 1).long()
        for name, pair in zip(names, parts, strict=True)
    }
    model = build("llama", 3)
    plain = collect_signals(model, spec_of(model), [{"input_ids": ids}], gradient_samples=2)
    other = collect_signals(model, spec_of(model), [padded], gradient_samples=2)
    same = [c for c in plain.values if "attention" not in c and c not in ("cka", "flow") and "task" not in c]
    for column in same:
        assert other.values[column] == pytest.approx(plain.values[column], rel=1e-4), column
    assert quality(model, [padded]).loss == pytest.approx(quality(model, [{"input_ids": ids}]).loss, rel=1e-5)


def test_samples_that_predict_nothing_are_refused():
    model = build("llama", 3)
    one = {"input_ids": torch.ones(2, 1, dtype=torch.int64)}
    with pytest.raises(ValueError, match="samples of one token"):
        quality(model, [one])
    with pytest.raises(ValueError, match="attention_mask is all 0"):
        collect_signals(model, spec_of(model), [DATA[0] | {"attention_mask": torch.zeros_like(DATA[0]["input_ids"])}])
    for labels, message in (
        (torch.full((8,), 7), "got the label 7, allowed are 0 to"),
        (torch.zeros(8, 2, dtype=torch.int64), r"labels of shape \(8, 2\)"),
        (torch.zeros(8), "dtype torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            quality(build("bert"), [DATA[0] | {"labels": labels}])


def test_less_is_collected_where_less_is_needed():
    model, batches = build("llama", 3), DATA[:1]
    whole = collect_signals(model, spec_of(model), batches, gradient_samples=2)
    forward = collect_signals(model, spec_of(model), batches, gradient_samples=0)
    weights = collect_signals(model, spec_of(model), [])
    assert set(weights.values) == {"weight_norm", "weight_entropy", "stable_rank"}
    assert set(whole.values) - set(forward.values) == {c for c in columns() if c.startswith("gradient")}
    assert "backward" not in forward.seconds
    for column in weights.values:
        assert weights.values[column] == whole.values[column]
    assert forward.values["energy"] == pytest.approx(whole.values["energy"], rel=1e-5)


def test_estimators_on_known_distributions():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1500, 1))
    for rho in (0.0, 0.6, 0.9):
        y = rho * x + (1 - rho**2) ** 0.5 * generator.normal(size=(1500, 1))
        assert estimators.information(x, y) == pytest.approx(-0.5 * np.log(1 - rho**2), abs=0.07)
    labels = generator.integers(0, 2, 1500)
    assert estimators.class_information(x + 20 * labels[:, None], labels) == pytest.approx(np.log(2), abs=0.03)
    assert estimators.class_information(x, labels) == pytest.approx(0, abs=0.05)
    points = torch.randn(60, 5)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    assert estimators.linear_cka(points, 3 * points @ turn) == pytest.approx(1.0, abs=1e-6)
    assert estimators.histogram_entropy(torch.zeros(100)) == pytest.approx(0.0, abs=1e-6)
    assert estimators.histogram_entropy(torch.linspace(0, 1, 6400)) == pytest.approx(np.log(64), abs=1e-3)
    assert estimators.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])), 0) == pytest.approx(1.5, rel=1e-4)
    assert estimators.stable_rank(torch.zeros(3, 4), 0) == 0.0


def rows(count: int = 60, seed: int = 0, **fields: Any) -> list[Transition]:
    """Removals whose cost is -0.3 a + 0.1 b."""
    generator = np.random.default_rng(seed)
    found = []
    for i in range(count):
        a, b = generator.normal(size=2)
        found.append(Transition("x", (), i, {"energy": a, "flow": b}, 0.9, 0.9 - 0.3 * a + 0.1 * b, **fields))
    return found


def features_and_changes(data: list[Transition]) -> tuple[np.ndarray, np.ndarray]:
    x = np.array([[t.features["energy"], t.features["flow"], 1.0, 1.0] for t in data])
    return x, np.array([t.after - t.before for t in data])


@pytest.mark.parametrize("kind", ["ridge", "forest"])
def test_the_stored_regressor_predicts_what_scikit_learn_predicts(kind, tmp_path):
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import Ridge

    data = rows()
    model = FusionModel.fit(data, kind, seed=3)
    model.save(tmp_path / "fused.json")
    loaded = FusionModel.load(tmp_path / "fused.json")
    x, y = features_and_changes(data)
    reference = Ridge(1.0) if kind == "ridge" else RandomForestRegressor(n_estimators=100, random_state=3)
    scale = np.median(np.abs(y))
    found = np.maximum(reference.fit(x, np.arcsinh(y / scale)).predict(x), np.arcsinh(y.min() / scale))
    assert loaded.predict(x) == pytest.approx(scale * np.sinh(found), abs=1e-12)
    assert json.loads((tmp_path / "fused.json").read_text())["format_version"] == 2
    (tmp_path / "fused.json").write_text('{"format_version": 1}')
    with pytest.raises(ValueError, match=r"no stored regressor \(format_version 1"):
        FusionModel.load(tmp_path / "fused.json")


def test_ruinous_removals_do_not_decide_the_order_of_the_others():
    from scipy.stats import spearmanr
    from sklearn.linear_model import Ridge

    data = rows()
    ruin = [replace(t, features={"energy": -1 - i / 10, "flow": 2.0}, after=-40.0) for i, t in enumerate(data[:3])]
    x, y = features_and_changes(data)
    assert spearmanr(FusionModel.fit(data + ruin, "ridge").predict(x), y).statistic > 0.5
    assert spearmanr(Ridge(1.0).fit(*features_and_changes(data + ruin)).predict(x), y).statistic < 0


def test_the_regressor_ranks_other_edits_too():
    """Half the rank costs a third of a drop here; a kind never seen is refused."""
    data = rows(200)
    cheaper = [
        Transition(
            t.data_set, (), t.block, t.features, t.before, t.before + (t.after - t.before) / 3 - 0.01, "rank", 0.5
        )
        for t in rows(200, seed=1)
    ]
    model = FusionModel.fit([*data, *cheaper], "forest")
    table = SignalTable({"energy": [1.0, 0.0, -1.0], "flow": [0.0, 1.0, -1.0]})
    drop, half = (model.score([BlockEdit(i, *e) for i in range(3)], table) for e in (("drop", 1.0), ("rank", 0.5)))
    assert drop[0] < half[0] < half[2] < drop[2]
    with pytest.raises(ValueError, match="kind 'merge', this regressor has seen drop, rank"):
        model.score([BlockEdit(0, "merge")], table)
    with pytest.raises(ValueError, match="signals without energy"):
        model.score([BlockEdit(0)], SignalTable({"flow": [0.0, 1.0]}))


def test_weights_spread_a_budget_and_never_call_a_block_free():
    """A regressor by hand: an edit costs the block's standardised energy, and a drop costs 1 more."""
    table = SignalTable({"energy": [4.0, 2.0, 1.0, 1.0]})
    fused = FusionModel("ridge", ["energy"], ["drop", "rank"], [-1e-6, -1e-6, 0.0, 0.0], scale=1e6)  # as good as linear
    z = table.standardised(["energy"])[:, 0]
    assert np.allclose(fused.score([BlockEdit(b, "rank", 0.5) for b in range(4)], table), -z)
    found = fused.weights(["drop", "rank", "merge"], 0.5, table)
    cost = np.maximum([z + 1, z], 0)
    assert np.allclose(found["drop"], np.clip(cost[0] / cost.mean(), 0.1, 10))
    assert np.allclose(found["rank"], np.clip(cost[1] / cost.mean(), 0.1, 10))
    assert np.allclose(found["merge"], (found["drop"] + found["rank"]) / 2)
    assert found["rank"].min() == pytest.approx(0.1)
    flat = FusionModel("ridge", ["energy"], ["drop"], [0.0, 0.0, 0.0])
    assert np.array_equal(flat.weights(["width"], 0.5, table)["width"], np.ones(4))


def test_modes_choose_what_the_regressor_may_see():
    def row(data_set: str, part: str) -> Transition:
        return Transition(data_set, (), 0, {"energy": 0.0}, 0.0, 0.0, part=part)

    data = [row("a", "fit"), row("a", "judge"), row("b", "fit")]
    assert training_rows(data, "in-set", "a") == data[:2]
    assert training_rows(data, "leave-one-out", "a") == data[2:]
    assert training_rows(data, "nested", "a") == data[:1]
    with pytest.raises(ValueError, match="no transitions for mode 'in-set' and set 'c'"):
        training_rows(data, "in-set", "c")


def test_baselines_and_prices():
    assert sorted(baseline("random", 7, 3)) == list(range(7))
    assert baseline("random", 7, 3) == baseline("random", 7, 3) != baseline("random", 7, 4)
    assert baseline("every-other", 5) == [1, 3, 0, 2, 4]
    assert baseline("top", 4) == [3, 2, 1, 0]
    assert (price("weight_norm", 30), price("energy", 30), price("gradient_fisher", 30)) == (0, 1, 3)
    assert price("skip_loss", 30) == 29


def test_rank_correlations_turn_all_signals_the_same_way():
    found = rank_correlations({"energy": [1.0, 2.0, 3.0], "flow": [3.0, 2.0, 1.0], "cka": [1.0, 1.0, 1.0]})
    assert found["energy"]["flow"] == pytest.approx(1.0)
    assert found["energy"]["cka"] == 0.0


def test_search_finds_planted_blocks_and_beam_is_no_worse_than_greedy():
    model = build("llama", 6)
    make_identity(model, 1)
    make_identity(model, 4)
    search = search_on(model)
    assert sorted(search.by_signal("block_influence", 2)) == [1, 4]
    assert search.quality([1, 4]).loss == pytest.approx(search.quality([]).loss, abs=1e-6)
    assert search.quality(search.exhaustive(2)).score >= search.quality([1, 4]).score
    data = search.transitions("x", 2, ["block_influence", "energy@update"], random_orders=2)
    assert len({(t.removed, t.block) for t in data}) == len(data) >= 4
    assert all(t.after == -search.quality([*t.removed, t.block]).loss for t in data)
    fused = FusionModel.fit(data, "ridge")

    def predicted(order: list[int]) -> float:
        parts = [
            fused.score([BlockEdit(search.left(order[:i]).index(b))], search.table(order[:i]))[0]
            for i, b in enumerate(order)
        ]
        return float(sum(parts))

    assert predicted(search.by_fusion(fused, 2, beam=5)) >= predicted(search.by_fusion(fused, 2)) - 1e-12


def test_entry_times_are_a_signal_that_comes_from_outside():
    model = build("llama")
    search = search_on(model, inputs={"entry_time": [5.0, 1.0, 9.0, 2.0, 3.0]})
    assert search.by_signal("entry_time", 3) == [2, 0, 4]
