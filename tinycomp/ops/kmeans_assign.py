"""Nearest centroid of each point."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "kmeans_assign"


def kmeans_assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Label each point with its nearest centroid; the lowest label wins a tie.

    labels_i = argmin_c (|μ_c|² - 2 x_i·μ_c);  squared_distance_i = |x_i - μ_{labels_i}|², from the difference itself.
    16-bit inputs are widened to float32 first; float64 inputs are compared in float64.

    Args:
        points: (n, d) floating.
        centroids: (k, d), the dtype of points, k at least 1.

    Returns:
        labels int32 (n,), squared_distance float32 (n,).

    Raises:
        ValueError: shapes do not fit or there is no centroid.
        TypeError: dtypes differ or are not supported.

    Cost: 2 n k d FLOPs. Not differentiable.
    """
    return _call(points, centroids)


def _check(points: Tensor, centroids: Tensor) -> None:
    _checks.tensor(_NAME, "points", points)
    _checks.shaped(_NAME, "points", points, (None, None), points)
    _checks.shaped(_NAME, "centroids", centroids, (None, points.shape[1]), points)
    if centroids.shape[0] == 0:
        raise ValueError(f"{_NAME}: centroids has 0 rows, allowed at least 1; pass some")


def _reference(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    x, mu = points.to(dtype), centroids.to(dtype)
    labels = ((mu * mu).sum(1) - 2 * (x @ mu.t())).argmin(1)
    difference = x - mu.index_select(0, labels)
    return labels.to(torch.int32), (difference * difference).sum(1).to(torch.float32)


def _fake(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    n = points.shape[0]
    return points.new_empty(n, dtype=torch.int32), points.new_empty(n, dtype=torch.float32)


def _cost(points: Tensor, centroids: Tensor) -> Cost:
    n, d = points.shape
    k = centroids.shape[0]
    return Cost(2 * n * k * d + 3 * n * d, points.nbytes + centroids.nbytes + 8 * n)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
        draw = Draw(dtype)
        return draw(n, d), draw(k, d)

    yield Sample("square", make(64, 16, 32))
    yield Sample("odd", make(33, 7, 41))
    yield Sample("1point", make(1, 3, 5))
    yield Sample("1centroid", make(5, 1, 4))
    yield Sample("0points", make(0, 3, 5))
    yield Sample("many", make(300, 33, 20))
    base = make(33, 7, 41)
    yield Sample("transposed", tuple(transposed(v) for v in base))
    yield Sample("sliced", tuple(sliced(v) for v in base))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor points, Tensor centroids) -> (Tensor, Tensor)",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
