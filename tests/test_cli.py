"""The command line, in process on a tiny Llama folder: results, exit codes, and nothing written on refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_folder import write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import tinycomp
from tinycomp import cli, job
from tinycomp.data import calibration_text

PROTOCOL = "ppl/sotu-2013-2014/64/64/token/first-128"
SMALL = ["--num-calibration-samples", "4", "--max-seq-length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "speech.txt"
    path.write_text(calibration_text()[0][:4000])
    return path


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def as_json(*arguments: object) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def compress(folder: Path, out: Path, text: Path, *more: object):
    return run("compress", folder, "--output-dir", out, "--data", text, *SMALL, *more)


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


# ---------------------------------------------------------------------------------------------------------- exit codes

USAGE = [
    (["--method", "qr"], "got 'qr', allowed: auto, cur, magnitude"),
    (["--method", ","], "got none, allowed: auto, cur"),
    (["--method", "svd", "--ratio", "1.5"], "ratio: got 1.5, Input should be less than or equal to 1"),
    (["--method", "svd", "--ratio", "0"], "ratio: got 0.0, Input should be greater than 0"),
    (["--method", "svd", "--set", "colour=red"], "colour: got 'red'"),
    (["--method", "svd", "--set", "rank"], "allowed: FIELD=VALUE"),
    (["--method", "svd", "--set", "cur.rank=3"], "names the method 'cur'"),
    (["--method", "svd", "--preset", "novel"], "preset: got 'novel'"),
    (["--method", "svd", "--ratio", "0.5", "--targets", "no.such.layer"], "match no linear"),
    (["--method", "svd", "--ratio", "0.5", "--targets", "re:("], "no regular expression"),
    (["--method", "svd", "--ratio", "0.5", "--protocol", "ppl/sotu"], "allowed: ppl/TEXT/CONTEXT/STRIDE/token"),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE, ids=[" ".join(a) for a, _ in USAGE])
def test_wrong_commands_exit_with_2_and_write_nothing(arguments, message, folder, text, tmp_path):
    result = compress(folder, tmp_path / "out", text, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert os.listdir(tmp_path) == []


def test_unknown_verbs_and_options_exit_with_2(folder):
    assert run("compres", folder).exit_code == 2
    assert run("eval", folder, "--protocoll", "x").exit_code == 2
    assert run("compress", folder).exit_code == 2  # no output folder


def test_error_is_one_json_object_with_json(folder, text, tmp_path):
    result = compress(folder, tmp_path / "out", text, "--method", "qr", "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["exit_code"] == 2
    assert found["kind"] == "UsageError"
    assert "'qr'" in found["error"]


def refused(result, message: str, directory: Path, left: list[str] | None = None) -> None:
    assert result.exit_code == 3, result.output
    assert message in result.stderr
    assert sorted(os.listdir(directory)) == sorted(left or [])


def test_model_that_does_not_exist_is_refused(text, tmp_path):
    refused(compress(tmp_path / "nowhere", tmp_path / "out", text, "--method", "svd"), "does not exist", tmp_path)


def test_full_output_folder_is_refused_before_any_work(folder, text, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    monkeypatch.setattr(job, "load_model", lambda *_: pytest.fail("the model was loaded"))
    result = compress(folder, tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    refused(result, "is not empty", tmp_path, ["out"])
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_unwritable_output_folder_is_refused(folder, text, tmp_path):
    refused(compress(folder, "/proc/out", text, "--method", "svd", "--ratio", 0.5), "cannot write in /proc", tmp_path)


def test_nan_weights_are_refused_by_name(text, tmp_path):
    source = write_folder(tmp_path / "nan")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = compress(source, tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    refused(result, "model.layers.1.mlp.up_proj.weight: got NaN", tmp_path, ["nan"])


def test_empty_and_missing_calibration_text_are_refused(folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    result = compress(folder, tmp_path / "out", empty, "--method", "svd", "--ratio", 0.5)
    refused(result, "empty", tmp_path, ["empty.txt"])
    result = compress(folder, tmp_path / "out", tmp_path / "no.txt", "--method", "svd", "--ratio", 0.5)
    refused(result, "there is no file", tmp_path, ["empty.txt"])


def test_rank_larger_than_the_matrix_is_refused(folder, text, tmp_path):
    result = compress(folder, tmp_path / "out", text, "--method", "svd", "--set", "rank=4000")
    assert result.exit_code in (2, 3)
    assert "4000" in result.stderr
    assert os.listdir(tmp_path) == []


def test_missing_package_is_refused_with_the_command_that_installs_it(text, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = compress(tmp_path / "model.gguf", tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    refused(result, "pip install 'tinycomp[gguf]'", tmp_path, ["model.gguf"])


def test_failed_quality_gate_exits_with_4_and_saves_nothing(folder, text, tmp_path):
    arguments = ("--method", "svd", "--ratio", 0.5, "--protocol", PROTOCOL)
    result = compress(folder, tmp_path / "out", text, *arguments, "--max-perplexity", 1.5)
    assert result.exit_code == 4, result.output
    assert "is above 1.5; not saved" in result.stderr
    assert os.listdir(tmp_path) == []
    result = compress(folder, tmp_path / "out", text, *arguments, "--max-perplexity", 1e9)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "tinycomp_report.json").read_text())
    assert report["evaluations"][0]["protocol"] == PROTOCOL
    assert run("eval", folder, "--protocol", PROTOCOL, "--max-perplexity", 1.5).exit_code == 4


# -------------------------------------------------------------------------------------------------------------- resume


def test_killed_compression_resumes_to_the_same_bytes(text, tmp_path):
    """kill -9 once the journal holds a block; --resume ends with the file an undisturbed run writes."""
    source = write_folder(tmp_path / "model", blocks=6)
    arguments = ["--method", "svd", "--ratio", 0.6, "--data", text, *SMALL]
    assert run("compress", source, "--output-dir", tmp_path / "whole", *arguments).exit_code == 0
    out, journal = tmp_path / "out", job.journal_dir(tmp_path / "out")
    command = [sys.executable, "-m", "tinycomp.cli", "compress", source, "--output-dir", out, *arguments]
    child = subprocess.Popen([str(a) for a in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and len(list(journal.glob("*.safetensors"))) < 2:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(journal.glob("*.safetensors"))
    again = run("compress", source, "--output-dir", out, *arguments)
    assert again.exit_code == 3
    assert "pass --resume" in again.stderr
    other = run("compress", source, "--output-dir", out, *arguments, "--seed", 5, "--resume")
    assert other.exit_code == 3
    assert "another job" in other.stderr
    assert run("compress", source, "--output-dir", out, *arguments, "--resume").exit_code == 0
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not journal.exists()


# ---------------------------------------------------------------------------------------------------------------- demo


def test_demo_measures_saves_reloads_and_reports(folder, tmp_path, monkeypatch):
    from tinycomp import demo

    small = demo.Demo(
        methods=("svd", "magnitude"), ratios=(0.7,), tokens=512, num_calibration_samples=2, max_seq_length=32, repeats=1
    )
    monkeypatch.setattr("tinycomp.data.inputs.calibration_text", lambda: [calibration_text()[0][:4000]])
    results = demo.run_demo(folder, tmp_path / "out", small, quiet=True)
    names = [row["name"] for row in results["rows"]]
    assert names == ["dense", "int8", "svd 0.7", "magnitude 0.7"]
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


def test_full_demo_covers_every_method_of_the_library():
    from tinycomp.demo import Demo
    from tinycomp.methods import METHODS

    assert {job[0] for job in Demo.full().jobs()} == {name.lower() for name in METHODS}
    assert tinycomp.__version__
