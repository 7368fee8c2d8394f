"""Low-rank linear layer whose two factors are rounded to int8 or int4."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import OPS, Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.quant_linear import (
    ACTIVATION_GROUP,
    check_activation_bits,
    check_factor,
    dequantize,
    pack_int4,
    quantize,
    round_activations,
    scale_gradients,
    straight_through,
)

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
    activation_bits: int = 0,
) -> Tensor:
    """`lowrank_linear` on rounded factors: each is rebuilt as (q - zeros) scales.

    activation_bits 0: the factors are rebuilt in float32 and rounded to the dtype of x. Activations, x and the product
    with r alike, stay in the dtype of x; a kernel may keep float32 in both places.
    activation_bits 8: x, and again the float32 product with r that t multiplies, are rounded as in `quant_linear`;
    gradients pass through that rounding as if it were not there.

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
        activation_bits: 0 or 8.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit, or bits, group_size or activation_bits are not allowed.
        TypeError: dtypes are not supported.

    Cost: the FLOPs of `lowrank_linear`; at M = 1 the bytes of the rounded factors. Differentiable in x, scales, zeros
    and bias.
    """
    return _call(x, r, r_scales, t, t_scales, order, r_zeros, t_zeros, bias, bits, group_size, activation_bits)


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
    activation_bits: int,
) -> None:
    _checks.tensor(_NAME, "x", x)
    check_activation_bits(_NAME, activation_bits)
    check_factor(_NAME, "r", r, r_scales, r_zeros, x.shape[-1], bits, group_size, x)
    check_factor(_NAME, "t", t, t_scales, t_zeros, r.shape[0], bits, group_size, x)
    out_features = t.shape[0]
    if order is not None:
        out_features = out_features + r.shape[0]
        _checks.shaped(_NAME, "order", order, (out_features,), x, (torch.int32,))
        _checks.permutation(_NAME, "order", order)
    _checks.bias(_NAME, bias, out_features, x)


def _factors(args: Sequence) -> tuple[Tensor, Tensor]:
    x, r, r_scales, t, t_scales, _, r_zeros, t_zeros, _, bits, group_size, activation_bits = args
    dtype = torch.promote_types(x.dtype, torch.float32) if activation_bits else x.dtype
    wide_r = dequantize(r, r_scales, r_zeros, x.shape[-1], bits, group_size).to(dtype)
    return wide_r, dequantize(t, t_scales, t_zeros, r.shape[0], bits, group_size).to(dtype)


def _reference(*args) -> Tensor:
    x, order, bias, group_size, activation_bits = args[0], args[5], args[8], args[10], args[11]
    r, t = _factors(args)
    if not activation_bits:
        return _FLOAT.reference(x, r, t, order, bias)
    z = F.linear(straight_through(x, group_size), r)
    y = F.linear(straight_through(z, group_size), t)
    if order is not None:
        y = torch.cat([z, y], -1)
        y = torch.zeros_like(y).index_copy(-1, order.long(), y)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _fake(*args) -> Tensor:
    x, r, t, order = args[0], args[1], args[3], args[5]
    return x.new_empty(*x.shape[:-1], t.shape[0] + (0 if order is None else r.shape[0]))


def _backward(args: Sequence, needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, r, r_scales, t, t_scales, order, r_zeros, t_zeros, bias, bits, group_size, activation_bits = args
    assert _FLOAT.backward is not None
    on_r, on_t = needs[2] or needs[6], needs[4] or needs[7]
    wide_r, wide_t = _factors(args)
    wide_gy = gy.to(wide_r.dtype)
    used = round_activations(x, group_size) if activation_bits else x
    gx, gr, gt, _, gb = _FLOAT.backward(
        (used, wide_r, wide_t, order, bias), (needs[0], on_r, on_t and not activation_bits, False, needs[8]), wide_gy
    )
    if on_t and activation_bits:
        rest = wide_gy if order is None else wide_gy.index_select(-1, order.long())[..., r.shape[0] :]
        z = round_activations(used @ wide_r.t(), group_size)
        gt = _checks.as_matrix(rest).t() @ _checks.as_matrix(z)
    gs: list[Tensor | None] = [None, None, None, None]
    if gr is not None:
        gs[0], gs[2] = scale_gradients(gr, r, r_scales, r_zeros, bits, group_size)
    if gt is not None:
        gs[1], gs[3] = scale_gradients(gt, t, t_scales, t_zeros, bits, group_size)
    gx, gb = (None if g is None else g.to(x.dtype) for g in (gx, gb))
    return gx, None, gs[0], None, gs[1], None, gs[2], gs[3], gb, None, None, None


def _cost(*args) -> Cost:
    x, r, t, order = args[0], args[1], args[3], args[5] if len(args) > 5 else None
    rows = x.numel() // max(x.shape[-1], 1)
    rank, rest = r.shape[0], t.shape[0]
    out = rows * (rest + (0 if order is None else rank))
    moved = sum(a.nbytes for a in args if isinstance(a, Tensor))
    return Cost(2 * rows * rank * (x.shape[-1] + rest), moved + out * x.element_size())


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...],
        k: int,
        n: int,
        rank: int,
        pivoted: bool,
        bits: int,
        group: int,
        symmetric: bool,
    ) -> tuple[Tensor | int | None, ...]:
        draw = Draw(dtype)
        r = quantize(draw(rank, k), bits, group, symmetric)
        t = quantize(draw(n - rank if pivoted else n, rank), bits, group, symmetric)
        order = draw.permutation(n) if pivoted else None
        x, bias = draw(*lead, k), draw(n)
        return x, r.qweight, r.scales, t.qweight, t.scales, order, r.zeros, t.zeros, bias, bits, group, 0

    def exact(lead: tuple[int, ...], k: int, n: int, rank: int, pivoted: bool, bits: int) -> tuple:
        # Powers of two for all scales: the product with r is exact, so its rounding is the same however it is summed.
        draw = Draw(dtype)
        x, r, t = ((3 * draw(*s)).round().clamp(-7, 7) for s in ((*lead, k), (rank, k), (n - rank * pivoted, rank)))
        packed = [pack_int4(q.to(torch.int8)) if bits == 4 else q.to(torch.int8) for q in (r, t)]
        scales = [torch.full((q.shape[0], 1), 0.125, dtype=dtype) for q in packed]
        x[..., ::ACTIVATION_GROUP] = 127
        order = draw.permutation(n) if pivoted else None
        return x, packed[0], scales[0], packed[1], scales[1], order, None, None, draw(n), bits, 0, 8

    for bits in (8, 4):
        yield Sample(f"int{bits}-plain-1row", make((1,), 64, 48, 16, False, bits, 0, True))
        yield Sample(f"int{bits}-pivoted-odd", make((2, 3), 33, 41, 7, True, bits, 8, False))
        yield Sample(f"int{bits}-rounded-1row", exact((1,), 300, 48, 150, False, bits))
        yield Sample(f"int{bits}-rounded-pivoted", exact((2, 10), 33, 41, 7, True, bits))
        yield Sample(f"int{bits}-0rows", make((0,), 33, 41, 7, True, bits, 0, True))
        base = make((5,), 33, 41, 7, True, bits, 8, False)
        yield Sample(f"int{bits}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"int{bits}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor x, Tensor r, Tensor r_scales, Tensor t, Tensor t_scales, Tensor? order=None, "
            "Tensor? r_zeros=None, Tensor? t_zeros=None, Tensor? bias=None, int bits=8, int group_size=0, "
            "int activation_bits=0) -> Tensor"
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
