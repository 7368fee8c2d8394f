"""Triton backend of `swsc_linear`: outputs gather their centroid's product; inputs are summed by a one-hot product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import Base, one_hot_weight
from tinycomp.triton_kernels._stages import OneHot, Part, run_stages

# Inputs, clusters and channels per program, for more than 16 inputs.
SEGMENT_BLOCK = (16, 32, 64)


@triton.jit
def segment_sum_kernel(
    x_ptr,
    x_stride,
    labels_ptr,
    scales_ptr,
    sums_ptr,
    inputs,
    clusters,
    columns,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """sums[m, c] = sum of x[m, k] scales[k] over labels[k] = c: a product with a one-hot matrix, in a fixed order."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    sums = tl.zeros((BM, BC), tl.float32)
    for start in range(0, columns, BK):
        k = start + tl.arange(0, BK)
        x_inside = (m < inputs)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=x_inside, other=0.0)
        one_hot = one_hot_weight(labels_ptr, scales_ptr, c, k, columns, x_ptr.dtype.element_ty)
        sums = tl.dot(x, one_hot, sums, input_precision="ieee")
    inside = (m < inputs)[:, None] & (c < clusters)[None, :]
    tl.store(sums_ptr + m[:, None] * clusters + c[None, :], sums.to(x_ptr.dtype.element_ty), mask=inside)


def shared_inputs(sums: Part, down: Part, centres: Part, up: Part, apart: bool = False) -> None:
    """The products of a layer whose inputs share: `sums` has a `OneHot`, `centres` reads them and `up` adds to it.

    `apart`: a launch for each stage.
    """
    flat, one_hot = sums.x, sums.w
    assert isinstance(one_hot, OneHot)
    inputs, clusters = flat.shape[0], one_hot.clusters
    if inputs <= DECODE_INPUTS:
        stages = ([down, sums], [centres], [up])
        for run in [[stage] for stage in stages] if apart else [stages]:
            run_stages(*run)
        return
    bm, bc, bk = SEGMENT_BLOCK
    if clusters:
        torch.library.wrap_triton(segment_sum_kernel)[(triton.cdiv(inputs, bm), triton.cdiv(clusters, bc))](
            flat, flat.stride(0), one_hot.labels, one_hot.scales, sums.kept, inputs, clusters, flat.shape[1],
            BM=bm, BC=bc, BK=bk,
        )  # fmt: skip
    run_stages([down, centres], [up])


@kernel_op("swsc_linear")
def swsc_linear(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    b: Tensor,
    a: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    flat, clusters = rows_of(x), centroids.shape[axis]
    inputs = flat.shape[0]
    y = x.new_empty(*x.shape[:-1], a.shape[0])
    shared, z = x.new_empty(inputs, clusters), x.new_empty(inputs, b.shape[0])
    labels, scales, bias = labels.contiguous(), adjacent(scales), adjacent(bias)
    out, down = y.view(inputs, a.shape[0]), Part(flat, b, kept=z)
    if axis == 0:
        up = Part(z, a, out, base=Base(shared, labels, scales), bias=bias)
        run_stages([down, Part(flat, centroids, kept=shared)], [up])
        return y
    outputs = x.new_empty(inputs, a.shape[0])
    centres = Part(shared, centroids, kept=outputs)
    up = Part(z, a, out, base=Base(outputs), bias=bias)
    shared_inputs(Part(flat, OneHot(labels, scales, clusters), kept=shared), down, centres, up)
    return y
