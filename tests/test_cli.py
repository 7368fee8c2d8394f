"""The command line, in process on a tiny Llama folder: results, exit codes, and nothing written on refusal."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
import yaml
from command_line import PROTOCOL, as_json, compress, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinycomp.data import calibration_text

# ------------------------------------------------------------------------------------------------------------- results


def test_bare_command_prints_a_five_line_quick_start():
    result = run()
    assert result.exit_code == 0
    assert len(result.stdout.strip().splitlines()) == 5
    assert all(f"tinycomp {verb}" in result.stdout for verb in ("plan", "compress", "eval", "demo", "doctor"))


def test_compress_writes_a_folder_that_loads_as_the_compressed_model(folder, text, tmp_path):
    out = tmp_path / "out"
    result = compress(folder, out, text, "--method", "svd", "--ratio", 0.6, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["saved"]
    assert found["report"]["ratio_achieved"] == pytest.approx(0.6, abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "LowRankLinear"
    assert sum(p.numel() for p in model.parameters()) == found["report"]["parameters_after"]
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids == AutoTokenizer.from_pretrained(folder)("a b").input_ids
    assert os.listdir(tmp_path) == ["out"]  # neither journal nor temporary folders stay
    recipe = yaml.safe_load((out / "tinycomp_recipe.yaml").read_text())
    assert recipe["method_names"] == ["SVD"]
    assert recipe["methods"][0]["ratio"] == 0.6
    assert recipe["calibration"]["data"] == str(text)


def test_inspect_lists_every_changed_module_with_its_sizes(folder, text, tmp_path):
    compress(folder, tmp_path / "out", text, "--method", "svd", "--ratio", 0.6, "--targets", r"re:.*\.mlp\..*")
    found = as_json("inspect", tmp_path / "out")
    assert {m["path"].rsplit(".", 2)[1] for m in found["modules"]} == {"mlp"}
    assert len(found["modules"]) == 6
    for module in found["modules"]:
        assert module["layer"] == "LowRankLinear"
        assert 0 < module["numbers"] < module["size_before"]
        assert module["bytes"] == 4 * module["numbers"]
    assert not found["plain"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert found["bytes_weights"] == sum(t.nbytes for t in tensors.values())
    assert "LowRankLinear" in run("inspect", tmp_path / "out").stdout


def test_inspect_of_an_untouched_model_says_so(folder):
    found = as_json("inspect", folder)
    assert found["plain"]
    assert found["modules"] == []
    assert found["model_type"] == "llama"


def test_several_methods_in_one_call_and_settings_for_one_of_them(folder, text, tmp_path):
    result = compress(
        folder, tmp_path / "out", text, "--method", "widthprune,svd", "--ratio", 0.8, "--set", "svd.weighting=inputs",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    methods = json.loads(result.stdout)["report"]["methods"]
    assert [m["method"] for m in methods] == ["WidthPrune", "SVD"]
    assert methods[1]["config"]["weighting"] == "inputs"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_underscores_and_dashes_are_the_same(folder, text, tmp_path):
    result = run(
        "compress", folder, "--output_dir", tmp_path / "out", "--data", text, "--method", "magnitude", "--ratio", 0.7,
        "--num_calibration_samples", 4, "--max_seq_length", 32,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").exists()


def test_eval_measures_the_named_protocol(folder):
    found = as_json("eval", folder, "--protocol", PROTOCOL)
    assert found["protocol"] == PROTOCOL
    assert found["tokens"] == 128
    assert 1 < found["perplexity"] < 1e6
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes_disk"] == (folder / "model.safetensors").stat().st_size
    assert run("eval", folder, "--protocol", PROTOCOL).stdout.count("perplexity") == 1


def test_eval_times_prefill_and_decode_on_request(folder):
    found = as_json("eval", folder, "--protocol", PROTOCOL, "--speed")
    assert found["prefill_tokens_s"] > 0
    assert found["decode_tokens_s"] > 0


def test_doctor_names_versions_and_the_backend_of_every_op():
    found = as_json("doctor")
    assert found["packages"]["torch"]
    assert found["plugin"] == "registered with transformers"
    assert isinstance(found["native"]["loaded"], bool)
    ops = {row["op"] for row in found["ops"]}
    assert {"lowrank_linear", "cur_linear", "swsc_linear"} <= ops
    for op in ops:
        rows = [row for row in found["ops"] if row["op"] == op]
        assert any(row["active"] for row in rows), op
        assert all(row["available"] or row["reason"] for row in rows), op
    printed = run("doctor")
    assert printed.exit_code == 0
    assert "lowrank_linear" in printed.stdout


def test_bench_names_its_parts():
    result = run("bench", "nothing")
    assert result.exit_code == 2
    assert "got 'nothing', allowed ops, model" in result.stderr


def test_missing_native_library_is_reported_with_what_to_do(monkeypatch):
    from tinycomp.doctor import native_library

    monkeypatch.setitem(sys.modules, "tinycomp._C", None)
    found = native_library()
    assert not found["loaded"]
    assert "--no-build-isolation" in found["reason"]


# ---------------------------------------------------------------------------------------------------------------- plan


def test_plan_from_a_config_alone_predicts_what_compress_gives(folder, text, tmp_path):
    arguments = ("--method", "svd", "--set", "rank=8", "--set", "allocation=uniform")
    (tmp_path / "config").mkdir()
    config = tmp_path / "config" / "config.json"
    config.write_text((folder / "config.json").read_text())
    planned = as_json("plan", config, *arguments)
    assert planned == as_json("plan", folder, *arguments)
    assert compress(folder, tmp_path / "out", text, *arguments).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert planned["parameters_after"] == sum(p.numel() for p in model.parameters())
    rows = {row["path"]: row for row in planned["modules"]}
    assert set(rows) == {m["path"] for m in as_json("inspect", tmp_path / "out")["modules"]}
    row = rows["model.layers.0.mlp.up_proj"]
    assert row["shape"] == [128, 64]
    assert row["size_after"] == 8 * (128 + 64 - 8)
    assert "break-even" in run("plan", folder, *arguments).stdout


# ---------------------------------------------------------------------------------------------------------------- demo


def test_demo_measures_saves_reloads_and_reports(folder, tmp_path, monkeypatch):
    from tinycomp import demo

    small = demo.Demo(
        methods=("svd", "magnitude"), ratios=(0.7, 1e-6), tokens=512, num_calibration_samples=2, max_seq_length=32,
        repeats=1,
    )  # fmt: skip
    monkeypatch.setattr("tinycomp.data.inputs.calibration_text", lambda: [calibration_text()[0][:4000]])
    results = demo.run_demo(folder, tmp_path / "out", small, quiet=True)
    names = [row["name"] for row in results["rows"]]
    assert names == ["dense", "int8", "svd 0.7", "magnitude 0.7"]
    refused = [note for note in results["notes"] if ": refused: " in note]
    assert [note.split(":")[0] for note in refused] == ["svd 1e-06", "magnitude 1e-06"]
    for row in results["rows"]:
        assert row["decode_tokens_s"] > 0
        assert row["perplexity"] > 1
        assert row["bytes_disk"] > row["bytes_memory"]
    assert results["reload"]["name"] == "svd 0.7"
    assert results["reload"]["equal"]
    assert results["reload"]["text"]
    assert results["protocol"]["name"].endswith("/first-512")
    for name in ("report.md", "report.html", "results.json", "model/config.json", "model/tinycomp_recipe.yaml"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert torch.isfinite(torch.tensor(results["rows"][2]["perplexity"]))
