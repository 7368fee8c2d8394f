"""Triton backend of `swsc_linear`: outputs gather their centroid's product; inputs are summed by a one-hot product."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._group import with_signature
from tinycomp.triton_kernels._launch import DECODE_INPUTS, adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import Base, one_hot_weight
from tinycomp.triton_kernels._stages import OneHot, Part, run_stages
from tinycomp.triton_kernels.swsc_linears import Layer, shared_group

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


def shared_inputs(x: Tensor, layer: Layer) -> Tensor:
    """The outputs of a layer whose inputs share, and whose weights may be rounded."""
    flat, (on_centroids, on_b, on_a) = rows_of(x), layer.rounded
    # Packed columns are an even number of clusters, the last of which may be one that no label names.
    inputs, clusters = flat.shape[0], layer.centroids.shape[1] * (2 if on_centroids.bits == 4 else 1)
    y = x.new_empty(*x.shape[:-1], layer.a.shape[0])
    sums, z, centres = (x.new_empty(inputs, n) for n in (clusters, layer.b.shape[0], layer.a.shape[0]))
    labels, scales = layer.labels.contiguous(), adjacent(layer.scales)
    down = Part(flat, layer.b, None, on_b, z)
    shared = Part(sums, layer.centroids, None, on_centroids, centres)
    up = Part(z, layer.a, y.view(inputs, y.shape[-1]), on_a, bias=adjacent(layer.bias), base=Base(centres))
    if inputs <= DECODE_INPUTS:
        # All stages of rounded weights in one kernel spill registers on sm_80 in float32.
        stages = ([down, Part(flat, OneHot(labels, scales, clusters), kept=sums)], [shared], [up])
        for run in [[stage] for stage in stages] if on_b.bits and x.dtype == torch.float32 else [stages]:
            run_stages(*run)
        return y
    bm, bc, bk = SEGMENT_BLOCK
    if clusters:
        torch.library.wrap_triton(segment_sum_kernel)[(triton.cdiv(inputs, bm), triton.cdiv(clusters, bc))](
            flat, flat.stride(0), labels, scales, sums, inputs, clusters, flat.shape[1], BM=bm, BC=bc, BK=bk
        )
    run_stages([down, shared], [up])
    return y


@kernel_op("swsc_linear")
@with_signature("swsc_linear")
def swsc_linear(x: Tensor, *args: Any) -> Tensor:
    layer = Layer(*args[:6])
    return shared_inputs(x, layer) if args[6] else shared_group(x, [layer])
