"""Lower bounds of the CUDA kernels' time from bytes, FLOPs and launch shapes. MODELLED: nothing here was measured.

    bound = max(FLOPs / peak, bytes / bandwidth) / wave efficiency + launches * launch time

A bound names what a kernel cannot be faster than on nominal data-sheet peaks; it is no prediction and no result.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BUDGETS = json.loads((Path(__file__).parent.parent / "csrc" / "cuda" / "budgets.json").read_text())
LAUNCH_US = 3.0  # assumed
# out_features, in_features of the linear layers of one Llama-3-8B block
LLAMA_3_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}


@dataclass(frozen=True)
class Gpu:
    """Nominal numbers of a data sheet: dense bfloat16 tensor throughput, memory bandwidth, one processor's memory."""

    processors: int
    tflops: float
    gb_s: float
    shared_bytes: int


GPUS = {
    "A100": Gpu(108, 312, 2039, 164 << 10),
    "L40S": Gpu(142, 362, 864, 100 << 10),
    "H100": Gpu(132, 989, 3350, 228 << 10),
    "H200": Gpu(132, 989, 4800, 228 << 10),
    "B200": Gpu(148, 2250, 8000, 228 << 10),
}


class Product(NamedTuple):
    """y (inputs, rows) = x (inputs, columns) wᵀ, `bits` per stored weight."""

    inputs: int
    columns: int
    rows: int
    bits: float = 16

    @property
    def flops(self) -> int:
        return 2 * self.inputs * self.columns * self.rows

    @property
    def bytes(self) -> float:
        return self.columns * self.rows * self.bits / 8 + 2 * self.inputs * (self.columns + self.rows)


class Launch(NamedTuple):
    """One launch: kernel family, blocks, what it computes."""

    kernel: str
    blocks: int
    products: tuple[Product, ...]


def launches(products: tuple[Product, ...], processors: int) -> list[Launch]:
    """What csrc/cuda/config.h picks for a chain of products."""
    if products[0].inputs <= 16:
        tiles = 1 if any(math.ceil(p.rows / 16) < 2 * processors for p in products) else 2
        items = sum(math.ceil(p.rows / (8 * tiles)) for p in products)
        if len(products) == 1:
            return [Launch("product_decode", items, products)]
        return [Launch("chain2_decode", min(items, (3 if tiles == 1 else 2) * processors), products)]
    found = []
    for p in products:
        large = math.ceil(p.inputs / 128) * math.ceil(p.rows / 128) >= processors
        side = 128 if large else 64
        found.append(Launch("product_tiles", math.ceil(p.inputs / side) * math.ceil(p.rows / side), (p,)))
    return found


def blocks_per_processor(kernel: str, gpu: Gpu) -> int:
    """Resident blocks within the kernel's budget of registers and shared memory (1 KB of a block is the system's)."""
    budget = BUDGETS[kernel]
    by_registers = 65536 // (math.ceil(budget["registers"] / 8) * 8 * budget["threads"])
    shared = budget["static_shared_bytes"] + budget["dynamic_shared_bytes"] + 1024
    return min(by_registers, gpu.shared_bytes // shared)


def bound_us(products: tuple[Product, ...], gpu: Gpu) -> tuple[float, str, float]:
    """Microseconds no chain of these kernels can beat, what limits it, and the waves of its largest launch."""
    total, limits, most = 0.0, [], 0.0
    for launch in launches(products, gpu.processors):
        compute = sum(p.flops for p in launch.products) / gpu.tflops / 1e6
        memory = sum(p.bytes for p in launch.products) / gpu.gb_s / 1e3
        waves = launch.blocks / (blocks_per_processor(launch.kernel, gpu) * gpu.processors)
        # Blocks of a chain draw their work as they become free: no last wave waits.
        tail = waves > 1 and launch.kernel != "chain2_decode"
        efficiency = waves / math.ceil(waves) if tail else min(1.0, launch.blocks / gpu.processors)
        total += max(compute, memory) / efficiency + LAUNCH_US
        limits.append("compute" if compute > memory else "bytes")
        most = max(most, waves)
    return total, "+".join(dict.fromkeys(limits)), most


def pivoted_rank(rows: int, columns: int, ratio: float) -> int:
    """Largest rank whose pivoted storage r (rows + columns - r) keeps at most `ratio` of the parameters."""
    total = rows + columns
    return int((total - math.sqrt(total * total - 4 * ratio * rows * columns)) / 2)


def table(name: str, ratio: float = 0.5) -> str:
    """The bounds for Llama-3-8B shapes, every line of it modelled."""
    gpu = GPUS[name]
    lines = [
        f"modelled, unmeasured: {name}, nominal peaks {gpu.tflops} TFLOP/s and {gpu.gb_s} GB/s, low rank keeps {ratio}",
        f"{'layer':9} {'rows':>5} {'kernel':15} {'MB':>7} {'GFLOP':>8} {'blocks':>7} {'waves':>6} {'limit':>13} "
        f"{'bound us':>9} {'dense us':>9} {'int4 us':>8}",
    ]
    for layer, (rows, columns) in LLAMA_3_8B.items():
        rank = pivoted_rank(rows, columns, ratio)
        for inputs in (1, 16, 512, 2048):
            chain = (Product(inputs, columns, rank), Product(inputs, rank, rows - rank))
            time, limit, waves = bound_us(chain, gpu)
            dense, _, _ = bound_us((Product(inputs, columns, rows),), gpu)
            int4, _, _ = bound_us((Product(inputs, columns, rows, 4.5),), gpu)
            found = launches(chain, gpu.processors)
            blocks = max(launch.blocks for launch in found)
            megabytes, flops = sum(p.bytes for p in chain) / 1e6, sum(p.flops for p in chain) / 1e9
            lines.append(
                f"{layer:9} {inputs:5} {found[0].kernel:15} {megabytes:7.1f} {flops:8.2f} "
                f"{blocks:7} {waves:6.2f} {limit:>13} {time:9.1f} {dense:9.1f} {int4:8.1f}"
            )
    return "\n".join([*lines, "modelled, unmeasured: dense and int4 are bounds of the same kind, not of any library"])
