"""The CUDA kernels as the backend "cuda-emulated": the same .cu files, built by g++, one fiber per CUDA thread."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch

from tinycomp.ops import _gpu, _registry

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import gpu_build  # noqa: E402

ORDERS = ("forward", "reverse", "random", "greedy", "greedy-reverse", "greedy-random")
INSTRUCTIONS = ("mma", "wgmma", "tcgen05")  # of config.h
_library = torch.library.Library("tinycomp_emulated", "DEF")


@cache
def load(sources: Path = ROOT / "csrc", only: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Build and load the emulated kernels, and register them; one build per process.

    Args:
        sources: where csrc lies; a test passes a copy with a fault in it.
        only: stems of the ops to build, all by default.
        flags: for g++, such as a sanitizer.
    """
    path = gpu_build.emulated_library(ROOT / "build", sources, only, flags)
    for op in _registry.OPS.values():
        _library.define(op.name + op.schema)
    torch.ops.load_library(path)
    kernels = _gpu.signatures(path)
    _registry._check_signatures(kernels)
    for name in kernels:
        add = _registry.register(name, "cuda-emulated", lambda *args, name=name: _gpu.why_not_cuda(name, args))
        add(getattr(torch.ops.tinycomp_emulated, name).default)
    return ctypes.CDLL(str(path))


def configure(
    library: ctypes.CDLL,
    order: str = "forward",
    seed: int = 1,
    lazy_copies: bool = True,
    processors: int = 108,
    instructions: str = "mma",
) -> None:
    """How threads take turns, when asynchronous copies land, how large the device is, what large tiles use."""
    library.tinycomp_emulate(
        ORDERS.index(order), ctypes.c_uint(seed), lazy_copies, processors, INSTRUCTIONS.index(instructions)
    )
