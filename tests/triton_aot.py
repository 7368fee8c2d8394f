"""Run in its own process: compile every Triton kernel, in every configuration, for a GPU that is not here.

The launchers run on shapes of a real layer with a driver that only names the target, and every launch stops after
compilation. One JSON line per compiled kernel: registers, spilled bytes, shared memory, matrix instructions, loads of
16 bytes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
# Triton compiles again what has changed, and nothing else.
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).parent.parent / "build" / "triton")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from tinycomp import ops

CACHE = Path(os.environ["TRITON_CACHE_DIR"])
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURE, DTYPE, HOW_MANY = sys.argv[1:]
AMD = ARCHITECTURE.startswith("gfx")


class Driver:
    """Names the target; there is no device behind it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", ARCHITECTURE, 64) if AMD else GPUTarget("cuda", int(ARCHITECTURE), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def measured(kernel: Any) -> dict[str, Any]:
    """`measure` of a kernel, once for each that is compiled, as long as what is measured stays the same."""
    file = CACHE / f"{kernel.hash}-{zlib.crc32(inspect.getsource(measure).encode())}.json"
    if not file.exists():
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(measure(kernel)))
        partial.rename(file)
    return json.loads(file.read_text())


def measure(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, and instructions that count; a number that is missing is an error."""
    if AMD:
        text = kernel.asm["amdgcn"]
        number = {k: int(re.search(rf"{k}:?\s+(\d+)", text)[1]) for k in (r"\.vgpr_count", r"\.vgpr_spill_count")}
        registers, spilled = number.values()
        matrix, wide = text.count("v_mfma"), len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    else:
        cubin = CACHE / f"{kernel.hash}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [BIN / "cuobjdump", "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # What is spilled, and any array that is not in registers, lies on the stack.
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        text = kernel.asm["ptx"]
        matrix = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", text))
        wide = len(re.findall(r"\bld\.global\S*\.(?:v4\.b32|v2\.b64)|cp\.async\.c[ag]\.[^;]*, 0x10\b", text))
    counts = {"matrix_instructions": matrix, "loads_of_16_bytes": wide}
    return {"registers": registers, "spill_bytes": spilled} | counts


def calls(dtype: torch.dtype, every: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Shapes of a layer with 2048 inputs, decode and 64 rows of prefill; with `every`, each way to write an output."""
    k, n, rank = 2048, 2048, 512

    def t(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    i32, u8, i8 = torch.int32, torch.uint8, torch.int8
    for m in (1, 64):
        x, order = t(m, k), t(n, dtype=i32)
        int4 = (t(rank, k // 2, dtype=u8), t(rank, k // 128), t(n, rank // 2, dtype=u8), t(n, rank // 128))
        yield "lowrank_linear", (x, t(rank, k), t(n - rank, rank), order, None)
        yield "swsc_linear", (x, t(n, 64), t(2048, dtype=u8), t(32, k), t(n, 32), t(2048), None, 1)
        yield "quant_linear", (x, t(n, k, dtype=i8), t(n, 1), None, None, 8, 0)
        yield "quant_linear", (x, t(n, k // 2, dtype=u8), t(n, k // 128), t(n, k // 128), None, 4, 128)
        if every or m == 1:
            yield "lowrank_linears", (x, *(t(rank, k), t(n - rank, rank), order, None) * 2)
            yield "quant_lowrank_linears", (x, *(*int4, None, None, None, None) * 3, 4, 128)
            yield "cur_linears", (x, *(t(rank, k), t(rank, rank), t(n, rank), None) * 3)
            yield "sliced_linears", (x, *(t(n, k), None) * 3)
            yield "quant_linears", (x, *(t(n, k // 2, dtype=u8), t(n, k // 128), t(n, k // 128), None) * 3, 4, 128)
            sharing = (t(64, k), t(2048, dtype=u8), t(32, k), t(n, 32), t(2048), None)
            yield "swsc_linears", (x, *sharing * 3)
            factors = (t(32, k // 2, dtype=u8), t(32, k // 128), t(n, 16, dtype=u8), t(n, 1))
            rest = (*factors, None, None, None, t(2048), None)
            outputs = (t(64, k // 2, dtype=u8), t(64, k // 128), t(2048, dtype=u8))
            yield "quant_swsc_linear", (x, *outputs, *rest, 0, 4, 128)
            yield "quant_swsc_linears", (x, *(*outputs, *rest) * 2, *[None] * 12, 0, 4, 128)
            if every:
                inputs = (t(n, 32, dtype=u8), t(n, 1), t(2048, dtype=u8))
                yield "quant_swsc_linear", (x, *inputs, *rest, 1, 4, 128)
        if every:
            yield "lowrank_linear", (x, t(rank, k), t(n, rank), None, t(n))
            yield "swsc_linear", (x, t(64, k), t(2048, dtype=u8), t(32, k), t(n, 32), t(2048), None, 0)
        if every or m == 1:
            yield "cur_linear", (x, t(rank, k), t(rank, rank), t(n, rank), None)
            yield "sliced_linear", (x, t(n, k), None, k // 2, n // 2)
            yield "quant_lowrank_linear", (x, *int4, None, None, None, None, 4, 128)
        offsets = t(n + 1, dtype=i32)
        yield "masked_linear", (x, t(n * k // 2), t(n, k // 8, dtype=u8), offsets, None, None, n, "bitmask", 0)
        yield "masked_linear", (x, t(n, k // 2), t(n, k // 8, dtype=u8), None, None, None, n, "2:4", 0)
        blocks = (t(n // 32, k // 256, dtype=u8), t(n // 32 + 1, dtype=i32), None, None, n, "block32", 0)
        yield "masked_linear", (x, t(n * k // 2048, 32, 32), *blocks)
        if every or m == 1:
            bits = (t(n * k // 2), t(n, k // 8, dtype=u8), offsets, None, None, n)
            yield "masked_linears", (x, *bits * 3, "bitmask", 0)
            yield "masked_linears", (x, *(t(n, k // 2), t(n, k // 8, dtype=u8), None, None, None, n) * 3, "2:4", 0)
            yield "masked_linears", (x, *(t(n * k // 2048, 32, 32), *blocks[:-2]) * 3, "block32", 0)
    yield "column_norms", (t(n, k),)
    yield "gram_accumulate_", (t(k, k, dtype=torch.float32), t(256, k))
    yield "kmeans_assign", (t(n, 256), t(64, 256))
    yield "kmeans_update", (t(n, 256), t(n, dtype=i32), 64)
    yield "sample_without_replacement", (t(n), 4, 0)
    yield "select_pivots", (t(n, 64), 2, "qr")
    yield "select_pivots", (t(n, 64), 2, "lu")
    state = [torch.empty(n) for _ in range(5)]
    state.insert(3, t(n, dtype=i32))
    yield "split_bregman_step_", (*state, 2, 0.1)
    adam = (2, 0.1, 1.0, 1.0, 1.0, 0.9, False, True, torch.empty(n), 0.99, 1e-8)
    yield "split_bregman_step_", (*state[:2], None, *state[3:], *adam, 16, t(n // 8, dtype=u8))


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    from tinycomp.triton_kernels import _stages

    ops.OPS  # noqa: B018
    launch, found = JITFunction.run, {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = (self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    Autotuner.do_bench = property(lambda self: lambda call, quantiles: (call(), [1.0] * 3)[1], lambda self, value: None)
    zeros_of, every = _stages.zeros_of, HOW_MANY == "every"
    for name, args in calls(getattr(torch, DTYPE), every):
        # All stages in one launch and, as in graphs, every stage in one of its own.
        for way in (zeros_of, lambda device: None) if every else (zeros_of,):
            _stages.zeros_of = way
            getattr(torch.ops.tinycomp_triton, name)(*args)
        for kernel_name, kernel in found.values():
            row = {"op": name, "kernel": kernel_name, "dtype": DTYPE}
            row |= {"warps": kernel.metadata.num_warps, "shared_bytes": kernel.metadata.shared}
            print(json.dumps(row | measured(kernel)), flush=True)
        found.clear()


if __name__ == "__main__":
    main()
