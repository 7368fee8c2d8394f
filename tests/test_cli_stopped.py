"""Jobs of the command line that are killed, interrupted or out of space: nothing half-written, and they continue."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import SMALL, run
from safetensors import safe_open
from tiny_folder import write_folder

from tinycomp import job
from tinycomp.train.bregman import SplitBregman
from tinycomp.train.path_search import CHECKPOINT

# -------------------------------------------------------------------------------------------------------------- resume
BLOCKS = 60  # enough that a job is still at work when the first two are seen to be finished
JOB = ["--method", "svd", "--ratio", 0.6, *SMALL]


def start(source: Path, out: Path, text: Path, words: Sequence[object] = JOB, **more: object) -> subprocess.Popen[str]:
    """The same job in a process of its own."""
    command = [sys.executable, "-m", "tinycomp", "compress", source, "--output-dir", out, *words, "--data", text]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(a) for a in command], text=True, **pipes, **more)  # type: ignore[call-overload]


def test_killed_compression_resumes_to_the_same_bytes(text, tmp_path):
    """kill -9 once the journal holds a block; --resume ends with the file an undisturbed run writes."""
    source = write_folder(tmp_path / "model", blocks=BLOCKS)
    arguments = [*JOB, "--data", text]
    assert run("compress", source, "--output-dir", tmp_path / "whole", *arguments).exit_code == 0
    out, journal = tmp_path / "out", job.journal_dir(tmp_path / "out")
    child = start(source, out, text)
    while child.poll() is None and len(list(journal.glob("*.safetensors"))) < 2:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.communicate()
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


def test_interrupt_exits_with_130_and_keeps_the_finished_blocks(text, tmp_path):
    source = write_folder(tmp_path / "model", blocks=BLOCKS)
    out, journal = tmp_path / "out", job.journal_dir(tmp_path / "out")
    # A background job of a shell script starts with the signal ignored, and so would its children.
    child = start(source, out, text, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while child.poll() is None and len(list(journal.glob("*.safetensors"))) < 2:
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert "the same command with --resume continues" in said
    assert child.returncode == 130, said
    assert sorted(os.listdir(tmp_path)) == [journal.name, "model"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_search_that_was_stopped_continues_from_its_checkpoint(how, text, tmp_path, monkeypatch):
    """No block is finished then, and the checkpoint of the search is all that the journal has."""
    source, out, steps = write_folder(tmp_path / "model"), tmp_path / "out", 100
    fields = [f"steps={steps}", "samples=1", "length=16", "checkpoint_every=1", "warm=0"]
    words = ["--method", "spp", "--ratio", 0.6, *SMALL, *(word for f in fields for word in ("--set", f))]
    assert run("compress", source, "--output-dir", tmp_path / "whole", *words, "--data", text).exit_code == 0
    child = start(source, out, text, words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    checkpoint = job.journal_dir(out) / "search" / CHECKPOINT
    while child.poll() is None and not checkpoint.exists():
        time.sleep(0.002)
    child.send_signal(how)
    said = child.communicate()[1]
    assert child.returncode == (-how if how == signal.SIGKILL else 130), said
    assert ("--resume continues" in said) == (how == signal.SIGINT)
    assert run("compress", source, "--output-dir", out, *words, "--data", text).exit_code == 3
    done, step = [], SplitBregman.step
    monkeypatch.setattr(SplitBregman, "step", lambda self: (done.append(1), step(self)))
    with safe_open(checkpoint, "pt") as stored:
        before = int(stored.get_tensor("counts")[1])
    assert run("compress", source, "--output-dir", out, *words, "--data", text, "--resume").exit_code == 0
    assert len(done) == steps - before
    assert 0 < before < steps
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not job.journal_dir(out).exists()


def test_interrupt_that_native_code_turned_into_its_own_error_is_an_interrupt(monkeypatch):
    def native():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("could not determine the shape") from None

    monkeypatch.setattr("tinycomp.doctor.diagnose", native)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = run("doctor")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted; nothing was written\n"


@pytest.mark.parametrize(("limit", "where"), [(60_000, "temporary files"), (400_000, "save: cannot write the weights")])
def test_full_disk_is_refused_with_nothing_half_written(limit, where, text, tmp_path):
    """No file may grow beyond `limit` bytes: first the statistics do not fit, then the weights do not."""
    source = write_folder(tmp_path / "model", blocks=BLOCKS)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    child = start(source, tmp_path / "out", text, preexec_fn=full)
    said = child.communicate()[1]
    assert child.returncode == 3, said
    assert where in said
    assert "free space there" in said
    left = set(os.listdir(tmp_path)) - {"model"}
    assert left <= {job.journal_dir(tmp_path / "out").name}
    if left:
        assert "--resume continues" in said
        assert (
            run("compress", source, "--output-dir", tmp_path / "out", *JOB, "--data", text, "--resume").exit_code == 0
        )
