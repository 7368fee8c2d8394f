"""The Triton kernels: executed by the repaired interpreter on every sample, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import all_cores
import pytest
from all_cores import selected
from fused_models import OPS as FUSED

from tinycomp.ops._registry import OPS

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc"))
import gpu_build

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


def interpreted(words: tuple[str, ...]) -> list[dict]:
    return run("triton_interpreter.py", *words, TRITON_INTERPRET="1")


def check_interpreted(name: str, request: pytest.FixtureRequest, *words: str) -> None:
    names = selected(request, "name")
    parts = [(*words, *names[i :: all_cores.CORES]) for i in range(min(all_cores.CORES, len(names)))]
    mine = next(part for part in parts if name in part)
    rows = [row for row in all_cores.result(interpreted, parts, mine) if row["op"] == name]
    ran = [row for row in rows if row["why_not"] is None]
    refused = {row["why_not"] for row in rows if row["why_not"] is not None}
    # What no Triton kernel takes has calls of its own; that leaves a third of those of rounded layers.
    assert len(ran) >= max(len(rows) / 3, 1), f"{name}: most calls did not run: {refused}"
    assert [row for row in ran if row["error"]] == []


@pytest.mark.parametrize("name", KERNELS)
def test_interpreted(name: str, request: pytest.FixtureRequest) -> None:
    check_interpreted(name, request)


def test_the_interpreter_computes_with_narrow_numbers() -> None:
    rows = {row.pop("type"): row for row in interpreted(("--narrow",))}
    assert set(rows) == {"bfloat16", "e4m3", "e5m2"}
    for name, same in rows.items():
        assert all(same.values()), (name, same)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_awkward_shapes(name: str, request: pytest.FixtureRequest) -> None:
    check_interpreted(name, request, "--awkward")


def test_every_op_has_both_backends() -> None:
    """All but those of `tc.fuse_`, which is for CPUs."""
    cuda = {p.stem for p in (TESTS.parent / "csrc" / "cuda").glob("*.cu")}
    assert set(OPS) - set(FUSED) == set(KERNELS) == cuda - set(gpu_build.NO_OPS)


def test_compilers_see_through_every_op() -> None:
    """torch.compile gets the launches themselves, no op of ours around them; q, k and v keep one for each stage."""
    rows = {row.pop("op"): row for row in run("triton_traced.py")}
    assert set(rows) == set(KERNELS)
    for name, row in rows.items():
        assert row["opaque"] == [], name
        assert row["launches"] >= 1, name
    assert rows["lowrank_linears"]["launches"] == rows["quant_lowrank_linears"]["launches"] == 2


def compiled(target: str) -> list[dict]:
    return run("triton_aot.py", *target.split("-"))


# "every" way to write an output, or "few" of them: those that the compilers of the other GPUs are spared in each run of
# the suite. All storages, all candidates of the autotuner and all other kernels are in both.
TARGETS = ["80-bfloat16-every", "90-bfloat16-few", "100-bfloat16-few", "80-float32-few"]
SLOW_TARGETS = ["80-float32-every", "90-bfloat16-every", "100-bfloat16-every"]
SLOW_TARGETS += [f"{gpu}-{dtype}-every" for gpu in ("120", "gfx942") for dtype in ("bfloat16", "float32")]


BUDGETS = json.loads((TESTS / "triton_budgets.json").read_text())
REGISTERS, SHARED, WARPS = 65536, {"80": 164 << 10, "90": 228 << 10, "100": 228 << 10}, 64  # of one processor


def check_budget(row: dict, architecture: str) -> None:
    """Against tests/triton_budgets.json, which holds for every candidate on the GPUs of `SHARED`.

    "float32" has other numbers for that type, "bfloat16" names what its machine code must contain.
    """
    budget, what = BUDGETS[row["kernel"]], json.dumps(row)
    budget = budget | budget.get("float32", {}) if row["dtype"] == "float32" else budget
    assert row["registers"] <= budget["registers"], what
    assert row["shared_bytes"] <= budget["shared_bytes"], what
    by_registers = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
    by_shared = SHARED[architecture] // (row["shared_bytes"] + 1024)  # 1 KB of every block is the system's
    assert min(by_registers, by_shared, WARPS // row["warps"]) >= budget["blocks_per_processor"], what
    if row["dtype"] == "bfloat16":
        assert [name for name in budget["bfloat16"] if not row[name]] == [], what


@pytest.mark.parametrize("target", [*TARGETS, *(pytest.param(t, marks=pytest.mark.slow) for t in SLOW_TARGETS)])
def test_compiled(target: str, request: pytest.FixtureRequest) -> None:
    rows = all_cores.result(compiled, selected(request, "target"), target)
    assert {row["op"] for row in rows} == set(KERNELS)
    architecture = target.split("-")[0]
    assert {row["kernel"] for row in rows} == set(BUDGETS)
    for row in rows:
        what = json.dumps(row)
        if architecture in SHARED:
            check_budget(row, architecture)
        assert row["registers"] > 0, what
        assert row["spill_bytes"] == 0, what
        assert row["shared_bytes"] <= 163 << 10, what
        if row["kernel"] in ("product_kernel", "stages_kernel") and row["dtype"] != "float32":
            assert row["matrix_instructions"] > 0, what
