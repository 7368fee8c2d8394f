"""Triton backend of `kmeans_update`: sums as a product with a one-hot matrix, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op, rows_of

# Clusters, columns and points per step.
UPDATE_BLOCK = (16, 32, 32)


@triton.jit
def kmeans_update_kernel(
    points_ptr,
    stride,
    labels_ptr,
    centroids_ptr,
    counts_ptr,
    count,
    clusters,
    depth,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.zeros((BC, BD), tl.float32)
    members = tl.zeros((BC,), tl.int64)
    for start in range(0, count, BP):
        p = (start + tl.arange(0, BP)).to(tl.int64)
        label = tl.load(labels_ptr + p, mask=p < count, other=-1).to(tl.int32)
        one_hot = c[:, None] == label[None, :]
        inside = (p < count)[:, None] & (d < depth)[None, :]
        x = tl.load(points_ptr + p[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        sums = tl.dot(one_hot.to(tl.float32), x, sums, input_precision="ieee")
        members += tl.sum(one_hot.to(tl.int64), 1)
    mean = sums / tl.maximum(members, 1).to(tl.float32)[:, None]
    inside = (c < clusters)[:, None] & (d < depth)[None, :]
    at = centroids_ptr + c[:, None].to(tl.int64) * depth + d[None, :]
    tl.store(at, mean.to(centroids_ptr.dtype.element_ty), mask=inside)
    tl.store(counts_ptr + c, members, mask=(c < clusters) & (tl.program_id(1) == 0))


@kernel_op("kmeans_update")
def kmeans_update(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    points = rows_of(points)
    count, depth = points.shape
    centroids, counts = points.new_empty(k, depth), points.new_empty(k, dtype=torch.int64)
    bc, bd, bp = UPDATE_BLOCK
    torch.library.wrap_triton(kmeans_update_kernel)[(triton.cdiv(k, bc), triton.cdiv(max(depth, 1), bd))](
        points, points.stride(0), labels.contiguous(), centroids, counts, count, k, depth, BC=bc, BD=bd, BP=bp
    )
    return centroids, counts
