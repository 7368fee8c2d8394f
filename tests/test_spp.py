"""SPP as a method: sizes, paths that serve every ratio, the signal, the report, the benchmark."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, WIDTH, output

import tinycomp as tc
from tinycomp.eval.report import write_report
from tinycomp.methods import spp
from tinycomp.models import UnitPath, spec_of, unit_groups
from tinycomp.signals import block_entry_times
from tinycomp.train.path_search import PathSearch, search_path

QUICK = {"steps": 6, "samples": 2, "length": 9}


def data(family, count=4):
    return [FAMILIES[family].batch(seed) for seed in range(count)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_compress_reaches_the_ratio_and_saves(family, tmp_path):
    model = FAMILIES[family].build()
    report = tc.compress_(model, tc.SPP(ratio=0.6, **QUICK), data(family), progress=False)
    assert report.ratio_achieved == pytest.approx(0.6, abs=0.07)
    assert report.parameters_after < report.parameters_before
    (method,) = report.methods
    assert len(method["curve"]) == QUICK["steps"]
    assert {g["group"] for g in method["groups"]} == {g.name for g in unit_groups(FAMILIES[family].build())}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again, family), output(model, family))


def test_one_path_serves_every_ratio_and_plan_predicts_the_bytes(tmp_path):
    file = str(tmp_path / "path.safetensors")
    config = {"path": file, "round_to": 4, **QUICK}
    model = FAMILIES["llama"].build()
    before = tc.plan(model.config, tc.SPP(ratio=0.5, **config), progress=False)
    assert any("2 x 9 tokens" in note and "GB of memory" in note for note in before["notes"])
    tc.compress(model, tc.SPP(ratio=0.8, **config), data("llama"), progress=False)
    path, groups = UnitPath.load(file), unit_groups(model)
    sizes = []
    for ratio in (0.8, 0.5, 0.25):
        plan = tc.plan(model, tc.SPP(ratio=ratio, **config), progress=False)
        smaller, report = tc.compress(model, tc.SPP(ratio=ratio, **config), data("llama"), progress=False)
        assert report.methods[0]["search_seconds"] < 1
        assert plan["parameters_after"] == report.parameters_after
        smaller.save_pretrained(tmp_path / str(ratio))
        assert plan["ratio_achieved"] == pytest.approx(report.ratio_achieved)
        stored = (tmp_path / str(ratio) / "model.safetensors").stat().st_size
        assert 0 <= stored - plan["bytes_after"] < 12000  # the rest is the file's header
        sizes.append(report.parameters_after)
    assert sizes == sorted(sizes, reverse=True)
    large, small = (path.kept(groups, ratio, 4) for ratio in (0.8, 0.5))
    assert all(set(small[name].tolist()) <= set(large[name].tolist()) for name in small)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_without_a_search_units_go_by_predicted_loss(family, tmp_path):
    model = FAMILIES[family].build()
    file = tmp_path / "path.safetensors"
    config = tc.SPP(ratio=0.6, steps=0, path=str(file))
    notes = tc.plan(model.config, config, progress=False)["notes"]
    assert any("no search" in n for n in notes)
    report = tc.compress_(model, config, data(family), progress=False)
    assert report.ratio_achieved == pytest.approx(0.6, abs=0.07)
    assert report.methods[0]["curve"] == []
    path = UnitPath.load(str(file))
    assert all(bool((entry == -1).all()) for entry in path.entry.values())


def test_costs_decide_between_kinds_of_units():
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    path = UnitPath.from_scores({g.name: torch.linspace(1, 2, g.count) for g in groups})
    dear_values, dear_neurons = {"ffn": 1.0, "qk": 1.0, "v": 50.0}, {"ffn": 50.0, "qk": 1.0, "v": 1.0}
    neurons = []
    for cost in (dear_neurons, "unit", dear_values):
        kept = spp.kept_units(tc.SPP(ratio=0.5, cost=cost), path, groups)
        neurons.append(sum(len(kept[g.name]) for g in groups if g.kind == "ffn"))
    assert neurons[0] < neurons[1] < neurons[2]
    with pytest.raises(ValueError, match="one for every kind of unit; add v"):
        spp.kept_units(tc.SPP(ratio=0.5, cost={"ffn": 1.0, "qk": 1.0}), path, groups)


def test_refit_helps_and_paper_preset_is_the_released_form():
    model = FAMILIES["llama"].build()
    dense = output(model, "llama", seed=9)
    errors = {}
    for refit in (True, False):
        config = tc.SPP(ratio=0.5, attention=False, refit=refit, allocation="uniform", **QUICK)
        smaller, report = tc.compress(model, config, data("llama", 16), progress=False)
        assert smaller.config.intermediate_size == WIDTH // 2
        assert getattr(smaller.config, "quantization_config", None) is None
        errors[refit] = float((output(smaller, "llama", seed=9) - dense).norm())
    assert errors[True] < errors[False]
    assert any(s["path"].endswith("q_proj") and "not asked to" in s["reason"] for s in report.skipped)
    paper = tc.SPP(preset="paper", ratio=0.5)
    assert (paper.coupled, paper.per_head, paper.refit, paper.round_to, paper.threshold) == (
        False,
        False,
        False,
        1,
        3.0,
    )
    assert tc.SPP(preset="paper", ratio=0.5, lr=0.1).lr == 0.1


def test_entry_times_are_a_signal_of_blocks(tmp_path):
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    path = UnitPath.from_scores({g.name: torch.ones(g.count) for g in groups})
    for group in groups:
        path.entry[group.name].fill_({"0": 4, "1": 9, "2": 6}[group.block[-1]])
    path.save(tmp_path / "path.safetensors")
    blocks = [b.path for b in spec_of(model).blocks]
    assert block_entry_times(path, groups, blocks) == [4.0, 9.0, 6.0]
    path.entry["model.layers.1.ffn"].fill_(-1)
    assert block_entry_times(path, groups, blocks)[1] == pytest.approx(9.0)  # never, at the largest tie: the last step
    path.tie["model.layers.1.ffn"].fill_(0.5)
    assert 9.0 < block_entry_times(path, groups, blocks)[1] < 9.5
    config = tc.StrategicFusion(drop=1, strategy="entry_time", path=str(tmp_path / "path.safetensors"))
    report = tc.compress_(model, config, data("llama"), progress=False)
    assert report.methods[0]["order"] == [1]
    with pytest.raises(ValueError, match="ranks no unit of elsewhere"):
        block_entry_times(path, groups, ["elsewhere"])


@pytest.mark.parametrize("steps", [6, 0])
def test_the_report_plots_the_path(steps, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the plots")
    config = tc.SPP(ratio=0.6, **(QUICK | {"steps": steps}))
    _, report = tc.compress(FAMILIES["llama"].build(), config, data("llama"), progress=False)
    rows = [{"name": "dense", "method": "dense"}, {"name": "SPP", "method": "SPP", "ratio": 0.6}]
    write_report(tmp_path, {"title": "t", "rows": rows, "compressions": [report.to_dict()]})
    picture = (tmp_path / "report-path.svg").read_text()
    assert all(words in picture for words in ("queries and keys", "kept share", "half of its units"))
    assert ("loss of the masked model" in picture) == bool(steps)
    assert "report-path.svg" in (tmp_path / "report.md").read_text()


def test_the_report_says_where_a_sublayer_comes_in_the_order(tmp_path):
    model = FAMILIES["llama"].build()
    groups, file = unit_groups(model), tmp_path / "path.safetensors"
    scores = {g.name: torch.full((g.count,), float(len(groups) - i)) for i, g in enumerate(groups)}
    UnitPath.from_scores(scores).save(file)
    config = tc.SPP(ratio=0.6, path=str(file), cost="unit", refit=False)
    _, report = tc.compress(model, config, data("llama"), progress=False)
    half = [g["half_at"] for g in report.methods[0]["groups"]]
    assert half == sorted(half)
    assert 0 < half[0] < half[-1] < 1


def test_costs_may_be_measured():
    model = FAMILIES["llama"].build()
    costs = tc.unit_costs(model)
    assert costs.keys() == {"ffn", "qk", "v"}
    assert all(cost > 0 for cost in costs.values())
    report = tc.compress_(model, tc.SPP(ratio=0.6, cost=costs, steps=0), data("llama"), progress=False)
    assert report.ratio_achieved == pytest.approx(0.6, abs=0.07)


def test_the_benchmark_keeps_what_is_finished(folder, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("bench_spp", Path(__file__).parent.parent / "bench" / "spp.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    output = tmp_path / "rows.jsonl"
    words = ["--model", str(folder), "--tokens", "512", "--windows", "4", "--ratios", "0.5", "--output", str(output)]
    words += ["--search", '{"steps": 10, "samples": 1, "length": 32}', "--work", str(tmp_path / "work")]
    only = ["--only", "SPP coupled", "first-order Taylor", "random", "WidthPrune"]
    assert bench.main([*words, *only, "--seconds", "0.001"]) == bench.AGAIN
    assert bench.main([*words, *only]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["dense", *only[1:]]
    assert all(row["achieved"] == pytest.approx(0.5, abs=0.1) for row in rows[1:])
    assert bench.main([*words, *only]) == 0
    assert len(output.read_text().splitlines()) == len(rows)
    capsys.readouterr()
    assert bench.main([*words, "--report"]) == 0
    assert "| WidthPrune | " in capsys.readouterr().out
    assert (tmp_path / "rows.svg").exists()


def test_plan_says_that_masks_bring_no_speed():
    model = FAMILIES["llama"].build()
    for pattern in ("row", "2:4"):
        config = tc.RIA(ratio=0.5, structured=False, pattern=pattern, guard_speed=False)
        for source in (model.config, model):
            notes = tc.plan(source, config, data("llama"), progress=False)["notes"]
            assert any("no speed-up over dense" in note for note in notes)
    assert not any("speed-up" in n for n in tc.plan(model.config, tc.RIA(ratio=0.5), progress=False)["notes"])


def test_messages():
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="SPP: got no ratio"):
        tc.compress_(model, tc.SPP(), data("llama"), progress=False)
    with pytest.raises(ValueError, match="got loss='labels' and batches without labels"):
        search_path(
            FAMILIES["vit"].build(), unit_groups(FAMILIES["vit"].build()), data("vit"), PathSearch(loss="labels")
        )
    with pytest.raises(ValueError, match="got no sublayer to prune"):
        tc.compress_(
            model, tc.SPP(ratio=0.5, ignore=("re:.*(q_proj|o_proj|down_proj)",)), data("llama"), progress=False
        )
