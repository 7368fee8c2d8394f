"""Recovery as a job: resume after a kill, two processes, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import recovery_job
import torch
from safetensors.torch import load_file
from tiny_folder import write_folder
from typer.testing import CliRunner

from tinycomp import cli

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, torch.Tensor]:
    """What one process gives on one thread, without interruption."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student, _ = recovery_job.run(str(tmp_path_factory.mktemp("straight")))
    torch.set_num_threads(threads)
    return recovery_job.state(student)


def run_job(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)


def test_resume_after_sigkill_is_bit_identical(tmp_path, straight):
    killed = run_job([str(TESTS / "recovery_job.py"), str(tmp_path / "out"), str(tmp_path / "never"), "5"])
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "out" / "checkpoint-4").exists()
    with pytest.raises(ValueError, match="holds this job already"):
        recovery_job.run(str(tmp_path / "out"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    student, report = recovery_job.run(str(tmp_path / "out"), resume=True)
    torch.set_num_threads(threads)
    assert [c["step"] for c in report.curve] == [0, 2, 4, 6, 8]
    assert report.best_step > 4  # trained after the resume
    assert all(torch.equal(value, straight[name]) for name, value in recovery_job.state(student).items())


def test_two_processes_give_the_result_of_one(tmp_path, straight):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TESTS / "recovery_job.py")]
    done = run_job([*words, str(tmp_path / "out"), str(tmp_path / "result")])
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "result")
    start = recovery_job.state(recovery_job.models()[0])
    assert found.keys() == straight.keys()
    moved = sum(float((straight[n] - start[n]).norm()) ** 2 for n in found) ** 0.5
    apart = sum(float((straight[n] - found[n]).norm()) ** 2 for n in found) ** 0.5
    assert moved > 0
    assert apart < 1e-3 * moved


def test_the_command_runs_on_two_processes_and_gives_the_result_of_one(tmp_path):
    write_folder(tmp_path / "model")
    few = ["--num-calibration-samples", "4", "--max-seq-length", "16"]
    words = ["compress", str(tmp_path / "model"), "--method", "svd", "--ratio", "0.5", *few]
    assert CliRunner().invoke(cli.app, [*words, "--output-dir", str(tmp_path / "small")]).exit_code == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    for name, before in (("one", []), ("two", launch)):
        command = [
            *before, "-m", "tinycomp", "recover", str(tmp_path / "small"), "--teacher", str(tmp_path / "model"),
            "--output-dir", str(tmp_path / name), "--steps", "4", "--num-samples", "24", "--max-seq-length", "16",
            "--set", "batch_size=4", "--set", "learning_rate=1e-3", "--json",
        ]  # fmt: skip
        done = run_job(command)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["output_dir"] == str(tmp_path / name)
        found[name] = load_file(tmp_path / name / "model.safetensors")
    start = load_file(tmp_path / "small" / "model.safetensors")
    start = {name: value for name, value in start.items() if value.is_floating_point()}
    moved = sum(float((found["one"][n] - start[n]).norm()) ** 2 for n in start) ** 0.5
    apart = sum(float((found["one"][n] - found["two"][n]).norm()) ** 2 for n in start) ** 0.5
    assert moved > 0
    assert apart < 1e-3 * moved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "one", "small", "two"]


def test_the_command_names_mistakes_and_leaves_no_trace(tmp_path, monkeypatch):
    write_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    words = ["recover", "model", "--teacher", "model", "--output-dir", "out", "--num-samples", "4"]
    wrong = CliRunner().invoke(cli.app, [*words, "--set", "nonsense=1"])
    assert wrong.exit_code == 2
    assert "nonsense" in wrong.output
    assert "temperature" in wrong.output
    few = CliRunner().invoke(cli.app, words)
    assert few.exit_code == 3
    assert "one batch of 8" in " ".join(few.output.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    (tmp_path / ".out.tinycomp-recovery").mkdir()
    left = CliRunner().invoke(cli.app, words)
    assert left.exit_code == 3
    assert "--resume" in left.output
