"""Products that build on each other in one launch: the factors of a layer, or of layers that read the same input.

Programs draw tickets in order from a counter, so one that waits for an earlier stage only waits for programs that
already run: no deadlock, however few fit on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled

from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, configs, rows_of
from tinycomp.triton_kernels._product import PLAIN, Base, Rounded, product, product_tile

MOST_PARTS = 9


# fmt: off
@triton.jit
def stages_kernel(
    x1, x_stride1, w1, w_stride1, scales1, zeros1, groups1, y1, kept1, order1, bias1, rows1, columns1,
    x2, x_stride2, w2, w_stride2, scales2, zeros2, groups2, y2, kept2, order2, bias2, rows2, columns2,
    x3, x_stride3, w3, w_stride3, scales3, zeros3, groups3, y3, kept3, order3, bias3, rows3, columns3,
    x4, x_stride4, w4, w_stride4, scales4, zeros4, groups4, y4, kept4, order4, bias4, rows4, columns4,
    x5, x_stride5, w5, w_stride5, scales5, zeros5, groups5, y5, kept5, order5, bias5, rows5, columns5,
    x6, x_stride6, w6, w_stride6, scales6, zeros6, groups6, y6, kept6, order6, bias6, rows6, columns6,
    x7, x_stride7, w7, w_stride7, scales7, zeros7, groups7, y7, kept7, order7, bias7, rows7, columns7,
    x8, x_stride8, w8, w_stride8, scales8, zeros8, groups8, y8, kept8, order8, bias8, rows8, columns8,
    x9, x_stride9, w9, w_stride9, scales9, zeros9, groups9, y9, kept9, order9, bias9, rows9, columns9,
    base, base_stride, labels, label_scales, group_size, y_stride, counters, inputs, bucket,
    IN_FIRST: tl.constexpr, IN_SECOND: tl.constexpr, PARTS: tl.constexpr, STAGE: tl.constexpr,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """A tile of one of the products. They are in order of their stage: IN_FIRST, IN_SECOND, the rest of PARTS.

    STAGE >= 0: those of one stage. STAGE < 0: of all; `counters` are zeros that the last program leaves at zero:
    tickets drawn, tiles finished in the first and the second stage, programs that left. The last product adds `base`.
    """
    parts = (
        (x1, x_stride1, w1, w_stride1, scales1, zeros1, groups1, y1, kept1, order1, bias1, rows1, columns1),
        (x2, x_stride2, w2, w_stride2, scales2, zeros2, groups2, y2, kept2, order2, bias2, rows2, columns2),
        (x3, x_stride3, w3, w_stride3, scales3, zeros3, groups3, y3, kept3, order3, bias3, rows3, columns3),
        (x4, x_stride4, w4, w_stride4, scales4, zeros4, groups4, y4, kept4, order4, bias4, rows4, columns4),
        (x5, x_stride5, w5, w_stride5, scales5, zeros5, groups5, y5, kept5, order5, bias5, rows5, columns5),
        (x6, x_stride6, w6, w_stride6, scales6, zeros6, groups6, y6, kept6, order6, bias6, rows6, columns6),
        (x7, x_stride7, w7, w_stride7, scales7, zeros7, groups7, y7, kept7, order7, bias7, rows7, columns7),
        (x8, x_stride8, w8, w_stride8, scales8, zeros8, groups8, y8, kept8, order8, bias8, rows8, columns8),
        (x9, x_stride9, w9, w_stride9, scales9, zeros9, groups9, y9, kept9, order9, bias9, rows9, columns9),
    )
    m = tl.arange(0, BM).to(tl.int64)
    ticket = tl.atomic_add(counters, 1) if STAGE < 0 else tl.program_id(0)
    before, start, previous = 0, 0, 0
    for i in tl.static_range(PARTS):
        if i == IN_FIRST or i == IN_FIRST + IN_SECOND:
            previous = before - start
            start = before
        if STAGE < 0 or (i >= IN_FIRST) + (i >= IN_FIRST + IN_SECOND) == STAGE:
            x, x_stride, w, w_stride, scales, zeros, groups, y, kept, order, bias, rows, columns = parts[i]
            tiles = tl.cdiv(rows, BN)
            if (ticket >= before) & (ticket < before + tiles):
                if STAGE < 0 and i >= IN_FIRST:
                    finished = counters + 1 + (i >= IN_FIRST + IN_SECOND)
                    while tl.atomic_add(finished, 0, sem="acquire") < previous:
                        pass
                product_tile(
                    x, x_stride, w, w_stride, scales, zeros, groups, group_size, y, y_stride, kept, order, bias,
                    base if i == PARTS - 1 else None, base_stride, labels if i == PARTS - 1 else None,
                    label_scales if i == PARTS - 1 else None, m, ticket - before, inputs, rows, columns, BITS, BN, BK,
                )
                if STAGE < 0 and i < IN_FIRST + IN_SECOND:
                    tl.debug_barrier()  # the whole tile is written before it counts
                    tl.atomic_add(counters + 1 + (i >= IN_FIRST), 1, sem="release")
            before += tiles
    if STAGE < 0:  # noqa: SIM102 - compiled in or out
        if tl.atomic_add(counters + 3, 1) == tl.num_programs(0) - 1:
            tl.store(counters + tl.arange(0, 4), tl.zeros((4,), tl.int32))
# fmt: on


_KEY = ["bucket", *(f"{what}{i}" for i in range(1, MOST_PARTS + 1) for what in ("rows", "columns")), "STAGE"]
_KERNELS = {kind: triton.autotune(configs(kind), key=_KEY)(stages_kernel) for kind in ("decode", "decode-float32")}


class OneHot(NamedTuple):
    """A weight whose product sums inputs by label: row c holds 1, or scales_k, where labels_k is c."""

    labels: Tensor
    scales: Tensor | None
    clusters: int


class Part(NamedTuple):
    """One product of a launch: the arguments of `product`. At most 16 inputs may have a `OneHot`."""

    x: Tensor
    w: Tensor | OneHot
    y: Tensor | None = None
    rounded: Rounded = PLAIN
    kept: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None
    base: Base | None = None


# Of every device and stream that has launched.
COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def zeros_of(device: torch.device) -> Tensor | None:
    """Four zeros that every launch leaves at zero, one set per stream; None where a stage needs its own launch.

    That is while a graph is captured or a compiler traces (replays on several streams would share the zeros, and
    launches cost little in them), and on ROCm, where nobody has checked the order of the writes.
    """
    if is_wrap_triton_enabled() or torch.version.hip is not None:
        return None
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(device).cuda_stream
    if (device, stream) not in COUNTERS:
        COUNTERS[device, stream] = torch.zeros(4, dtype=torch.int32, device=device)
    return COUNTERS[device, stream]


def weight_args(p: Part) -> list[Any]:
    """Arguments of the kernel that describe a weight: w, w_stride, scales, zeros, groups."""
    if isinstance(p.w, OneHot):
        return [p.w.labels.contiguous(), None, adjacent(p.w.scales), None, 1]
    w, scales, zeros = rows_of(p.w), p.rounded.scales, p.rounded.zeros
    scales, zeros = (None if t is None else t.contiguous() for t in (scales, zeros))
    return [w, w.stride(0), scales, zeros, 1 if scales is None else scales.shape[1]]


def rows_in(p: Part) -> int:
    return p.w.clusters if isinstance(p.w, OneHot) else p.w.shape[0]


def run_stages(*stages: Sequence[Part]) -> None:
    """All products, each stage after the whole of the one before it: one launch for at most 16 inputs, else one each.

    Args:
        stages: at most three, together at most nine products of the same inputs and the same rounding; only the last
            product may have a base, and all y have the same stride.
    """
    parts = [part for stage in stages for part in stage]
    inputs = parts[0].x.shape[0]
    if inputs > DECODE_INPUTS:
        for p in parts:
            assert isinstance(p.w, Tensor)
            product(p.x, p.w, p.y, rounded=p.rounded, kept=p.kept, order=p.order, bias=p.bias, base=p.base)
        return
    if inputs == 0:
        return
    args: list[Any] = []
    for p in parts:
        args += [p.x, p.x.stride(0), *weight_args(p), p.y, p.kept, p.order, p.bias, rows_in(p), p.x.shape[1]]
    absent = [None, 0, None, 0, None, None, 1, None, None, None, None, 0, 0]
    args += absent * (MOST_PARTS - len(parts))
    base = parts[-1].base
    args += (
        [None, 0, None, None]
        if base is None
        else [base.values, base.values.stride(0), adjacent(base.labels), adjacent(base.scales)]
    )
    rounded, counters = parts[0].rounded, zeros_of(parts[0].x.device) if len(stages) > 1 else None
    args += [rounded.group_size or 1 << 30, next((p.y.stride(0) for p in parts if p.y is not None), 0), counters]
    args += [inputs, triton.next_power_of_2(inputs)]
    kernel = torch.library.wrap_triton(_KERNELS["decode-float32" if parts[0].x.dtype == torch.float32 else "decode"])
    for stage, run in enumerate([parts] if counters is not None else stages):
        rows = [rows_in(p) for p in run]
        if any(rows):
            kernel[lambda meta, rows=rows: (sum(triton.cdiv(n, meta["BN"]) for n in rows),)](
                *args,
                IN_FIRST=len(stages[0]),
                IN_SECOND=sum(len(s) for s in stages[1:2]),
                PARTS=len(parts),
                STAGE=-1 if counters is not None else stage,
                BITS=rounded.bits,
            )
