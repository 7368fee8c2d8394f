"""Linear layer with a sparse weight in one of four packed formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.masked_formats import (
    BLOCK,
    FORMATS,
    Packed,
    check_format,
    pack_masked,
    place,
    unpack_bits,
    unpack_masked,
)

_NAME = "masked_linear"


def masked_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str = "bitmask",
    value_bits: int = 0,
) -> Tensor:
    """Multiply by a sparse weight: y = x wᵀ + bias, where w is zero outside the mask. N, K: the weight's shape.

    | format    | values            | mask                                               | offsets             |
    |-----------|-------------------|----------------------------------------------------|---------------------|
    | "bitmask" | (nnz,) by rows    | uint8 (N, ceil(K/8)), bit j of byte b: input 8b+j  | first value per row |
    | "index"   | (nnz,) by rows    | int16 (nnz,), input index modulo 2^16, K <= 65536  | first value per row |
    | "2:4"     | (N, 2 ceil(K/4))  | uint8 (N, ceil(K/8)), 4 bits per 4 inputs: i0+4 i1 | None                |
    | "block32" | (blocks, 32, 32)  | uint8 (ceil(N/32), ceil(K/256)), a bit per block   | first block per row |

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        values: kept weights in the dtype of x (value_bits 0), int8 (8), or uint8 holding two (4).
        mask: positions, as in the table.
        offsets: int32, one more than rows of the mask (of the weight for "index"), as in the table.
        scales: floating (N, 1), multiplied onto the row, for value_bits 8 and 4; else None.
        bias: (N,) in the dtype of x, or None.
        out_features: N.
        format: one of the table.
        value_bits: 0, 8 or 4.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ValueError: unknown format, shapes that do not fit, or a mask that disagrees with values.
        TypeError: dtypes are not supported.

    Cost: 2 M nnz FLOPs; at M = 1 the bytes of values, mask, offsets and scales. Differentiable in x, values
    (value_bits 0), scales and bias.
    """
    return _call(x, values, mask, offsets, scales, bias, out_features, format, value_bits)


def _check(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str,
    value_bits: int,
) -> None:
    _checks.tensor(_NAME, "x", x)
    n, k = out_features, x.shape[-1]
    check_format(_NAME, format, value_bits, k)
    _checks.tensor(_NAME, "values", values, {0: (x.dtype,), 8: (torch.int8,), 4: (torch.uint8,)}[value_bits])
    per_byte = 2 if value_bits == 4 else 1
    rows = -(-n // BLOCK) if format == "block32" else n
    width = {"bitmask": -(-k // 8), "index": 0, "2:4": -(-k // 8), "block32": -(-k // (8 * BLOCK))}[format]
    if format == "index":
        _checks.shaped(_NAME, "mask", mask, (None,), x, (torch.int16,))
    else:
        _checks.shaped(_NAME, "mask", mask, (rows, width), x, (torch.uint8,))
    stored: dict[str, tuple[int | None, ...]] = {
        "bitmask": (None,),
        "index": (-(-mask.shape[0] // per_byte),),
        "2:4": (n, 2 * -(-k // 4) // per_byte),
        "block32": (None, BLOCK, BLOCK // per_byte),
    }
    _checks.shaped(_NAME, "values", values, stored[format], x, (values.dtype,))
    if (offsets is None) != (format == "2:4"):
        raise ValueError(f"{_NAME}: offsets is {offsets!r}, allowed None for '2:4' alone; pack with pack_masked")
    if offsets is not None:
        _checks.shaped(_NAME, "offsets", offsets, (rows + 1,), x, (torch.int32,))
        _check_offsets(values, mask, offsets, k, format, per_byte)
    if (scales is None) != (value_bits == 0):
        raise ValueError(f"{_NAME}: scales is {scales!r}, allowed None for value_bits 0 alone; pack with pack_masked")
    if scales is not None:
        _checks.shaped(_NAME, "scales", scales, (n, 1), x, _checks.FLOATS)
    _checks.bias(_NAME, bias, n, x)


def _check_offsets(values: Tensor, mask: Tensor, offsets: Tensor, k: int, format: str, per_byte: int) -> None:
    if not _checks.concrete(offsets):
        return
    stored = mask.shape[0] if format == "index" else values.shape[0]
    per_byte = per_byte if format == "bitmask" else 1
    counted = offsets.diff()
    if format != "index":
        columns = k if format == "bitmask" else -(-k // BLOCK)
        counted = unpack_bits(mask, columns).sum(1).to(torch.int32)
    agree = int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all()) and torch.equal(offsets.diff(), counted)
    if not agree or -(-int(offsets[-1]) // per_byte) != stored:
        raise ValueError(f"{_NAME}: offsets disagree with mask or with {stored} stored values; pack with pack_masked")
    if format == "index":
        _checks.indices(_NAME, "mask", mask.int() & 0xFFFF, k)
        most = int(counted.max()) if counted.numel() else 0
        if most > k:
            raise ValueError(f"{_NAME}: offsets give a row {most} values, allowed 0..{k}; pack with pack_masked")


def _dense(x: Tensor, packed: Packed, out_features: int, format: str, value_bits: int) -> Tensor:
    return unpack_masked(packed, out_features, x.shape[-1], format, value_bits).to(x.dtype)


def _reference(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str,
    value_bits: int,
) -> Tensor:
    return F.linear(x, _dense(x, Packed(values, mask, offsets, scales), out_features, format, value_bits), bias)


def _fake(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str,
    value_bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _backward(args: Sequence, needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, values, mask, offsets, scales, _, n, format, bits = args
    x2, gy2 = _checks.as_matrix(x), _checks.as_matrix(gy)
    gx, gv, gs = None, None, None
    if needs[0]:
        gx = (gy2 @ _dense(x, Packed(values, mask, offsets, scales), n, format, bits)).reshape(x.shape)
    if needs[1]:
        # Which value stands at each position, counted from 1; 0 collects the positions without one.
        ordinal = torch.arange(1, values.numel() + 1, device=values.device).reshape(values.shape)
        index = place(ordinal, mask, offsets, n, x.shape[-1], format).reshape(-1)
        gv = gy.new_zeros(values.numel() + 1).scatter(0, index, (gy2.t() @ x2).reshape(-1))[1:].reshape(values.shape)
    if needs[4]:
        levels = _dense(x, Packed(values, mask, offsets, torch.ones_like(scales)), n, format, bits)
        gs = ((gy2.t() @ x2) * levels).sum(1, keepdim=True).to(scales.dtype)
    return gx, gv, None, None, gs, gy2.sum(0) if needs[5] else None, None, None, None


def _cost(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    format: str = "bitmask",
    value_bits: int = 0,
) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    kept = values.numel() * (2 if value_bits == 4 else 1)
    moved = sum(t.nbytes for t in (x, values, mask, offsets, scales, bias) if t is not None)
    return Cost(2 * rows * kept, moved + rows * out_features * x.element_size())


def kept(draw: Draw, n: int, k: int, format: str, above: float = 0.3) -> Tensor:
    """A bool (n, k) mask for samples, drawn as the format demands."""
    if format == "block32":
        blocks = draw(-(-n // BLOCK), -(-k // BLOCK)) > 0
        return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:n, :k]
    if format == "2:4":
        ranks = F.pad(draw(n, k), (0, -k % 4)).reshape(n, -1, 4).argsort(2).argsort(2)
        return (ranks < 2).reshape(n, -1)[:, :k]
    return draw(n, k) > above


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, n: int, format: str, bits: int, above: float = 0.3
    ) -> tuple[Tensor | int | str | None, ...]:
        draw = Draw(dtype)
        packed = pack_masked(draw(n, k), kept(draw, n, k, format, above), format, bits)
        return draw(*lead, k), *packed, draw(n) if bits else None, n, format, bits

    for format in FORMATS:
        for bits in (0, 8, 4):
            yield Sample(f"{format}-{bits}-odd", make((2, 3), 33, 41, format, bits))
        yield Sample(f"{format}-1row", make((1,), 96, 64, format, 0))
        for bits in (0, 8, 4) if format == "block32" else (0,):
            yield Sample(f"{format}-{bits}-many-few-kept", make((37,), 1060, 41, format, bits, above=0.9))
        yield Sample(f"{format}-0rows", make((0,), 33, 41, format, 0))
        base = make((5,), 33, 41, format, 8)
        yield Sample(f"{format}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"{format}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor x, Tensor values, Tensor mask, Tensor? offsets, Tensor? scales, Tensor? bias, int out_features, "
            'str format="bitmask", int value_bits=0) -> Tensor'
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 5),
    )
)
