"""Triton backend of `swsc_linears`: for few inputs one launch for all layers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, configs, kernel_op, rows_of
from tinycomp.triton_kernels._product import Base, product, product_tile
from tinycomp.triton_kernels._stages import zeros_of

LAYERS = 3


# fmt: off
@triton.jit
def shared_group_kernel(
    x, x_stride,
    c1, c_stride1, b1, b_stride1, a1, a_stride1, sums1, z1, y1, labels1, scales1, bias1, clusters1, rank1, rows1,
    c2, c_stride2, b2, b_stride2, a2, a_stride2, sums2, z2, y2, labels2, scales2, bias2, clusters2, rank2, rows2,
    c3, c_stride3, b3, b_stride3, a3, a_stride3, sums3, z3, y3, labels3, scales3, bias3, clusters3, rank3, rows3,
    columns, y_stride, counters, inputs, bucket,
    LAYERS: tl.constexpr, STAGE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """A tile: of every layer's products with centroids and with b (stage 0), or of its outputs (stage 1).

    STAGE < 0: of both, with `counters` as in `stages_kernel`.
    """
    layers = (
        (c1, c_stride1, b1, b_stride1, a1, a_stride1, sums1, z1, y1, labels1, scales1, bias1, clusters1, rank1, rows1),
        (c2, c_stride2, b2, b_stride2, a2, a_stride2, sums2, z2, y2, labels2, scales2, bias2, clusters2, rank2, rows2),
        (c3, c_stride3, b3, b_stride3, a3, a_stride3, sums3, z3, y3, labels3, scales3, bias3, clusters3, rank3, rows3),
    )
    m = tl.arange(0, BM).to(tl.int64)
    ticket = tl.atomic_add(counters, 1) if STAGE < 0 else tl.program_id(0)
    before = 0
    if STAGE <= 0:
        for i in tl.static_range(2 * LAYERS):
            c, c_stride, b, b_stride, _, _, sums, z, _, _, _, _, clusters, rank, _ = layers[i // 2]
            w, w_stride, kept, made = c, c_stride, sums, clusters
            if i % 2 == 1:
                w, w_stride, kept, made = b, b_stride, z, rank
            tiles = tl.cdiv(made, BN)
            if (ticket >= before) & (ticket < before + tiles):
                product_tile(
                    x, x_stride, w, w_stride, None, None, 1, 1, None, y_stride, kept, None, None, None, 0, None, None,
                    m, ticket - before, inputs, made, columns, 0, BN, BK,
                )
                if STAGE < 0:
                    tl.debug_barrier()  # the whole tile is written before it counts
                    tl.atomic_add(counters + 1, 1, sem="release")
            before += tiles
    first = before
    if STAGE != 0:
        for i in tl.static_range(LAYERS):
            _, _, _, _, a, a_stride, sums, z, y, labels, scales, bias, clusters, rank, rows = layers[i]
            tiles = tl.cdiv(rows, BN)
            if (ticket >= before) & (ticket < before + tiles):
                if STAGE < 0:
                    while tl.atomic_add(counters + 1, 0, sem="acquire") < first:
                        pass
                product_tile(
                    z, rank, a, a_stride, None, None, 1, 1, y, y_stride, None, None, bias, sums, clusters, labels,
                    scales, m, ticket - before, inputs, rows, rank, 0, BN, BK,
                )
            before += tiles
    if STAGE < 0:  # noqa: SIM102 - compiled in or out
        if tl.atomic_add(counters + 3, 1) == tl.num_programs(0) - 1:
            tl.store(counters + tl.arange(0, 4), tl.zeros((4,), tl.int32))
# fmt: on


_KEY = ["bucket", "columns", *(f"{what}{i}" for i in (1, 2, 3) for what in ("clusters", "rank", "rows")), "STAGE"]
_KERNELS = {
    kind: triton.autotune(configs(kind), key=_KEY)(shared_group_kernel) for kind in ("decode", "decode-float32")
}


@kernel_op("swsc_linears")
@with_signature("swsc_linears")
def swsc_linears(x: Tensor, *args: Any) -> Tensor:
    flat, parts = rows_of(x), [args[i : i + 6] for i in (0, 6, 12) if args[i] is not None]
    inputs, features = flat.shape[0], [a.shape[0] for _, _, _, a, _, _ in parts]
    y = x.new_empty(*x.shape[:-1], sum(features))
    if inputs == 0:
        return y
    outputs = y.view(inputs, sum(features)).split(features, 1)
    found: list[Any] = []
    for (centroids, labels, b, a, scales, bias), out in zip(parts, outputs, strict=True):
        sums, z = (x.new_empty(inputs, w.shape[0]) for w in (centroids, b))
        labels, scales, bias = labels.contiguous(), adjacent(scales), adjacent(bias)
        if inputs > DECODE_INPUTS:
            product(flat, centroids, None, kept=sums)
            product(flat, b, None, kept=z)
            product(z, a, out, bias=bias, base=Base(sums, labels, scales))
            continue
        weights = [rows_of(w) for w in (centroids, b, a)]
        found += [v for w in weights for v in (w, w.stride(0))]
        found += [sums, z, out, labels, scales, bias, centroids.shape[0], b.shape[0], a.shape[0]]
    if not found:
        return y
    found += [None, 0, None, 0, None, 0, *[None] * 6, 0, 0, 0] * (LAYERS - len(parts))
    counters = zeros_of(x.device)
    kernel = torch.library.wrap_triton(_KERNELS["decode-float32" if x.dtype == torch.float32 else "decode"])
    made = [w.shape[0] for centroids, _, b, *_ in parts for w in (centroids, b)]
    for stage, rows in enumerate([made + features] if counters is not None else [made, features]):
        if any(rows):
            kernel[lambda meta, rows=rows: (sum(triton.cdiv(n, meta["BN"]) for n in rows),)](
                flat, flat.stride(0), *found, x.shape[-1], sum(features), counters, inputs,
                triton.next_power_of_2(inputs), LAYERS=len(parts), STAGE=-1 if counters is not None else stage,
            )  # fmt: skip
    return y
