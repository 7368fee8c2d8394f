"""What the GPU backends need here: the CUDA library, Triton, and what their kernels do not take."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).parent.parent / "_C_cuda.so"
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Positions of the scales of rounded weights.
_SCALES = {
    "quant_linear": (2, 3),
    "quant_linears": tuple(i + 4 * layer for layer in range(3) for i in (2, 3)),
    "quant_lowrank_linear": (2, 4, 6, 7),
    "quant_lowrank_linears": tuple(i + 8 * layer for layer in range(3) for i in (2, 4, 6, 7)),
    "quant_swsc_linear": (2, 5, 7, 8, 9, 10),
    "quant_swsc_linears": tuple(i + 12 * layer for layer in range(3) for i in (2, 5, 7, 8, 9, 10)),
    "masked_linear": (4,),
    "masked_linears": tuple(4 + 6 * layer for layer in range(3)),
}
# Position of the format of packed sparse weights.
_FORMAT = {"masked_linear": 7, "masked_linears": 19}
# Products of int8 that an int32 holds.
_LONGEST_GROUP = 1 << 17

# Why the Triton launchers are not registered, in brackets; empty where they are.
no_triton = ""


def load_cuda() -> tuple[str, dict[str, str]]:
    """Load the CUDA library; gives the reason it is not loaded (empty if it is) and its signatures."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA", {}
    if not LIBRARY.exists():
        return "the CUDA library is not built (nvcc was not found at install)", {}
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the CUDA library is not loaded ({error})", {}
    return "", signatures(LIBRARY)


def signatures(library: Path) -> dict[str, str]:
    """Op -> C++ signature of each kernel in a loaded library."""
    read = ctypes.CDLL(str(library)).tinycomp_signatures
    read.restype = ctypes.c_char_p
    return dict(line.split(" ", 1) for line in read().decode().splitlines())


def load_triton() -> None:
    """Register the Triton launchers where they can run, else note why not in `no_triton`."""
    global no_triton
    if importlib.util.find_spec("triton") is None:
        no_triton = " (triton is not installed)"
    elif torch.version.cuda is None and torch.version.hip is None and not interpreted():
        no_triton = " (this torch is built without a GPU)"
    else:
        importlib.import_module("tinycomp.triton_kernels")


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _data(name: str, args: tuple[Any, ...]) -> Tensor:
    """The argument whose dtype a kernel is compiled for."""
    return args[1] if name == "gram_accumulate_" else args[0]


def _no_rounding(backend: str, name: str, args: tuple[Any, ...]) -> str | None:
    """Why a call whose activations are rounded cannot run, where it cannot."""
    rounds = ("quant_linear", "quant_linears") if backend == "CUDA" else ()
    if not name.startswith("quant_") or args[-1] == 0:
        return None
    if name not in rounds:
        return f"the {backend} kernel of {name} does not round activations, got activation_bits {args[-1]}"
    group = min(args[-2], args[0].shape[-1])
    if group > _LONGEST_GROUP:
        return f"the {backend} kernel of {name} rounds activations in groups of at most {_LONGEST_GROUP}, got {group}"
    return None


def _no_index(backend: str, name: str, args: tuple[Any, ...]) -> str | None:
    """Why a call whose positions are indices cannot run, where it cannot."""
    at = _FORMAT.get(name, len(args))
    return f"the {backend} kernel of {name} has no format 'index'" if args[at : at + 1] == ("index",) else None


def _refused(backend: str, *call: Any) -> str | None:
    return _no_index(backend, *call) or _no_rounding(backend, *call)


def why_not_cuda(name: str, args: tuple[Any, ...]) -> str | None:
    """None if the CUDA kernel of `name` takes these arguments, else the reason."""
    data = _data(name, args)
    if data.dtype not in _KERNEL_DTYPES:
        return f"the CUDA kernel of {name} takes float32, bfloat16 and float16, got {data.dtype}"
    for scales in (args[i] for i in _SCALES.get(name, ())):
        if scales is not None and scales.dtype not in (torch.float32, args[0].dtype):
            return f"the CUDA kernel of {name} takes scales in float32 or {args[0].dtype}, got {scales.dtype}"
    return _refused("CUDA", name, args)


def why_not_triton(name: str, args: tuple[Any, ...]) -> str | None:
    """None if the Triton kernel of `name` takes these arguments, else the reason."""
    if args[0].device.type != "cuda" and not interpreted():
        return f"triton runs on a GPU, {name} got a tensor on {args[0].device.type}"
    data = _data(name, args)
    if data.dtype not in _KERNEL_DTYPES:
        return f"the Triton kernel of {name} takes float32, bfloat16 and float16, got {data.dtype}"
    at = {"swsc_linears": -1, "quant_swsc_linears": -4}.get(name)
    if at is not None and args[at] != 0:
        return f"the Triton kernel of {name} takes layers whose outputs share (axis 0), got axis {args[at]}"
    return _refused("Triton", name, args)
