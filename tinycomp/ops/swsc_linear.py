"""Linear layer whose channels share cluster centroids, plus a low-rank correction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "swsc_linear"


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
    """Multiply by a clustered weight without building it.

    axis 0 (output channels): y_i = s_i (centroids x)[labels_i] + a_i (b x) + bias_i
    axis 1 (input channels):  x'_c = sum over j with labels_j = c of s_j x_j;  y = centroids x' + a (b x) + bias

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        centroids: (clusters, in_features) for axis 0, (out_features, clusters) for axis 1; the dtype of x.
        labels: uint8, int32 or int64 (out_features,) for axis 0, (in_features,) for axis 1, below `clusters`.
        b: (rank, in_features); rank may be 0.
        a: (out_features, rank).
        scales: one per label, or None.
        bias: (out_features,) or None.
        axis: 0 or 1.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit, or a label is out of range.
        TypeError: dtypes differ or are not supported.

    Cost: 2 M (numbers in centroids, b and a) FLOPs; at M = 1 their bytes and the labels'.
    Source: SWSC, arXiv 2501.08631; the scales are an addition.
    """
    return _call(x, centroids, labels, b, a, scales, bias, axis)


def _check(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    b: Tensor,
    a: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    axis: int,
) -> None:
    if axis not in (0, 1):
        raise ValueError(f"{_NAME}: axis is {axis}, allowed 0 (output channels) or 1 (input channels); choose one")
    _checks.tensor(_NAME, "x", x)
    in_features, out_features = x.shape[-1], a.shape[0]
    clusters = centroids.shape[axis]
    _checks.shaped(_NAME, "centroids", centroids, (None, in_features) if axis == 0 else (out_features, None), x)
    channels = (out_features if axis == 0 else in_features,)
    _checks.shaped(_NAME, "labels", labels, channels, x, _checks.LABELS)
    _checks.indices(_NAME, "labels", labels, clusters)
    _checks.shaped(_NAME, "b", b, (None, in_features), x)
    _checks.shaped(_NAME, "a", a, (None, b.shape[0]), x)
    if scales is not None:
        _checks.shaped(_NAME, "scales", scales, channels, x)
    _checks.bias(_NAME, bias, out_features, x)


def _segment_sum(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """(..., channels) -> (..., clusters): the sum of the channels that carry each label."""
    return x.new_zeros(*x.shape[:-1], clusters).index_add(-1, labels.long(), x)


def _reference(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    b: Tensor,
    a: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    axis: int,
) -> Tensor:
    if axis == 0:
        y = F.linear(x, centroids).index_select(-1, labels.long())
        y = y if scales is None else y * scales
    else:
        scaled = x if scales is None else x * scales
        y = F.linear(_segment_sum(scaled, labels, centroids.shape[1]), centroids)
    y = y + F.linear(F.linear(x, b), a)
    return y if bias is None else y + bias


def _fake(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    b: Tensor,
    a: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    axis: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0])


def _backward(args: Sequence[Tensor], needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, centroids, labels, b, a, scales, _, axis = args
    x2, gy2, index = _checks.as_matrix(x), _checks.as_matrix(gy), labels.long()
    gs = None
    if axis == 0:
        gz = _segment_sum(gy2 if scales is None else gy2 * scales, labels, centroids.shape[0])
        gx = gz @ centroids
        gc = gz.t() @ x2
        if needs[5]:
            gs = (gy2 * (x2 @ centroids.t()).index_select(-1, index)).sum(0)
    else:
        gathered = (gy2 @ centroids).index_select(-1, index)
        gx = gathered if scales is None else gathered * scales
        gc = gy2.t() @ _segment_sum(x2 if scales is None else x2 * scales, labels, centroids.shape[1])
        if needs[5]:
            gs = (x2 * gathered).sum(0)
    gz_low = gy2 @ a
    gx = (gx + gz_low @ b).reshape(x.shape)
    gb = gz_low.t() @ x2 if needs[3] else None
    ga = gy2.t() @ (x2 @ b.t()) if needs[4] else None
    return gx, gc, None, gb, ga, gs, gy2.sum(0) if needs[6] else None, None


def _cost(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    b: Tensor,
    a: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    axis: int = 0,
) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    weights = centroids.numel() + b.numel() + a.numel()
    moved = x.numel() + weights + rows * a.shape[0] + sum(t.numel() for t in (scales, bias) if t is not None)
    return Cost(2 * rows * weights, moved * x.element_size() + labels.nbytes)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, n: int, clusters: int, rank: int, axis: int, full: bool, labels: torch.dtype
    ) -> tuple[Tensor | int | None, ...]:
        draw, channels = Draw(dtype), n if axis == 0 else k
        centroids = draw(clusters, k) if axis == 0 else draw(n, clusters)
        scales, bias = (draw(channels), draw(n)) if full else (None, None)
        return (
            draw(*lead, k),
            centroids,
            draw.labels(channels, clusters, labels),
            draw(rank, k),
            draw(n, rank),
            scales,
            bias,
            axis,
        )

    for axis in (0, 1):
        yield Sample(f"axis{axis}-1row", make((1,), 64, 48, 16, 8, axis, True, torch.uint8))
        yield Sample(f"axis{axis}-odd", make((2, 3), 33, 41, 11, 7, axis, False, torch.int32))
        yield Sample(f"axis{axis}-rank0", make((3,), 33, 41, 11, 0, axis, True, torch.int64))
        yield Sample(f"axis{axis}-many-rows", make((70,), 100, 90, 17, 7, axis, True, torch.int32))
        yield Sample(f"axis{axis}-hundreds-of-rows", make((260,), 33, 41, 11, 7, axis, True, torch.int32))
        yield Sample(f"axis{axis}-2KiB-rows", make((20,), 512, 40, 11, 7, axis, True, torch.int32))
        yield Sample(f"axis{axis}-0rows", make((0,), 33, 41, 11, 7, axis, True, torch.int32))
        base = make((5,), 33, 41, 11, 7, axis, True, torch.int32)
        yield Sample(f"axis{axis}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"axis{axis}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor x, Tensor centroids, Tensor labels, Tensor b, Tensor a, Tensor? scales=None, Tensor? bias=None, "
            "int axis=0) -> Tensor"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 1, 3, 4, 5, 6),
    )
)
