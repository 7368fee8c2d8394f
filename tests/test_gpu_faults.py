"""Tests of the tests of the CUDA kernels: faults put into their sources must be found, by results or by sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import all_cores
import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "csrc")]
import gpu_build  # noqa: E402

REASON = gpu_build.why_no_emulation()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FAULTS = {
    "none": ("gemm.cuh", "kStages = 3", "kStages = 3"),
    "waits for too few copies": ("gemm.cuh", "wait_copies<kStages - 2>", "wait_copies<kStages - 1>"),
    "no barrier in the loop": ("gemm.cuh", "      __syncthreads();\n    }\n    stage(step", "    }\n    stage(step"),
    "no barrier before the tile is stored": ("gemm.cuh", "  __syncthreads();\n  store_tile", "  store_tile"),
    "no barrier before the sum": ("decode.cuh", "kOutputs);\n  __syncthreads();\n", "kOutputs);\n"),
    "warp groups: a stage filled too early": ("product_wgmma.cu", "wgmma_wait<1>", "wgmma_wait<2>"),
    "warp groups: the phase of a barrier": ("product_wgmma.cu", "step / Tile::kStages & 1", "0"),
    "tensor memory: a stage filled too early": ("product_tcgen05.cu", "(round - 1) & 1", "round & 1"),
    "tensor memory: sums fetched too early": ("product_tcgen05.cu", "  ptx::wait_barrier(&done, 0);\n", ""),
    "tensor memory: old sums kept": ("product_tcgen05.cu", "step + k > 0", "true"),
    "last tile left out": ("linear_host.cuh", "ceil_div(w.rows, Tile::kN)", "w.rows / Tile::kN"),
}
FAULTY_RUN = """
import sys, torch
from pathlib import Path
import backend
from tolerance import assert_close
from tinycomp import ops
torch.use_deterministic_algorithms(True)
library = backend.load(Path(sys.argv[1]), ("sliced_linear",), ("-O0",))
g = torch.Generator().manual_seed(0)
caught = 0
for order in ("forward", "random", "greedy", "greedy-reverse"):
    for lazy in (True, False):
        for m, own in ((5, "mma"), (40, "mma"), (40, "wgmma"), (40, "tcgen05")):
            backend.configure(library, order, 3, lazy, 108 if own == "mma" else 1, own)
            x, w = torch.randn(m, 456, generator=g).bfloat16(), torch.randn(104, 456, generator=g).bfloat16()
            try:
                with ops.use_backend("cuda-emulated"):
                    y = ops.sliced_linear(x, w, None, 456, 104)
                assert_close(y, x @ w.t(), x.double() @ w.double().t(), "")
            except (AssertionError, RuntimeError):
                caught += 1
print(caught)
"""


def faulty_sources(folder: Path, name: str, right: str, wrong: str) -> Path:
    """A copy of csrc in which a text of a file is replaced."""
    csrc = shutil.copytree(ROOT / "csrc", folder / "csrc")
    text = (csrc / "cuda" / name).read_text()
    assert right in text, f"{name} no longer holds {right!r}"
    (csrc / "cuda" / name).write_text(text.replace(right, wrong))
    return csrc


def python(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "csrc" / "emulation")))
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )


def run_with_fault(fault: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        return python(FAULTY_RUN, str(faulty_sources(Path(folder), *FAULTS[fault])))


# every fault compiles the kernels again: the suite has one of each kind, the slow one those of other instructions
USUAL = (
    "none",
    "waits for too few copies",
    "no barrier in the loop",
    "no barrier before the sum",
    "last tile left out",
)


@pytest.mark.parametrize("fault", [f if f in USUAL else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_seeded_faults_are_caught(fault: str, request: pytest.FixtureRequest) -> None:
    done = all_cores.result(run_with_fault, all_cores.selected(request, "fault"), fault)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (int(done.stdout) > 0) == (fault != "none"), f"caught in {done.stdout.strip()} of 32 runs"


SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
SANITIZED_RUN = f"""
import sys, torch
from pathlib import Path
import backend
from test_ops import fresh, run
from tinycomp import ops
from tinycomp.kernels_dump import _cases
from tinycomp.ops import _registry
library = backend.load(Path(sys.argv[1]), tuple(sys.argv[2:]), {SANITIZERS})
ran = 0
for name in sys.argv[2:] or sorted(_cases.DEFAULTS):
    for dtype in (torch.float32, torch.bfloat16):
        for processors in (1, 108):
            backend.configure(library, processors=processors)
            calls = [sample.args for sample in ops.OPS[name].samples(dtype)]
            if calls:
                calls += [_cases.make(name, dtype, 0, shape) for shape in _cases.DEFAULTS[name]]
            for args in calls:
                if _registry.why_not(ops.OPS[name], "cuda-emulated", args) is None:
                    with ops.use_backend("cuda-emulated"):
                        run(name, fresh(args))
                    ran += 1
print(ran)
"""


def sanitized(sources: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Run the samples of some ops, all by default, under the address and undefined-behaviour sanitizers."""
    libraries = [gpu_build.run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    return python(
        SANITIZED_RUN,
        str(sources),
        *names,
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )


def sanitized_run(which: str) -> subprocess.CompletedProcess[str]:
    if which != "a row too many":
        return sanitized(ROOT / "csrc", *{"one": ("sliced_linear",), "all": ()}[which])
    with tempfile.TemporaryDirectory() as folder:
        right, wrong = "inside = first_row + row < rows", "inside = first_row + row <= rows"
        return sanitized(faulty_sources(Path(folder), "gemm.cuh", right, wrong), "sliced_linear")


@pytest.mark.parametrize("which", ["one", "a row too many", pytest.param("all", marks=pytest.mark.slow)])
def test_sanitizers_find_only_the_seeded_fault(which: str, request: pytest.FixtureRequest) -> None:
    done = all_cores.result(sanitized_run, all_cores.selected(request, "which"), which)
    if which == "a row too many":
        assert done.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout) > (20 if which == "one" else 200)
