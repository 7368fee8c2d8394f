"""Mean of the points that carry each label."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "kmeans_update"


def kmeans_update(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean and number of the members of each cluster; the mean of an empty cluster is zero.

    Sums are kept in float32 (float64 for float64 points) and added in the order of the points.

    Args:
        points: (n, d) floating.
        labels: int32 or int64 (n,), below k.
        k: number of clusters, at least 1.

    Returns:
        centroids (k, d) in the dtype of points, counts int64 (k,).

    Raises:
        ValueError: shapes do not fit or a label is out of range.
        TypeError: dtypes are not supported.

    Cost: n d additions. Not differentiable.
    """
    return _call(points, labels, k)


def _check(points: Tensor, labels: Tensor, k: int) -> None:
    _checks.tensor(_NAME, "points", points)
    _checks.shaped(_NAME, "points", points, (None, None), points)
    _checks.shaped(_NAME, "labels", labels, (points.shape[0],), points, (torch.int32, torch.int64))
    if k < 1:
        raise ValueError(f"{_NAME}: k is {k}, allowed at least 1; ask for one cluster or more")
    _checks.indices(_NAME, "labels", labels, k)


def _reference(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
    index = labels.long()
    counts = torch.zeros(k, dtype=torch.int64, device=points.device).index_add(0, index, torch.ones_like(index))
    sums = torch.zeros(k, points.shape[1], dtype=dtype, device=points.device).index_add(0, index, points.to(dtype))
    return (sums / counts.clamp(min=1).unsqueeze(1)).to(points.dtype), counts


def _fake(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return points.new_empty(k, points.shape[1]), points.new_empty(k, dtype=torch.int64)


def _cost(points: Tensor, labels: Tensor, k: int) -> Cost:
    out = k * points.shape[1] * points.element_size() + 8 * k
    return Cost(points.numel(), points.nbytes + labels.nbytes + out)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(n: int, k: int, d: int, labels: torch.dtype = torch.int32) -> tuple[Tensor, Tensor, int]:
        draw = Draw(dtype)
        return draw(n, d), draw.labels(n, k, labels), k

    yield Sample("square", make(64, 16, 32))
    yield Sample("empty-clusters", make(5, 33, 7, torch.int64))
    yield Sample("0points", make(0, 3, 5))
    points, labels, k = make(33, 7, 41)
    yield Sample("transposed", (transposed(points), sliced(labels), k))
    yield Sample("sliced", (sliced(points), labels, k))


_call = define(
    Op(
        name=_NAME,
        schema="(Tensor points, Tensor labels, int k) -> (Tensor, Tensor)",
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
    )
)
