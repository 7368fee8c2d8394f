"""Low-rank linear layer whose two factors are rounded to int8 or int4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import OPS, Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.quant_linear import check_factor, dequantize, quantize, scale_gradients

_NAME = "quant_lowrank_linear"
_FLOAT = OPS["lowrank_linear"]


def quant_lowrank_linear(
    x: Tensor,
    r: Tensor,
    r_scales: Tensor,
    t: Tensor,
    t_scales: Tensor,
    order: Tensor | None = None,
    r_zeros: Tensor | None = None,
    t_zeros: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
    group_size: int = 0,
) -> Tensor:
    """`lowrank_linear` on rounded factors: each is rebuilt as (q - zeros) scales.

    The factors are rebuilt in float32 and rounded to the dtype of x. Activations, x and the product with r alike,
    stay in the dtype of x; a kernel may keep float32 in both places.

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        r: first factor (rank, in_features) in the layout of `quant_linear`'s qweight.
        r_scales: (rank, groups of in_features).
        t: second factor (out_features, rank), or (out_features - rank, rank) with `order`, in the same layout.
        t_scales: (rows of t, groups of rank).
        order: int32 (out_features,) as for `lowrank_linear`, or None.
        r_zeros: as r_scales, or None.
        t_zeros: as t_scales, or None.
        bias: (out_features,) in the dtype of x, or None.
        bits: 8 or 4, for both factors.
        group_size: inputs per scale, 0 for a whole row, for both factors.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit, or bits or group_size are not allowed.
        TypeError: dtypes are not supported.

    Cost: the FLOPs of `lowrank_linear`; at M = 1 the bytes of the rounded factors. Differentiable in x, scales, zeros
    and bias.
    """
    return _call(x, r, r_scales, t, t_scales, order, r_zeros, t_zeros, bias, bits, group_size)


def _check(
    x: Tensor,
    r: Tensor,
    r_scales: Tensor,
    t: Tensor,
    t_scales: Tensor,
    order: Tensor | None,
    r_zeros: Tensor | None,
    t_zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> None:
    _checks.tensor(_NAME, "x", x)
    check_factor(_NAME, "r", r, r_scales, r_zeros, x.shape[-1], bits, group_size, x)
    check_factor(_NAME, "t", t, t_scales, t_zeros, r.shape[0], bits, group_size, x)
    out_features = t.shape[0]
    if order is not None:
        out_features = out_features + r.shape[0]
        _checks.shaped(_NAME, "order", order, (out_features,), x, (torch.int32,))
        _checks.permutation(_NAME, "order", order)
    _checks.bias(_NAME, bias, out_features, x)


def _factors(args: Sequence) -> tuple[Tensor, Tensor]:
    x, r, r_scales, t, t_scales, _, r_zeros, t_zeros, _, bits, group_size = args
    wide_r = dequantize(r, r_scales, r_zeros, x.shape[-1], bits, group_size).to(x.dtype)
    return wide_r, dequantize(t, t_scales, t_zeros, r.shape[0], bits, group_size).to(x.dtype)


def _reference(*args) -> Tensor:
    return _FLOAT.reference(args[0], *_factors(args), args[5], args[8])


def _fake(*args) -> Tensor:
    x, r, t, order = args[0], args[1], args[3], args[5]
    return x.new_empty(*x.shape[:-1], t.shape[0] + (0 if order is None else r.shape[0]))


def _backward(args: Sequence, needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, r, r_scales, t, t_scales, order, r_zeros, t_zeros, bias, bits, group_size = args
    assert _FLOAT.backward is not None
    on_r, on_t = needs[2] or needs[6], needs[4] or needs[7]
    float_needs = (needs[0], on_r, on_t, False, needs[8])
    gx, gr, gt, _, gb = _FLOAT.backward((x, *_factors(args), order, bias), float_needs, gy)
    gs: list[Tensor | None] = [None, None, None, None]
    if gr is not None:
        gs[0], gs[2] = scale_gradients(gr, r, r_scales, r_zeros, bits, group_size)
    if gt is not None:
        gs[1], gs[3] = scale_gradients(gt, t, t_scales, t_zeros, bits, group_size)
    return gx, None, gs[0], None, gs[1], None, gs[2], gs[3], gb, None, None


def _cost(*args) -> Cost:
    x, r, t, order = args[0], args[1], args[3], args[5] if len(args) > 5 else None
    rows = x.numel() // max(x.shape[-1], 1)
    rank, rest = r.shape[0], t.shape[0]
    out = rows * (rest + (0 if order is None else rank))
    moved = sum(a.nbytes for a in args if isinstance(a, Tensor))
    return Cost(2 * rows * rank * (x.shape[-1] + rest), moved + out * x.element_size())


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, n: int, rank: int, pivoted: bool, bits: int, group: int, symmetric: bool
    ) -> tuple[Tensor | int | None, ...]:
        draw = Draw(dtype)
        r = quantize(draw(rank, k), bits, group, symmetric)
        t = quantize(draw(n - rank if pivoted else n, rank), bits, group, symmetric)
        order = draw.permutation(n) if pivoted else None
        x, bias = draw(*lead, k), draw(n)
        return x, r.qweight, r.scales, t.qweight, t.scales, order, r.zeros, t.zeros, bias, bits, group

    for bits in (8, 4):
        yield Sample(f"int{bits}-plain-1row", make((1,), 64, 48, 16, False, bits, 0, True))
        yield Sample(f"int{bits}-pivoted-odd", make((2, 3), 33, 41, 7, True, bits, 8, False))
        yield Sample(f"int{bits}-0rows", make((0,), 33, 41, 7, True, bits, 0, True))
        base = make((5,), 33, 41, 7, True, bits, 8, False)
        yield Sample(f"int{bits}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"int{bits}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor x, Tensor r, Tensor r_scales, Tensor t, Tensor t_scales, Tensor? order=None, "
            "Tensor? r_zeros=None, Tensor? t_zeros=None, Tensor? bias=None, int bits=8, int group_size=0) -> Tensor"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 8),
    )
)
