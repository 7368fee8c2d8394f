"""Layer pruning as a method: plain results, every strategy, stored regressors, composition, recovery, mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import FAMILIES, output
from safetensors import safe_open
from test_fusion import DATA, DEPTH, LABELLED, build, search_on
from torch import nn

import tinycomp as tc
from tinycomp.io import Journal
from tinycomp.models import spec_of
from tinycomp.signals import TWELVE, FusionModel, Transition, drops, quality


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("strategy", ["block_influence", "every-other"])
def test_the_result_is_a_plain_model_with_every_config_field_in_step(family, strategy, tmp_path):
    model = build(family)
    data = LABELLED if family == "bert" else DATA
    plan = tc.plan(model, tc.StrategicFusion(drop=2, strategy=strategy), progress=False)
    report = tc.compress_(model, tc.StrategicFusion(drop=2, strategy=strategy), data, progress=False)
    assert report.ratio_achieved == pytest.approx(0.6)
    blocks = spec_of(model).blocks
    assert len(blocks) == 3 == getattr(model.config, DEPTH.get(family, "num_hidden_layers"))
    indices = [m.layer_idx for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    assert set(indices) <= {0, 1, 2}
    if getattr(model.config, "layer_types", None):
        assert len(model.config.layer_types) == 3
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (not a mapping)
    assert stored == plan["bytes_after"]
    again = getattr(transformers, FAMILIES[family].auto).from_pretrained(tmp_path)
    assert torch.equal(output(again, family), output(model, family))
    if family == "llama":
        assert model.generate(DATA[0]["input_ids"], max_new_tokens=2).shape == (8, 18)


CONFIGS: dict[str, Any] = {
    "forest": {"strategy": "fusion", "regressor": "forest"},
    "ridge-beam": {"strategy": "fusion", "regressor": "ridge", "search": "beam"},
    "paper": {"preset": "paper", "gradient_samples": 2, "random_orders": 1},
    "skip-loss": {"strategy": "skip_loss"},
    "exhaustive": {"search": "exhaustive"},
    "random": {"strategy": "random", "seed": 4},
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_strategies_on_decoder_and_classifier(name, family):
    model = build(family, 4)
    data = LABELLED if family == "bert" else DATA
    fields = {"gradient_samples": 2, **CONFIGS[name]}
    report = tc.compress_(model, tc.StrategicFusion(ratio=0.5, **fields), data, progress=False)
    details = report.methods[0]
    assert len(spec_of(model).blocks) == 2
    assert len(details["order"]) == len(set(details["order"])) == 2
    paths = {r["path"] for r in report.records} | {s["path"] for s in report.skipped}
    assert {p for p, m in build(family, 4).named_modules() if isinstance(m, nn.Linear)} <= paths
    json.dumps(report.to_dict())
    if name in ("forest", "ridge-beam", "paper"):
        assert [c["block"] for c in details["changes"]] == details["order"]
        total = sum(c["measured"] for c in details["changes"])
        assert details["loss_before"] - total == pytest.approx(details["loss_after_each_removal"][-1])
        assert set(TWELVE) - {"task_relevance"} <= set(details["rank_correlations"])


def test_a_stored_regressor_serves_another_model(tmp_path: Path):
    search = search_on(build("llama"))
    FusionModel.fit(search.transitions("x", 2, ["energy@update", "flow"]), "forest").save(tmp_path / "fused.json")
    model = FAMILIES["gpt2"].build(n_layer=6)
    config = tc.StrategicFusion(drop=2, fusion=str(tmp_path / "fused.json"), gradient_samples=2)
    report = tc.compress_(model, config, DATA, progress=False)
    assert len(report.methods[0]["order"]) == 2
    assert "transitions" not in report.methods[0]


RIDGE = {"kind": "ridge", "columns": ["energy"], "edits": ["drop"], "coefficients": [1.0, 0.0, 0.0]}
LEAF = {"feature": [-1], "threshold": [-2.0], "left": [-1], "right": [-1], "value": [0.5]}
SPLIT = {
    "feature": [0, -1, -1], "threshold": [0.0] * 3, "left": [1, -1, -1], "right": [2, -1, -1], "value": [0.0, -1.0, 1.0]
}  # fmt: skip
FOREST = RIDGE | {"kind": "forest", "coefficients": [], "trees": [SPLIT, LEAF]}
BROKEN = {
    "kind": RIDGE | {"kind": "svm"},
    "coefficients": RIDGE | {"coefficients": [1.0]},
    "number": RIDGE | {"coefficients": [float("nan"), 0.0, 0.0]},
    "scale": RIDGE | {"scale": 0.0},
    "signal": RIDGE | {"columns": ["nonsense"]},
    "no tree": FOREST | {"trees": []},
    "no edits": FOREST | {"edits": []},
    "field": FOREST | {"trees": [{k: v for k, v in SPLIT.items() if k != "left"}]},
    "endless": FOREST | {"trees": [SPLIT | {"left": [0, -1, -1]}]},
    "node": FOREST | {"trees": [SPLIT | {"right": [3, -1, -1]}]},
    "feature": FOREST | {"trees": [SPLIT | {"feature": [3, -1, -1]}]},
    "lists": FOREST | {"trees": [SPLIT | {"value": [0.0]}]},
    "text": FOREST | {"trees": [SPLIT | {"feature": ["a", "b", "c"]}]},
    "leaf": FOREST | {"trees": [LEAF | {"value": [float("inf")]}]},
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_regressor_is_refused(name, tmp_path):
    file = tmp_path / "fused.json"
    for good in (RIDGE, FOREST):
        file.write_text(json.dumps(good | {"format_version": 2}))
        FusionModel.load(file)
    assert FusionModel.load(file).predict(np.array([[1.0, 1.0, 1.0]])) == pytest.approx(np.sinh(0.75))
    file.write_text(json.dumps(BROKEN[name] | {"format_version": 2}))
    with pytest.raises(ValueError, match="is no stored regressor"):
        FusionModel.load(file)


def test_auto_spreads_its_budget_by_a_stored_regressor(tmp_path: Path):
    """Fitted on measured losses of rank: the block that the regressor calls dear keeps more than without it."""
    model = build("llama")
    search, spec, rows = search_on(model), spec_of(model), []
    z = search.table(()).standardised(["weight_norm"])
    for index, block in enumerate(spec.blocks):
        shorter, _ = tc.compress(model, tc.SVD(ratio=0.5, targets=block.linears), DATA, progress=False)
        after = quality(shorter, DATA).score - 5.0 * z[index, 0]
        rows.append(Transition("x", (), index, {"weight_norm": z[index, 0]}, 0.0, after, "rank", 0.5))
    FusionModel.fit(rows, "ridge").save(tmp_path / "fused.json")
    kept = {}
    for fusion in (None, str(tmp_path / "fused.json")):
        shorter = build("llama")
        config = tc.Auto(ratio=0.6, families=("svd",), guard_speed=False, fusion=fusion)
        report = tc.compress_(shorter, config, DATA, progress=False)
        assert report.ratio_achieved <= 0.6 + 1e-3
        kept[fusion] = [sum(p.numel() for p in shorter.get_submodule(b.path).parameters()) for b in spec.blocks]
    dear, cheap = int(z[:, 0].argmax()), int(z[:, 0].argmin())
    with_it, without = (np.array(kept[f]) for f in (str(tmp_path / "fused.json"), None))
    assert with_it[dear] > without[dear]
    assert with_it[cheap] < without[cheap]


def test_dropping_composes_with_other_methods(tmp_path):
    model = build("llama")
    configs = [tc.StrategicFusion(drop=2, strategy="top"), tc.SVD(ratio=0.7)]
    tc.compress_(model, configs, DATA, progress=False)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(again, "llama"), output(model, "llama"))
    assert len(again.model.layers) == 3


def test_recovery_heals_a_shortened_model_towards_the_block_that_is_gone():
    teacher, student = build("llama"), build("llama")
    data = [{"input_ids": torch.randint(3, 60, (8, 16))} for _ in range(12)]
    tc.compress_(student, tc.StrategicFusion(drop=1, strategy="block_influence"), data[:4], progress=False)
    config = tc.Distill(steps=0, kl=0.0, hidden=1.0, heal_samples=80)
    report = tc.recover_(student, teacher, data, config, progress=False)
    assert report.loss_healed < report.loss_before
    assert any(r["error_left"] < 0.95 for r in report.healed)


@pytest.mark.parametrize("fields", [{}, *({"strategy": s} for s in ("top", "skip_loss", "flow", "weight_norm"))])
def test_blocks_in_ignore_stay(fields):
    model = build("llama")
    config = tc.StrategicFusion(drop=2, ignore=(r"re:model\.layers\.[34]\..*", "model.layers.1.mlp.up_proj"), **fields)
    plan = tc.plan(model, config, progress=False)
    kept = [model.get_submodule(f"model.layers.{i}") for i in (1, 3, 4)]
    report = tc.compress_(model, config, DATA, progress=False)
    assert list(model.model.layers) == kept
    assert report.methods[0]["order"] in ([2, 0], [0, 2])
    assert plan["parameters_after"] == report.parameters_after
    assert {r["path"] for r in report.records}.isdisjoint(s["path"] for s in report.skipped)
    for search in ("exhaustive", "beam"):
        model = build("llama", 3)
        config = tc.StrategicFusion(drop=1, ignore=("re:.*layers.[02].*",), search=search, gradient_samples=2)
        assert tc.compress_(model, config, DATA, progress=False).methods[0]["order"] == [1]
    with pytest.raises(ValueError, match="3 blocks to remove of 5, of which 3 are in ignore, allowed are at most 2"):
        tc.compress_(build("llama"), tc.StrategicFusion(drop=3, ignore=("re:.*layers.[134].*",)), DATA, progress=False)


def test_nothing_to_remove_is_no_error():
    model = build("llama")
    report = tc.compress_(model, tc.StrategicFusion(ratio=1.0), DATA, progress=False)
    assert report.ratio_achieved == 1.0
    assert report.methods[0]["order"] == []
    assert len(model.model.layers) == 5


def test_a_resumed_run_reports_what_the_choice_was_based_on(tmp_path):
    model, reports = build("llama"), []
    for _ in range(2):
        journal = Journal(tmp_path, "job")
        config = [tc.StrategicFusion(drop=1, gradient_samples=2), tc.SVD(ratio=0.5)]
        reports.append(tc.compress_(copy.deepcopy(model), config, DATA, journal=journal, progress=False))
    assert reports[1].methods == json.loads(json.dumps(reports[0].methods))
    assert "rank_correlations" in reports[1].methods[0]


@pytest.mark.parametrize("fields", [{"strategy": "skip_loss"}, {"search": "exhaustive"}, {"strategy": "flow"}, {}])
def test_every_search_shows_progress(fields, monkeypatch):
    seen: dict[str, list[tuple[int, int]]] = {}
    monkeypatch.setattr("tinycomp.progress.Bars.update", lambda _, name, *at: seen.setdefault(name, []).append(at[:2]))
    tc.compress_(build("llama"), tc.StrategicFusion(drop=1, gradient_samples=2, **fields), DATA, progress=False)
    name = {"skip_loss": "leaving out one more block", "flow": "collecting signals"}.get(
        fields.get("strategy", ""), "measuring every set" if fields else "measuring removals"
    )
    assert seen[name][-1][0] == seen[name][-1][1] == len(seen[name]) > 1


def test_plan_prices_the_signals_apart():
    notes = tc.plan(build("llama"), tc.StrategicFusion(drop=2), progress=False)["notes"]
    assert any("3 passes (one forward, one backward) over 16 samples" in n for n in notes)
    assert "skip_loss: 4 passes over all samples, once" in notes
    paper = tc.plan(build("llama"), tc.StrategicFusion(drop=2, preset="paper"), progress=False)["notes"]
    assert "skip_loss: not among them" in paper
    notes = tc.plan(build("llama").config, tc.StrategicFusion(drop=2, search="exhaustive"), progress=False)["notes"]
    assert notes == ["exhaustive search: 10 passes over the judging samples"]
    for strategy, expected in (
        ("flow", "flow: 1 passes over the samples, once"),
        ("weight_norm", "weight_norm: 0 passes over the samples, once"),
        ("gradient_fisher", "gradient_fisher: 3 passes over at most 16 samples, once"),
    ):
        assert tc.plan(build("llama"), tc.StrategicFusion(drop=2, strategy=strategy), progress=False)["notes"] == [
            expected
        ]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"'nonsense', allowed: inhibition, .*, fusion, random"):
        tc.StrategicFusion(drop=1, strategy="nonsense")
    with pytest.raises(ValueError, match="search='beam' with strategy='random'"):
        tc.StrategicFusion(drop=1, strategy="random", search="beam")
    with pytest.raises(ValueError, match=r"drop=1 and ratio=0.5, allowed is one"):
        tc.StrategicFusion(drop=1, ratio=0.5)
    with pytest.raises(ValueError, match="without entry_times"):
        tc.StrategicFusion(drop=1, strategy="entry_time")
    for times in ((1.0, 2.0), (1.0,) * 6, (1.0, 2.0, 3.0, 4.0, float("nan"))):
        with pytest.raises(ValueError, match="one number for each of the 5 blocks"):
            tc.compress_(build("llama"), tc.StrategicFusion(drop=1, entry_times=times), DATA, progress=False)
    with pytest.raises(ValueError, match="neither drop nor ratio"):
        tc.compress_(build("llama"), tc.StrategicFusion(), DATA, progress=False)
    with pytest.raises(ValueError, match="5 blocks to remove of 5"):
        tc.compress_(build("llama"), tc.StrategicFusion(drop=5), DATA, progress=False)
    with pytest.raises(ValueError, match="data without labels"):
        tc.compress_(build("bert"), tc.StrategicFusion(drop=1), DATA, progress=False)
    with pytest.raises(ValueError, match="causal language models and classifiers"):
        tc.compress_(FAMILIES["distilbert"].build(), tc.StrategicFusion(drop=1), DATA, progress=False)
    with pytest.raises(ValueError, match="one list of two or more blocks"):
        tc.compress_(FAMILIES["t5"].build(), tc.StrategicFusion(drop=1), [FAMILIES["t5"].batch()], progress=False)
    config = build("qwen3").config
    edits = drops(config, spec_of(build("qwen3")), [1, 3])
    assert [e.path for e in edits] == ["model.layers.3", "model.layers.1"]
    assert edits[-1].config["num_hidden_layers"] == 3
