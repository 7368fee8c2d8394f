"""Triton backend of `swsc_linears`: for few inputs one launch for all layers, whose weights may be rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels import _stages
from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, configs, kernel_op, rows_of
from tinycomp.triton_kernels._product import PLAIN, Base, Rounded, product_tile
from tinycomp.triton_kernels._stages import Part, rows_in, weight_args

LAYERS = 3


# fmt: off
@triton.jit
def shared_group_kernel(
    x, x_stride,
    c1, c_stride1, c_scales1, c_zeros1, c_groups1, b1, b_stride1, b_scales1, b_zeros1, b_groups1,
    a1, a_stride1, a_scales1, a_zeros1, a_groups1, sums1, z1, y1, labels1, scales1, bias1, clusters1, rank1, rows1,
    c2, c_stride2, c_scales2, c_zeros2, c_groups2, b2, b_stride2, b_scales2, b_zeros2, b_groups2,
    a2, a_stride2, a_scales2, a_zeros2, a_groups2, sums2, z2, y2, labels2, scales2, bias2, clusters2, rank2, rows2,
    c3, c_stride3, c_scales3, c_zeros3, c_groups3, b3, b_stride3, b_scales3, b_zeros3, b_groups3,
    a3, a_stride3, a_scales3, a_zeros3, a_groups3, sums3, z3, y3, labels3, scales3, bias3, clusters3, rank3, rows3,
    columns, group_size, y_stride, counters, inputs, bucket,
    LAYERS: tl.constexpr, STAGE: tl.constexpr, BITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """A tile: of every layer's products with centroids and with b (stage 0), or of its outputs (stage 1).

    STAGE < 0: of both, with `counters` as in `stages_kernel`.
    """
    readers = (
        (c1, c_stride1, c_scales1, c_zeros1, c_groups1, sums1, clusters1),
        (b1, b_stride1, b_scales1, b_zeros1, b_groups1, z1, rank1),
        (c2, c_stride2, c_scales2, c_zeros2, c_groups2, sums2, clusters2),
        (b2, b_stride2, b_scales2, b_zeros2, b_groups2, z2, rank2),
        (c3, c_stride3, c_scales3, c_zeros3, c_groups3, sums3, clusters3),
        (b3, b_stride3, b_scales3, b_zeros3, b_groups3, z3, rank3),
    )
    layers = (
        (a1, a_stride1, a_scales1, a_zeros1, a_groups1, sums1, z1, y1, labels1, scales1, bias1,
         clusters1, rank1, rows1),
        (a2, a_stride2, a_scales2, a_zeros2, a_groups2, sums2, z2, y2, labels2, scales2, bias2,
         clusters2, rank2, rows2),
        (a3, a_stride3, a_scales3, a_zeros3, a_groups3, sums3, z3, y3, labels3, scales3, bias3,
         clusters3, rank3, rows3),
    )
    m = tl.arange(0, BM).to(tl.int64)
    ticket = tl.atomic_add(counters, 1) if STAGE < 0 else tl.program_id(0)
    before = 0
    if STAGE <= 0:
        for i in tl.static_range(2 * LAYERS):
            w, w_stride, w_scales, w_zeros, groups, kept, made = readers[i]
            tiles = tl.cdiv(made, BN)
            if (ticket >= before) & (ticket < before + tiles):
                product_tile(
                    x, x_stride, w, w_stride, w_scales, w_zeros, groups, group_size, None, y_stride, kept, None, None,
                    None, 0, None, None, m, ticket - before, inputs, made, columns, BITS, BN, BK,
                )
                if STAGE < 0:
                    tl.debug_barrier()  # the whole tile is written before it counts
                    tl.atomic_add(counters + 1, 1, sem="release")
            before += tiles
    first = before
    if STAGE != 0:
        for i in tl.static_range(LAYERS):
            a, a_stride, a_scales, a_zeros, groups, sums, z, y, labels, scales, bias, clusters, rank, rows = layers[i]
            tiles = tl.cdiv(rows, BN)
            if (ticket >= before) & (ticket < before + tiles):
                if STAGE < 0:
                    while tl.atomic_add(counters + 1, 0, sem="acquire") < first:
                        pass
                product_tile(
                    z, rank, a, a_stride, a_scales, a_zeros, groups, group_size, y, y_stride, None, None, bias,
                    sums, clusters, labels, scales, m, ticket - before, inputs, rows, rank, BITS, BN, BK,
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


class Layer(NamedTuple):
    """Outputs that share centroids: c, b and a may be rounded."""

    centroids: Tensor
    labels: Tensor
    b: Tensor
    a: Tensor
    scales: Tensor | None
    bias: Tensor | None
    rounded: tuple[Rounded, Rounded, Rounded] = (PLAIN, PLAIN, PLAIN)


def shared_group(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The outputs of one to three layers, rounded alike, beside each other."""
    flat, features = rows_of(x), [layer.a.shape[0] for layer in layers]
    inputs = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], sum(features))
    products = []
    for layer, out in zip(layers, y.view(inputs, sum(features)).split(features, 1), strict=True):
        sums, z = (x.new_empty(inputs, w.shape[0]) for w in (layer.centroids, layer.b))
        base = Base(sums, layer.labels.contiguous(), adjacent(layer.scales))
        on_centroids, on_b, on_a = layer.rounded
        products.append(
            (
                Part(flat, layer.centroids, None, on_centroids, sums),
                Part(flat, layer.b, None, on_b, z),
                Part(z, layer.a, out, on_a, bias=adjacent(layer.bias), base=base),
            )
        )
    if inputs > DECODE_INPUTS:
        for parts in products:
            _stages.run_stages(parts[:2], parts[2:])
    elif inputs and layers[0].rounded[0].bits and x.dtype == torch.float32:
        for parts in products:  # all of it in one kernel spills registers on sm_80
            _launch([parts], None)
    elif inputs:
        _launch(products, _stages.zeros_of(x.device))
    return y


def _launch(products: Sequence[tuple[Part, Part, Part]], counters: Tensor | None) -> None:
    """The products of layers, in one launch with `counters`, otherwise in one for each stage."""
    args: list[Any] = []
    for parts in products:
        centroids, b, a = parts
        assert a.base is not None
        args += [v for p in parts for v in weight_args(p)]
        args += [centroids.kept, b.kept, a.y, a.base.labels, a.base.scales, a.bias, *(rows_in(p) for p in parts)]
    args += [*[None, 0, None, None, 1] * 3, *[None] * 6, 0, 0, 0] * (LAYERS - len(products))
    first, out = products[0][0], products[0][2].y
    assert out is not None
    x, inputs, kind = first.x, first.x.shape[0], "decode-float32" if first.x.dtype == torch.float32 else "decode"
    args += [x.shape[1], first.rounded.group_size or 1 << 30, out.stride(0), counters, inputs]
    kernel = torch.library.wrap_triton(_KERNELS[kind])
    made = [rows_in(p) for *readers, _ in products for p in readers]
    features = [rows_in(parts[2]) for parts in products]
    for stage, rows in enumerate([made + features] if counters is not None else [made, features]):
        if any(rows):
            kernel[lambda meta, rows=rows: (sum(triton.cdiv(n, meta["BN"]) for n in rows),)](
                x, x.stride(0), *args, triton.next_power_of_2(inputs), LAYERS=len(products),
                STAGE=-1 if counters is not None else stage, BITS=first.rounded.bits,
            )  # fmt: skip


@kernel_op("swsc_linears")
@with_signature("swsc_linears")
def swsc_linears(x: Tensor, *args: Any) -> Tensor:
    return shared_group(x, [Layer(*args[i : i + 6]) for i in (0, 6, 12) if args[i] is not None])
