"""Lower bounds of the CUDA kernels' time from bytes, FLOPs and launch shapes. MODELLED: nothing here was measured.

    bound = max(FLOPs / peak, bytes / bandwidth) / wave efficiency + launches * launch time

A bound names what a kernel cannot be faster than on nominal data-sheet peaks; it is no prediction and no result.
"""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

BUDGETS = json.loads((Path(__file__).parent.parent / "csrc" / "cuda" / "budgets.json").read_text())
LAUNCH_US = 3.0  # assumed
# out_features, in_features of the linear layers of one Llama-3-8B block
LLAMA_3_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}


@dataclass(frozen=True)
class Gpu:
    """Nominal numbers of a data sheet: dense bfloat16 tensor throughput, memory bandwidth, one processor's limits.

    `nvidia` is its name in nvidia-matmul-heuristics. `mma_share` is what mma.sync, the only tensor-core instruction of
    sm_80, can reach of that throughput: 0.63 on Hopper was measured by others (arXiv 2402.13499); 0.25 on Blackwell is
    ASSUMED (the FLOPs per clock and processor of sm_80, the rest being reserved to tcgen05).
    """

    processors: int
    tflops: float
    gb_s: float
    shared_bytes: int
    warps: int
    nvidia: str
    mma_share: float = 1.0


GPUS = {
    "A100": Gpu(108, 312, 2039, 164 << 10, 64, "A100_SXM_80GB"),
    "L40S": Gpu(142, 362, 864, 100 << 10, 48, "L40S"),
    "H100": Gpu(132, 989, 3350, 228 << 10, 64, "H100_SXM", 0.63),
    "H200": Gpu(132, 989, 4800, 228 << 10, 64, "H200_SXM", 0.63),
    "B200": Gpu(148, 2250, 8000, 228 << 10, 64, "B200", 0.25),
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
    """What csrc/cuda/config.h picks for a chain of products, and linear_host.cuh for packed weights."""
    packed = any(p.bits < 16 for p in products)
    if products[0].inputs <= 16:
        tiles = 1 if packed or any(math.ceil(p.rows / 16) < 2 * processors for p in products) else 2
        items = sum(math.ceil(p.rows / (8 * tiles)) for p in products)
        if len(products) == 1:
            return [Launch("product_decode", items, products)]
        return [Launch("chain2_decode", min(items, (3 if tiles == 1 else 2) * processors), products)]
    found = []
    for p in products:
        large = not packed and math.ceil(p.inputs / 128) * math.ceil(p.rows / 128) >= processors
        side = 128 if large else 64
        found.append(Launch("product_tiles", math.ceil(p.inputs / side) * math.ceil(p.rows / side), (p,)))
    return found


def blocks_per_processor(kernel: str, gpu: Gpu) -> int:
    """Resident blocks within the kernel's budget of registers and shared memory (1 KB of a block is the system's)."""
    budget = BUDGETS[kernel]
    by_registers = 65536 // (math.ceil(budget["registers"] / 8) * 8 * budget["threads"])
    shared = budget["static_shared_bytes"] + budget["dynamic_shared_bytes"] + 1024
    return min(by_registers, gpu.shared_bytes // shared)


def bound_us(products: tuple[Product, ...], gpu: Gpu, share: float = 1.0) -> tuple[float, str, float]:
    """Microseconds no chain of these kernels can beat, what limits it, and the waves of its largest launch.

    `share`: of the tensor-core peak that the instructions in use can reach.
    """
    total, limits, most = 0.0, [], 0.0
    for launch in launches(products, gpu.processors):
        compute = sum(p.flops for p in launch.products) / (share * gpu.tflops) / 1e6
        memory = sum(p.bytes for p in launch.products) / gpu.gb_s / 1e3
        waves = launch.blocks / (blocks_per_processor(launch.kernel, gpu) * gpu.processors)
        # Blocks of a chain draw their work as they become free: no last wave waits.
        tail = waves > 1 and launch.kernel != "chain2_decode"
        efficiency = waves / math.ceil(waves) if tail else min(1.0, launch.blocks / gpu.processors)
        total += max(compute, memory) / efficiency + LAUNCH_US
        limits.append("compute" if compute > memory else "bytes")
        most = max(most, waves)
    return total, "+".join(dict.fromkeys(limits)), most


def group_us(chains: tuple[tuple[Product, ...], ...], gpu: Gpu) -> float:
    """Bound of chains that share few inputs, in one launch of `group_decode`: their bytes, and one launch."""
    return sum(p.bytes for chain in chains for p in chain) / gpu.gb_s / 1e3 + LAUNCH_US


def pivoted_rank(rows: int, columns: int, ratio: float) -> int:
    """Largest rank whose pivoted storage r (rows + columns - r) keeps at most `ratio` of the parameters."""
    total = rows + columns
    return int((total - math.sqrt(total * total - 4 * ratio * rows * columns)) / 2)


def library_us(product: Product, gpu: Gpu) -> float | None:
    """What NVIDIA's model of its libraries expects of a dense bfloat16 product; None if it is not installed."""
    if importlib.util.find_spec("nvMatmulHeuristics") is None:
        return None
    import nvMatmulHeuristics as nv

    flags = nv.NvMatmulHeuristicsFlags.PERF_MODEL_BASED_AUTO_TUNING
    device = nv.NvMatmulHeuristicsNvidiaGpu[gpu.nvidia]
    model = nv.NvMatmulHeuristicsInterfaceEx(nv.NvMatmulHeuristicsTarget.GENERIC, flags=flags, gpu=device)
    layout = nv.NvMatmulHeuristicsMatmulLayout.NT_ROW_MAJOR
    problem = model.makeNvMatmulHeuristicsProblem(product.inputs, product.rows, product.columns, layout)
    found = model.get(problem, 4, precision="TST")
    return min(f["runtime"] for f in found) * 1e6 if found else None


def table(name: str, ratio: float = 0.5) -> str:
    """The bounds for Llama-3-8B shapes, every line of it modelled."""
    gpu = GPUS[name]
    lines = [
        f"modelled, unmeasured: {name}, nominal peaks {gpu.tflops} TFLOP/s and {gpu.gb_s} GB/s, low rank keeps {ratio}",
        f"{'layer':9} {'rows':>5} {'kernel':14} {'MB':>6} {'GFLOP':>7} {'regs':>4} {'shared KB':>9} {'occupancy':>9} "
        f"{'blocks':>6} {'waves':>5} {'limit':>13} {'bound us':>8} {'mma.sync us':>11} | "
        f"{'dense us':>8} {'NVIDIA us':>9} {'int4 us':>7}",
    ]
    for layer, (rows, columns) in LLAMA_3_8B.items():
        rank = pivoted_rank(rows, columns, ratio)
        for inputs in (1, 16, 512, 2048):
            chain = (Product(inputs, columns, rank), Product(inputs, rank, rows - rank))
            time, limit, waves = bound_us(chain, gpu)
            with_mma, _, _ = bound_us(chain, gpu, gpu.mma_share)
            whole = Product(inputs, columns, rows)
            dense, _, _ = bound_us((whole,), gpu)
            int4, _, _ = bound_us((whole._replace(bits=4.125),), gpu)
            library = library_us(whole, gpu)
            found = launches(chain, gpu.processors)
            kernel, budget = found[0].kernel, BUDGETS[found[0].kernel]
            shared = (budget["static_shared_bytes"] + budget["dynamic_shared_bytes"]) / 1024
            occupancy = blocks_per_processor(kernel, gpu) * budget["threads"] / 32 / gpu.warps
            megabytes, flops = sum(p.bytes for p in chain) / 1e6, sum(p.flops for p in chain) / 1e9
            lines.append(
                f"{layer:9} {inputs:5} {kernel:14} {megabytes:6.1f} {flops:7.2f} {budget['registers']:4} {shared:9.1f} "
                f"{occupancy:9.0%} {max(launch.blocks for launch in found):6} {waves:5.2f} {limit:>13} {time:8.1f} "
                f"{with_mma:11.1f} | "
                f"{dense:8.1f} {'-' if library is None else f'{library:.1f}':>9} {int4:7.1f}"
            )

    def chain_of(layer: str) -> tuple[Product, ...]:
        rows, columns = LLAMA_3_8B[layer]
        rank = pivoted_rank(rows, columns, ratio)
        return Product(1, columns, rank), Product(1, rank, rows - rank)

    for label, layers in (("q, k, v", ("q, o", "k, v", "k, v")), ("gate, up", ("gate, up",) * 2)):
        chains = tuple(chain_of(layer) for layer in layers)
        alone = sum(bound_us(chain, gpu)[0] for chain in chains)
        lines.append(f"{label} of 1 row: {group_us(chains, gpu):.1f} us in one launch, {alone:.1f} us one by one")
    return "\n".join(
        [
            *lines,
            f"mma.sync us: the bound if mma.sync reaches {gpu.mma_share} of the peak; the rest needs wgmma or tcgen05.",
            "Registers and shared memory: the most that the kernels may take, as tested. dense us, int4 us: bounds of",
            "the same kind. NVIDIA us: dense bfloat16 by nvidia-matmul-heuristics (- if not installed).",
            "modelled, unmeasured: no number above is a result",
        ]
    )


def comparison(rows: list[dict[str, Any]]) -> str:
    """A table of measurements of bench/gpu.py: measured time, modelled bound, and dense time beside each other."""
    dense = {(r["name"], r["layer"], r["rows"]): r["us"] for r in rows if r["case"] == "dense F.linear"}
    lines = [
        f"{'device':20} {'layer':9} {'rows':>5} {'case':26} {'measured us':>11} {'p20..p80':>15} "
        f"{'modelled bound us':>17} {'of bound':>8} {'x dense':>7}"
    ]
    for r in rows:
        bound, base = r.get("modelled_bound_us"), dense.get((r["name"], r["layer"], r["rows"]))
        spread = f"{r['us_p20']:.1f}..{r['us_p80']:.1f}"
        shown, share = ("-", "-") if bound is None else (f"{bound:.1f}", f"{bound / r['us']:.0%}")
        gain = "-" if base is None else f"{base / r['us']:.2f}"
        lines.append(
            f"{r['name']:20} {r['layer']:9} {r['rows']:5} {r['case']:26} {r['us']:11.1f} {spread:>15} "
            f"{shown:>17} {share:>8} {gain:>7}"
        )
    return "\n".join([*lines, "measured on the device named; bound: modelled from bytes, FLOPs and launches"])
