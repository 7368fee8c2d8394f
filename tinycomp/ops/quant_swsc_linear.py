"""Linear layer whose channels share centroids, plus a low-rank correction, all weights rounded to int8 or int4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import OPS, Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.quant_linear import ACTIVATION_GROUP, check_activation_bits, check_factor, pack_int4, quantize

_NAME = "quant_swsc_linear"
_LINEAR, _LOW_RANK = OPS["quant_linear"], OPS["quant_lowrank_linear"]


def quant_swsc_linear(
    x: Tensor,
    centroids: Tensor,
    centroid_scales: Tensor,
    labels: Tensor,
    b: Tensor,
    b_scales: Tensor,
    a: Tensor,
    a_scales: Tensor,
    centroid_zeros: Tensor | None = None,
    b_zeros: Tensor | None = None,
    a_zeros: Tensor | None = None,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    axis: int = 0,
    bits: int = 8,
    group_size: int = 0,
    activation_bits: int = 0,
) -> Tensor:
    """`swsc_linear` on rounded weights: centroids C, b and a are each rebuilt as (q - zeros) scales.

    axis 0 (output channels): y_i = s_i (C x)[labels_i] + a_i (b x) + bias_i
    axis 1 (input channels):  x'_c = sum over j with labels_j = c of s_j x_j;  y = C x' + a (b x) + bias
    activation_bits 0: weights are rebuilt in float32 and rounded to the dtype of x, in which activations stay; a kernel
    may keep float32 between two products. activation_bits 8: what a weight multiplies (x, b x, x') is rounded as in
    `quant_linear`; gradients pass through that rounding as if it were not there.

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        centroids: (clusters, in_features) for axis 0, (out_features, clusters) for axis 1, in the layout of
            `quant_linear`'s qweight; packed, of axis 1 the last column may be one that no label names.
        centroid_scales: (rows of centroids, groups of its inputs).
        labels: uint8, int32 or int64 (out_features,) for axis 0, (in_features,) for axis 1, below `clusters`.
        b: (rank, in_features) in that layout; rank may be 0.
        b_scales: (rank, groups of in_features).
        a: (out_features, rank) in the same layout.
        a_scales: (out_features, groups of rank).
        centroid_zeros: as centroid_scales, or None.
        b_zeros: as b_scales, or None.
        a_zeros: as a_scales, or None.
        scales: one per label in the dtype of x, or None.
        bias: (out_features,) in the dtype of x, or None.
        axis: 0 or 1.
        bits: 8 or 4, for all weights.
        group_size: inputs per scale, 0 for a whole row, for all weights.
        activation_bits: 0 or 8.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit, a label is out of range, or one of the integers is not allowed.
        TypeError: dtypes are not supported.

    Cost: as `swsc_linear`, in bytes of rounded weights. Differentiable in x, all scales and zeros, and bias.
    """
    return _call(
        x, centroids, centroid_scales, labels, b, b_scales, a, a_scales, centroid_zeros, b_zeros, a_zeros, scales, bias,
        axis, bits, group_size, activation_bits,
    )  # fmt: skip


def _clusters(centroids: Tensor, axis: int, bits: int) -> int:
    """Those that labels may name: packed columns are an even number."""
    return centroids.shape[0] if axis == 0 else centroids.shape[1] * (2 if bits == 4 else 1)


def _check(x: Tensor, centroids: Tensor, centroid_scales: Tensor, labels: Tensor, *rest) -> None:
    b, b_scales, a, a_scales, c_zeros, b_zeros, a_zeros, scales, bias, axis, bits, group_size, activation_bits = rest
    if axis not in (0, 1):
        raise ValueError(f"{_NAME}: axis is {axis}, allowed 0 (output channels) or 1 (input channels); choose one")
    _checks.tensor(_NAME, "x", x)
    check_activation_bits(_NAME, activation_bits)
    _checks.tensor(_NAME, "centroids", centroids, (torch.int8, torch.uint8), min_dim=2)
    in_features, out_features, clusters = x.shape[-1], a.shape[0], _clusters(centroids, axis, bits)
    read = in_features if axis == 0 else clusters
    check_factor(_NAME, "centroids", centroids, centroid_scales, c_zeros, read, bits, group_size, x)
    if axis == 1:
        _checks.shaped(_NAME, "centroids", centroids, (out_features, None), x, (centroids.dtype,))
    check_factor(_NAME, "b", b, b_scales, b_zeros, in_features, bits, group_size, x)
    check_factor(_NAME, "a", a, a_scales, a_zeros, b.shape[0], bits, group_size, x)
    channels = (out_features if axis == 0 else in_features,)
    _checks.shaped(_NAME, "labels", labels, channels, x, _checks.LABELS)
    _checks.indices(_NAME, "labels", labels, clusters)
    if scales is not None:
        _checks.shaped(_NAME, "scales", scales, channels, x)
    _checks.bias(_NAME, bias, out_features, x)


def _of_centroids(args: Sequence, x: Tensor) -> tuple:
    """Arguments of `quant_linear` for the centroids."""
    return x, args[1], args[2], args[8], None, *args[14:]


def _of_correction(args: Sequence) -> tuple:
    """Arguments of `quant_lowrank_linear` for b and a."""
    x, b, b_scales, a, a_scales = args[0], *args[4:8]
    return x, b, b_scales, a, a_scales, None, args[9], args[10], None, *args[14:]


def _summed(args: Sequence) -> Tensor:
    """x' of axis 1: (..., clusters)."""
    x, centroids, labels, scales = args[0], args[1], args[3], args[11]
    sums = x.new_zeros(*x.shape[:-1], _clusters(centroids, 1, args[14]))
    return sums.index_add(-1, labels.long(), x if scales is None else x * scales)


def _reference(*args) -> Tensor:
    x, labels, scales, bias, axis = args[0], args[3], args[11], args[12], args[13]
    if axis == 0:
        y = _LINEAR.reference(*_of_centroids(args, x)).index_select(-1, labels.long())
        y = y if scales is None else y * scales
    else:
        y = _LINEAR.reference(*_of_centroids(args, _summed(args)))
    y = y + _LOW_RANK.reference(*_of_correction(args))
    return y if bias is None else y + bias


def _fake(*args) -> Tensor:
    x, a = args[0], args[6]
    return x.new_empty(*x.shape[:-1], a.shape[0])


def _backward(args: Sequence, needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    assert _LINEAR.backward is not None
    assert _LOW_RANK.backward is not None
    x, centroids, labels, scales, axis = args[0], args[1], args[3], args[11], args[13]
    index, gs = labels.long(), None
    on_centroids = (needs[0] or needs[11], False, needs[2], needs[8], False)
    if axis == 0:
        gz = gy if scales is None else gy * scales
        gz = gz.new_zeros(*gz.shape[:-1], centroids.shape[0]).index_add(-1, index, gz)
        gx, _, g_scales, g_zeros, *_ = _LINEAR.backward(_of_centroids(args, x), on_centroids, gz)
        if needs[11]:
            shared = _LINEAR.reference(*_of_centroids(args, x)).index_select(-1, index)
            gs = _checks.as_matrix(gy * shared).sum(0)
    else:
        sums = _of_centroids(args, _summed(args))
        gx, _, g_scales, g_zeros, *_ = _LINEAR.backward(sums, on_centroids, gy)
        if gx is not None:
            gathered = gx.index_select(-1, index)
            gx = gathered if scales is None else gathered * scales
            gs = _checks.as_matrix(x * gathered).sum(0) if needs[11] else None
    on_factors = (needs[0], False, needs[5], False, needs[7], False, needs[9], needs[10], False)
    low = _LOW_RANK.backward(_of_correction(args), on_factors, gy)
    gx = gx if gx is None or low[0] is None else gx + low[0]
    gb = _checks.as_matrix(gy).sum(0) if needs[12] else None
    factors = (None, low[2], None, low[4])  # b and its scales, a and its scales
    return gx, None, g_scales, None, *factors, g_zeros, low[6], low[7], gs, gb, None, None, None, None


def _cost(*args) -> Cost:
    x, centroids, b, a = args[0], args[1], args[4], args[6]
    axis = args[13] if len(args) > 13 else 0
    bits = args[14] if len(args) > 14 else 8
    rows, k, n = x.numel() // max(x.shape[-1], 1), x.shape[-1], a.shape[0]
    weights = _clusters(centroids, axis, bits) * (n if axis else k) + b.shape[0] * (k + n)
    moved = sum(v.nbytes for v in args if isinstance(v, Tensor))
    return Cost(2 * rows * weights, moved + rows * n * x.element_size())


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, n: int, clusters: int, rank: int, axis: int, bits: int, group: int, full: bool,
        labels: torch.dtype = torch.int32,
    ) -> tuple:  # fmt: skip
        draw, channels = Draw(dtype), n if axis == 0 else k
        shared = (clusters, k) if axis == 0 else (n, clusters)
        c, b, a = (quantize(draw(*size), bits, group, not full) for size in (shared, (rank, k), (n, rank)))
        if rank == 0 and group:  # no column, no group
            a = a._replace(scales=a.scales[:, :0], zeros=None if a.zeros is None else a.zeros[:, :0])
        index, extra = draw.labels(channels, clusters, labels), (draw(channels), draw(n)) if full else (None, None)
        levels = (c.qweight, c.scales, index, b.qweight, b.scales, a.qweight, a.scales)
        return draw(*lead, k), *levels, c.zeros, b.zeros, a.zeros, *extra, axis, bits, group, 0

    def exact(lead: tuple[int, ...], k: int, n: int, clusters: int, rank: int, axis: int, bits: int) -> tuple:
        # Powers of two for all scales: sums and products that are rounded are exact, however they are summed.
        draw, channels = Draw(dtype), n if axis == 0 else k
        shared = (clusters, k) if axis == 0 else (n, clusters)
        x, *rest = ((3 * draw(*s)).round().clamp(-7, 7) for s in ((*lead, k), shared, (rank, k), (n, rank)))
        c, b, a = (pack_int4(q.to(torch.int8)) if bits == 4 else q.to(torch.int8) for q in rest)
        x[..., ::ACTIVATION_GROUP] = 127
        index, signs = draw.labels(channels, clusters), draw(channels).sign()
        one = [torch.full((q.shape[0], 1), 0.125, dtype=dtype) for q in (c, b, a)]
        return x, c, one[0], index, b, one[1], a, one[2], None, None, None, signs, draw(n), axis, bits, 0, 8

    for bits in (8, 4):
        name = f"int{bits}-axis"
        yield Sample(f"{name}0-1row", make((1,), 64, 48, 16, 8, 0, bits, 0, False, torch.uint8))
        yield Sample(f"{name}0-odd", make((2, 3), 33, 41, 11, 7, 0, bits, 8, True))
        yield Sample(f"{name}0-rank0", make((3,), 33, 41, 11, 0, 0, bits, 8, True, torch.int64))
        yield Sample(f"{name}0-many-rows", make((70,), 100, 90, 17, 21, 0, bits, 0, True))
        yield Sample(f"{name}0-0rows", make((0,), 33, 41, 11, 7, 0, bits, 0, True))
        yield Sample(f"{name}1-odd", make((2, 3), 33, 41, 11, 7, 1, bits, 8, True))
        yield Sample(f"{name}1-many-rows", make((20,), 100, 90, 18, 0, 1, bits, 0, False))
        yield Sample(f"{name}0-rounded", exact((20,), 300, 48, 150, 31, 0, bits))
        yield Sample(f"{name}1-rounded-1row", exact((1,), 300, 48, 151, 31, 1, bits))
        base = make((5,), 33, 41, 11, 7, 0, bits, 8, True)
        yield Sample(f"{name}0-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"{name}0-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor x, Tensor centroids, Tensor centroid_scales, Tensor labels, Tensor b, Tensor b_scales, Tensor a, "
            "Tensor a_scales, Tensor? centroid_zeros=None, Tensor? b_zeros=None, Tensor? a_zeros=None, "
            "Tensor? scales=None, Tensor? bias=None, int axis=0, int bits=8, int group_size=0, int activation_bits=0) "
            "-> Tensor"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 11, 12),
    )
)
