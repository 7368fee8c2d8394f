"""What nvcc made of the CUDA kernels: registers, spills, shared memory and instructions against budgets.

The budgets (csrc/cuda/budgets.json) hold for every compiled instance of a kernel; a kernel without a budget, a budget
without a kernel, or a number that ptxas did not print is a failure. "instructions" must be in every instance for
bfloat16 and float16, "instructions_90a" and "instructions_100a" in what is made of it for sm_90a and sm_100a. Instances
on rounded weights have at least "rounded_loads" streamed loads of 16 bytes, which only weights are read by.
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
pytestmark = pytest.mark.skipif(gpu_build.cuda_home() is None, reason="nvcc is not installed (make gpu-tools)")
# Of one processor.
REGISTERS, SHARED = 65536, {"80": 164 << 10, "90a": 228 << 10, "100a": 228 << 10}


class Kernel(NamedTuple):
    symbol: str
    family: str
    registers: int
    stack: int
    spilled: int
    shared: int


def family(symbol: str) -> str:
    """The name of a kernel without its template arguments."""
    found = re.match(r"_ZN8tinycomp4cuda(\d+)(\w+)", symbol)
    return found[2][: int(found[1])]


@cache
def kernels(architecture: str, only: tuple[str, ...] = (), own: bool = False) -> list[Kernel]:
    found = []
    for _, log in gpu_build.cubins(TESTS.parent / "build", architecture, only, own):
        for part in log.split("Compiling entry function '")[1:]:
            symbol = part.split("'")[0]
            stack, stores, loads = map(
                int,
                re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups(),
            )
            shared = re.search(r"(\d+) bytes smem", part)
            registers = int(re.search(r"Used (\d+) registers", part)[1])
            found.append(
                Kernel(symbol, family(symbol), registers, stack, stores + loads, int(shared[1]) if shared else 0)
            )
    return found


@pytest.mark.parametrize("architecture", gpu_build.ARCHITECTURES)
def test_budgets(architecture: str) -> None:
    check_all_budgets(kernels(architecture), architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", gpu_build.ARCHITECTURES[1:])
def test_budgets_of_the_library_itself(architecture: str) -> None:
    check_all_budgets(kernels(architecture, own=True), architecture)


def check_all_budgets(found: list[Kernel], architecture: str) -> None:
    assert {k.family for k in found} == set(BUDGETS)
    check_budgets(found, architecture)


def check_budgets(found: list[Kernel], architecture: str) -> None:
    for kernel in found:
        budget = BUDGETS[kernel.family]
        if any(key.startswith("instructions_") for key in budget) and f"instructions_{architecture}" not in budget:
            continue  # empty there
        assert kernel.spilled == kernel.stack == 0, kernel
        assert kernel.registers <= budget["registers"], kernel
        assert kernel.shared <= budget["static_shared_bytes"], kernel
        # Tiles of one kernel differ in size: rows, columns, and warps along each.
        tile = re.search(r"4TileILi\d+ELi\d+ELi(\d+)ELi(\d+)E", kernel.symbol)
        threads = 32 * int(tile[1]) * int(tile[2]) if tile else budget["threads"]
        by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * threads)
        # 1 KB of every block is the system's.
        by_shared = SHARED[architecture] // (kernel.shared + budget["dynamic_shared_bytes"] + 1024)
        assert min(by_registers, by_shared) >= budget["blocks_per_processor"], kernel


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """Instructions of each kernel of a compiled source; "LDG.128" and "LDG.NA.128" count some of them once more.

    LDG.E.NA.128.CONSTANT is ld.global.nc.L1::no_allocate.v4, ptx::load_streamed.
    """
    triton = pytest.importorskip("triton", reason="nvdisasm comes with triton, which is not installed (make gpu-tools)")
    tool = shutil.which("nvdisasm") or Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    listing = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    counts: dict[str, Counter[str]] = {}
    for part in re.split(r"^\.text\.", listing, flags=re.M)[1:]:
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", part, re.M)
        plain = Counter(name.split(".")[0] for name in found)
        wide = Counter(name.split(".")[0] + ".128" for name in found if ".128" in name)
        streamed = Counter("LDG.NA.128" for name in found if name == "LDG.E.NA.128.CONSTANT")
        counts[part.split(":")[0]] = plain + wide + streamed
    return counts


def test_instructions() -> None:
    seen = Counter()
    for cubin, _ in gpu_build.cubins(TESTS.parent / "build", "80"):
        for symbol, count in instructions(cubin).items():
            name = family(symbol)
            assert count["EXIT"] > 0, f"{symbol}: no instructions were read"
            assert count["LDL"] == count["STL"] == 0, symbol
            # integer_decode has the size of its loads among its arguments: others are for short groups
            if name.endswith("_decode") and ("Rounded" in symbol or re.search("integer_decode.*Li16E", symbol)):
                assert count["LDG.NA.128"] >= BUDGETS[name]["rounded_loads"] > 0, symbol
                seen["rounded"] += 1
            if "bfloat16" in symbol or "__half" in symbol:
                missing = [word for word in BUDGETS[name]["instructions"] if not count[word]]
                assert not missing, (symbol, missing)
                seen[name] += 1
    assert {name for name, budget in BUDGETS.items() if budget["instructions"]} <= set(seen)
    assert seen["rounded"] == 7 * 2 * 3  # kernels, bits, dtypes


@pytest.mark.parametrize("architecture", gpu_build.ARCHITECTURES[1:])
def test_a_gpu_uses_its_own_instructions(architecture: str) -> None:
    found = kernels(architecture, gpu_build.NO_OPS)
    key = f"instructions_{architecture}"
    wanted = {name: budget[key] for name, budget in BUDGETS.items() if key in budget}
    assert {k.family for k in found} == {"product_wgmma", "product_tcgen05"} >= set(wanted)
    check_budgets(found, architecture)
    seen = Counter()
    for cubin, _ in gpu_build.cubins(TESTS.parent / "build", architecture, gpu_build.NO_OPS):
        for symbol, count in instructions(cubin).items():
            assert [word for word in wanted.get(family(symbol), []) if not count[word]] == [], symbol
            seen[family(symbol)] += 1
    assert all(seen[name] == 2 for name in wanted)


def test_the_host_code_compiles() -> None:
    """nvcc refuses host code that g++ takes in the emulation: calls of device functions, for one."""
    assert len(gpu_build.host_objects(TESTS.parent / "build")) == len(gpu_build.sources())


@pytest.mark.slow
def test_the_library_links_where_torch_has_no_cuda(tmp_path: Path) -> None:
    output = tmp_path / "_C_cuda.so"
    gpu_build.cuda_library(TESTS.parent / "build" / "cuda", output)
    symbols = subprocess.run(["nm", "-D", output], capture_output=True, text=True, check=True).stdout
    assert " T tinycomp_signatures" in symbols
    assert " U aoti_torch_get_current_cuda_stream" in symbols
