"""What nvcc made of the CUDA kernels: registers, spills, shared memory and instructions against budgets.

The budgets (csrc/cuda/budgets.json) hold for every compiled instance of a kernel; a kernel without a budget, a budget
without a kernel, or a number that ptxas did not print is a failure.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent / "csrc"))
import gpu_build  # noqa: E402

BUDGETS = json.loads((TESTS.parent / "csrc" / "cuda" / "budgets.json").read_text())
# Slow: nvcc takes minutes for all storages of a weight.
pytestmark = [
    pytest.mark.skipif(gpu_build.cuda_home() is None, reason="nvcc is not installed (make gpu-tools)"),
    pytest.mark.slow,
]
# Blocks of one processor by registers and shared memory, of sm_80 (the tightest of the three in shared memory).
REGISTERS, SHARED = 65536, 164 << 10


class Kernel(NamedTuple):
    symbol: str
    family: str
    registers: int
    stack: int
    spilled: int
    shared: int


@cache
def kernels(architecture: str) -> list[Kernel]:
    found = []
    for _, log in gpu_build.cubins(TESTS.parent / "build", architecture):
        for part in log.split("Compiling entry function '")[1:]:
            symbol = part.split("'")[0]
            stack, stores, loads = map(
                int,
                re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups(),
            )
            shared = re.search(r"(\d+) bytes smem", part)
            family = re.match(r"_ZN8tinycomp4cuda(\d+)(\w+)", symbol)
            name = family[2][: int(family[1])]
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            found.append(Kernel(symbol, name, registers, stack, stores + loads, int(shared[1]) if shared else 0))
    return found


@pytest.mark.parametrize("architecture", gpu_build.ARCHITECTURES)
def test_budgets(architecture: str) -> None:
    found = kernels(architecture)
    assert {k.family for k in found} == set(BUDGETS)
    for kernel in found:
        budget = BUDGETS[kernel.family]
        assert kernel.spilled == kernel.stack == 0, kernel
        assert kernel.registers <= budget["registers"], kernel
        assert kernel.shared <= budget["static_shared_bytes"], kernel
        by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * budget["threads"])
        # 1 KB of every block is the system's.
        by_shared = SHARED // (kernel.shared + budget["dynamic_shared_bytes"] + 1024)
        assert min(by_registers, by_shared) >= budget["blocks_per_processor"], kernel


@cache
def instructions(source: str) -> dict[str, Counter[str]]:
    """Instructions of each kernel of a source, compiled for sm_80."""
    triton = pytest.importorskip("triton", reason="nvdisasm comes with triton, which is not installed (make gpu-tools)")
    tool = shutil.which("nvdisasm") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    cubin = next(path for path, _ in gpu_build.cubins(TESTS.parent / "build", "80") if path.name.startswith(source))
    listing = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    counts: dict[str, Counter[str]] = {}
    for part in re.split(r"^\.text\.", listing, flags=re.M)[1:]:
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", part, re.M)
        counts[part.split(":")[0]] = Counter(".".join(o.split(".")[:1]) for o in found) + Counter(
            "128-bit " + o.split(".")[0] for o in found if ".128" in o
        )
    return counts


def test_tensor_cores_and_wide_loads_are_used() -> None:
    counts = instructions("sliced_linear")
    half = {s: c for s, c in counts.items() if "bfloat16" in s or "__half" in s}
    assert len(half) == 8, sorted(counts)
    for symbol, count in half.items():
        assert count["HMMA"] > 0, symbol
        assert count["LDL"] == count["STL"] == 0, symbol
        if "product_tiles" in symbol:
            assert count["LDGSTS"] > 0, symbol
            assert count["LDSM"] > 0, symbol
        else:
            assert count["128-bit LDG"] > 0, symbol
