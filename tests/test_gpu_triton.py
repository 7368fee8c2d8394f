"""The Triton kernels: executed by the repaired interpreter on every sample, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tinycomp.ops._registry import OPS

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (make gpu-tools)"
)
KERNELS = sorted(p.stem for p in (TESTS.parent / "tinycomp" / "triton_kernels").glob("*.py") if p.stem in OPS)


def run(script: str, *words: str, **environment: str) -> list[dict]:
    """JSON lines of a script in a process of its own: Triton decides at import how kernels run."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *words],
        env=os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def interpreted() -> list[dict]:
    return run("triton_interpreter.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", KERNELS)
def test_interpreted(name: str) -> None:
    rows = [row for row in interpreted() if row["op"] == name]
    ran = [row for row in rows if row["why_not"] is None]
    assert len(ran) >= len(rows) / 2, f"{name}: most samples did not run: {rows[0]}"
    assert [row for row in ran if row["error"]] == []


def test_every_op_has_both_backends() -> None:
    cuda = {p.stem for p in (TESTS.parent / "csrc" / "cuda").glob("*.cu")}
    assert set(OPS) == set(KERNELS) == cuda - {"library"}


@cache
def compiled(architecture: str) -> list[dict]:
    # Float32 takes other configurations; once is enough for every run of the suite.
    return run("triton_aot.py", architecture, "bfloat16", *(() if architecture in ("90", "100") else ("float32",)))


@pytest.mark.parametrize(
    "architecture", ["80", "90", "100", *(pytest.param(a, marks=pytest.mark.slow) for a in ("120", "gfx942"))]
)
def test_compiled(architecture: str) -> None:
    rows = compiled(architecture)
    assert {row["op"] for row in rows} == set(KERNELS)
    for row in rows:
        what = json.dumps(row)
        assert row["registers"] > 0, what
        assert row["spill_bytes"] == 0, what
        assert row["shared_bytes"] <= 163 << 10, what
        if row["kernel"] == "product_kernel" and row["dtype"] != "float32":
            assert row["matrix_instructions"] > 0, what
