"""Triton backend of `kmeans_assign`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op, rows_of

# Points, centroids and dimensions per step.
ASSIGN_BLOCK = (32, 32, 16)


@triton.jit
def kmeans_assign_kernel(
    points_ptr,
    p_stride,
    centroids_ptr,
    c_stride,
    labels_ptr,
    distances_ptr,
    count,
    clusters,
    depth,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores |mu|² - 2 x·mu in float32, the lowest label on a tie; then the distance from the difference itself."""
    p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    best = tl.full((BP,), float("inf"), tl.float32)
    label = tl.zeros((BP,), tl.int32)
    for start in range(0, clusters, BC):
        c = start + tl.arange(0, BC)
        dots = tl.zeros((BP, BC), tl.float32)
        sizes = tl.zeros((BC,), tl.float32)
        for at in range(0, depth, BD):
            d = at + tl.arange(0, BD)
            x_inside = (p < count)[:, None] & (d < depth)[None, :]
            x = tl.load(points_ptr + p[:, None] * p_stride + d[None, :], mask=x_inside, other=0.0).to(tl.float32)
            mu_inside = (d < depth)[:, None] & (c < clusters)[None, :]
            mu_at = centroids_ptr + c[None, :].to(tl.int64) * c_stride + d[:, None]
            mu = tl.load(mu_at, mask=mu_inside, other=0.0).to(tl.float32)
            dots = tl.dot(x, mu, dots, input_precision="ieee")
            sizes += tl.sum(mu * mu, 0)
        score = tl.where((c < clusters)[None, :], sizes[None, :] - 2 * dots, float("inf"))
        lowest = tl.min(score, 1)
        first = tl.min(tl.where(score == lowest[:, None], c[None, :], clusters), 1)
        label = tl.where(lowest < best, first, label)
        best = tl.minimum(lowest, best)
    distance = tl.zeros((BP,), tl.float32)
    for at in range(0, depth, BD):
        d = at + tl.arange(0, BD)
        inside = (p < count)[:, None] & (d < depth)[None, :]
        x = tl.load(points_ptr + p[:, None] * p_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        mu_at = centroids_ptr + label[:, None].to(tl.int64) * c_stride + d[None, :]
        difference = x - tl.load(mu_at, mask=inside, other=0.0).to(tl.float32)
        distance += tl.sum(difference * difference, 1)
    tl.store(labels_ptr + p, label, mask=p < count)
    tl.store(distances_ptr + p, distance, mask=p < count)


@kernel_op("kmeans_assign")
def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    points, centroids = rows_of(points), rows_of(centroids)
    count, depth = points.shape
    labels = points.new_empty(count, dtype=torch.int32)
    distances = points.new_empty(count, dtype=torch.float32)
    if count:
        bp, bc, bd = ASSIGN_BLOCK
        torch.library.wrap_triton(kmeans_assign_kernel)[(triton.cdiv(count, bp),)](
            points,
            points.stride(0),
            centroids,
            centroids.stride(0),
            labels,
            distances,
            count,
            centroids.shape[0],
            depth,
            BP=bp,
            BC=bc,
            BD=bd,
        )
    return labels, distances
