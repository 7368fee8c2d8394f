"""What the command line refuses: exit codes, one clear line, nothing half-written; interrupts, full disks, rivals."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import PROTOCOL, compress, run
from safetensors.torch import load_file, save_file
from tiny_folder import write_folder

from tinycomp import job

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


def assert_refused(result, message: str, directory: Path, left: list[str] | None = None) -> None:
    assert result.exit_code == 3, result.output
    assert message in result.stderr
    assert sorted(os.listdir(directory)) == sorted(left or [])


def test_model_that_does_not_exist_is_refused(text, tmp_path):
    assert_refused(
        compress(tmp_path / "nowhere", tmp_path / "out", text, "--method", "svd"), "does not exist", tmp_path
    )


def test_full_output_folder_is_refused_before_any_work(folder, text, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    monkeypatch.setattr(job, "load_model", lambda *_: pytest.fail("the model was loaded"))
    result = compress(folder, tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    assert_refused(result, "is not empty", tmp_path, ["out"])
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_unwritable_output_folder_is_refused(folder, text, tmp_path):
    assert_refused(
        compress(folder, "/proc/out", text, "--method", "svd", "--ratio", 0.5), "cannot write in /proc", tmp_path
    )


def test_nan_weights_are_refused_by_name(text, tmp_path):
    source = write_folder(tmp_path / "nan")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = compress(source, tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    assert_refused(result, "model.layers.1.mlp.up_proj.weight: got NaN", tmp_path, ["nan"])


def test_empty_and_missing_calibration_text_are_refused(folder, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    result = compress(folder, tmp_path / "out", empty, "--method", "svd", "--ratio", 0.5)
    assert_refused(result, "empty", tmp_path, ["empty.txt"])
    result = compress(folder, tmp_path / "out", tmp_path / "no.txt", "--method", "svd", "--ratio", 0.5)
    assert_refused(result, "there is no file", tmp_path, ["empty.txt"])


def test_rank_larger_than_the_matrix_is_refused(folder, text, tmp_path):
    result = compress(folder, tmp_path / "out", text, "--method", "svd", "--set", "rank=4000")
    assert_refused(result, "got rank 4000, allowed 1 to 64", tmp_path)


def test_missing_package_is_refused_with_the_command_that_installs_it(text, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = compress(tmp_path / "model.gguf", tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    assert_refused(result, "pip install 'tinycomp[gguf]'", tmp_path, ["model.gguf"])


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


# ------------------------------------------------------------------------------------------------ damaged files, rivals


def config(**changes: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content)  # type: ignore[return-value]


def plan_with(**fields: object) -> Callable[[Path], None]:
    return config(quantization_config={"quant_method": "tinycomp", "format_version": 1, "methods": [], **fields})


UNKNOWN_LAYER = {"op": "replace", "path": "model.layers.0.mlp.up_proj", "layer": "Circle", "kwargs": {}}
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut in half": (lambda p: os.truncate(p / "model.safetensors", 90_000), "copy or download them again"),
    "weights cut in the header": (lambda p: os.truncate(p / "model.safetensors", 5), "copy or download them again"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no file named model.safetensors"),
    "config cut": (replaced("config.json", b'{"model_type": "llama",'), "not a valid JSON file"),
    "config empty": (replaced("config.json", b"{}"), "`model_type`"),
    "config of another width": (config(hidden_size=48), "do not fit its config.json"),
    "config of another depth": (config(num_hidden_layers=3), "they would be random"),
    "config with a word for a number": (config(hidden_size="big"), "expected int, got str"),
    "config of an unknown model": (config(model_type="nonsense"), "does not recognize this architecture"),
    "config of an unknown class": (config(architectures=["CircleLM"]), "names the class 'CircleLM'"),
    "config of a function": (config(architectures=["pipeline"]), "names the class 'pipeline'"),
    "tokenizer": (replaced("tokenizer.json", b"{"), "the tokenizer of"),
    "quantised elsewhere": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "not installed"),
    "plan with an unknown layer": (plan_with(edits=[UNKNOWN_LAYER]), "got layer 'Circle', allowed CURLinear"),
    "plan of a newer version": (plan_with(edits=[], format_version=99), "got format_version 99"),
    "plan that is no list": (plan_with(edits="all"), "must be lists of objects"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_model_folders_are_refused(name, folder, text, tmp_path):
    damage, message = DAMAGED[name]
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    damage(source)
    result = compress(source, tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    assert_refused(result, message, tmp_path, ["source"])


def test_inspect_refuses_a_folder_that_is_cut_short(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    os.truncate(source / "model.safetensors", 90_000)
    assert_refused(run("inspect", source), "is cut short", tmp_path, ["source"])
    os.truncate(source / "model.safetensors", 5)
    assert_refused(run("inspect", source), "is damaged", tmp_path, ["source"])
    (source / "config.json").write_text("{")
    assert_refused(run("inspect", source), "is damaged", tmp_path, ["source"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text"),
        ("bad.jsonl", b"{\n", "bad.jsonl line 1 is not JSON"),
        ("bad.parquet", b"PAR1", "bad.parquet cannot be read as parquet"),
        ("table.csv", b"a,b", "allowed are .txt, .jsonl, .parquet"),
    ],
)
def test_damaged_calibration_files_are_refused_by_name(name, content, message, folder, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    (tmp_path / name).write_bytes(content)
    result = compress(folder, tmp_path / "out", tmp_path / name, "--method", "svd", "--ratio", 0.5)
    assert_refused(result, message, tmp_path, [name])


def test_second_process_for_one_output_folder_is_refused(folder, text, tmp_path):
    arguments = (folder, tmp_path / "out", text, "--method", "magnitude", "--ratio", 0.5)
    with job.alone(tmp_path / "out"):
        result = compress(*arguments)
        assert result.exit_code == 3
        assert "another process is writing" in result.stderr
        assert not (tmp_path / "out").exists()
    assert compress(*arguments).exit_code == 0
    assert os.listdir(tmp_path) == ["out"]


def test_output_folder_filled_meanwhile_is_not_replaced(folder, text, tmp_path, monkeypatch):
    save = job.save_model

    def fill_and_save(model, tokenizer, path, *more):
        path.mkdir()
        (path / "mine.txt").write_text("keep")
        return save(model, tokenizer, path, *more)

    monkeypatch.setattr(job, "save_model", fill_and_save)
    result = compress(folder, tmp_path / "out", text, "--method", "svd", "--ratio", 0.5)
    assert result.exit_code == 3
    assert "is not empty" in result.stderr
    assert "--resume continues" in result.stderr
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    assert sorted(os.listdir(tmp_path)) == [job.journal_dir(tmp_path / "out").name, "out"]
