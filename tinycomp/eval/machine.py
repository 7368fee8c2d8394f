"""This machine: its measured limits, what a reader must know of it, and the memory a block of code takes."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tinycomp.eval.timing import time_interleaved

STREAM_BYTES = 1 << 28
GEMM_SIZE = 1536


@dataclass(frozen=True)
class Ceilings:
    """Best rates this machine reached: sequential read of main memory, dense matrix product in `dtype`."""

    stream_gb_s: float
    gemm_gf_s: float
    threads: int
    dtype: str = "float32"


def ceilings(dtype: torch.dtype = torch.float32) -> Ceilings:
    """Measure the machine's limits with torch's present thread count, once per process, thread count and dtype.

    Read: sum, and product with a vector, of a 256 MiB matrix. Arithmetic: GEMM of 1536 x 1536, in fp32 or in `dtype`,
    whichever is faster. The best of the repeats counts, because only interference makes a repeat slower.
    """
    return _ceilings(dtype, torch.get_num_threads())


@cache
def _ceilings(dtype: torch.dtype, threads: int) -> Ceilings:
    rows, vector = torch.ones(STREAM_BYTES // 4 // 4096, 4096), torch.ones(4096)
    cases: dict[str, Callable[[], object]] = {"read mv": lambda: rows @ vector, "read sum": rows.sum}
    for kind in {torch.float32, dtype}:
        matrix = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=kind)
        cases[f"gemm {kind}"] = lambda matrix=matrix: matrix @ matrix  # type: ignore[misc]
    best = {name: min(timing.seconds) for name, timing in time_interleaved(cases, repeats=7).items()}
    stream = min(seconds for name, seconds in best.items() if name.startswith("read"))
    gemm = min(seconds for name, seconds in best.items() if name.startswith("gemm"))
    return Ceilings(
        stream_gb_s=STREAM_BYTES / stream / 1e9,
        gemm_gf_s=2 * GEMM_SIZE**3 / gemm / 1e9,
        threads=threads,
        dtype=str(dtype).removeprefix("torch."),
    )


def load_average() -> float:
    """Mean number of running tasks in the last minute; NaN where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def machine(limits: bool = True) -> dict[str, Any]:
    """What a reader must know to place the numbers: processor, cores, memory, versions, load, measured limits."""
    info = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(_total_memory() / 1e9, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": round(load_average(), 2),
    }
    if limits:
        top = ceilings()
        info |= {"stream_gb_s": round(top.stream_gb_s, 1), "gemm_gf_s": round(top.gemm_gf_s, 1)}
    return info


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


@dataclass(eq=False)
class PeakMemory:
    """Resident bytes of this process: at the start of the block, and at the highest point inside it."""

    start_bytes: int = 0
    bytes: int = 0


_open_blocks: list[PeakMemory] = []


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Peak resident memory of a block, blocks may nest; the process's peak so far where the mark cannot be reset."""
    for outer in _open_blocks:  # the reset below would hide from them what they have seen
        outer.bytes = max(outer.bytes, _resident("VmHWM"))
    with suppress(AttributeError, OSError, TypeError):  # glibc keeps what was freed before, which is not this block's
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    peak = PeakMemory(start_bytes=_resident("VmRSS"))
    _open_blocks.append(peak)
    try:
        yield peak
    finally:
        _open_blocks.remove(peak)
        peak.bytes = max(peak.bytes, _resident("VmHWM"))


def _resident(field_name: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text().splitlines())
        found = next((int(parts[1]) * 1024 for parts in lines if parts and parts[0] == f"{field_name}:"), 0)
        if found:
            return found
    import resource  # not on Windows; there is no /proc on macOS

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
