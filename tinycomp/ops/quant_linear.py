"""Linear layer with rounded weights: int8 or packed int4, scales per row or per group of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops import _checks
from tinycomp.ops._registry import Cost, Op, Sample, define
from tinycomp.ops._sampling import Draw, sliced, transposed

_NAME = "quant_linear"
# Inputs that share a scale where activations are rounded and weights have one scale for the whole row.
ACTIVATION_GROUP = 128


class Quantized(NamedTuple):
    """Rounded weight: w ≈ (q - zeros) scales, groups of `group_size` inputs (0: the whole row) sharing one scale."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None


def quant_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
    group_size: int = 0,
    activation_bits: int = 0,
) -> Tensor:
    """Multiply by a rounded weight: y = x wᵀ + bias, w = (q - zeros) scales by group.

    activation_bits 0: the weight is rebuilt in float32 and rounded to the dtype of x; a kernel may skip that second
    rounding. activation_bits 8: x is rounded too, by row and group (`round_activations`), and neither is rounded
    again; gradients pass through the rounding of x as if it were not there.

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        qweight: int8 (out_features, in_features) for 8 bits; for 4 bits uint8 (out_features, ceil(in_features / 2)),
            input 2j in the low half of byte j.
        scales: floating (out_features, groups), groups = ceil(in_features / group_size), or 1 for group_size 0.
        zeros: as scales, the value of q that means zero. None: 0 for 8 bits, 8 for 4 bits.
        bias: (out_features,) in the dtype of x, or None.
        bits: 8 or 4.
        group_size: 0 or a positive even number.
        activation_bits: 0 or 8.

    Returns:
        (..., out_features) in the dtype of x.

    Raises:
        ValueError: shapes do not fit, or bits, group_size or activation_bits are not allowed.
        TypeError: dtypes are not supported.

    Cost: 2 M N K FLOPs; at M = 1 the bytes of qweight, scales and zeros. Differentiable in x, scales, zeros and bias.
    """
    return _call(x, qweight, scales, zeros, bias, bits, group_size, activation_bits)


def quantize(w: Tensor, bits: int = 8, group_size: int = 0, symmetric: bool = True) -> Quantized:
    """Round a weight to the nearest level of each group.

    Symmetric: scale = max|w| / (2^(bits-1) - 1), levels ±(2^(bits-1) - 1). Asymmetric: the levels span [min, max],
    zero included, and q = round(w / scale) + zero. Ties round to even. 4 bits are packed.

    Args:
        w: (out_features, in_features) floating.
        bits: 8 or 4.
        group_size: inputs per scale, 0 for the whole row; even.
        symmetric: levels symmetric around zero, without `zeros`.

    Raises:
        ValueError: bits or group_size are not allowed.
    """
    _check_layout("quantize", bits, group_size)
    _checks.tensor("quantize", "w", w, min_dim=2)
    out_features, in_features = w.shape
    size = group_size or max(in_features, 1)
    groups = -(-in_features // size) if in_features else 1
    wide = F.pad(w.float(), (0, groups * size - in_features)).reshape(out_features, groups, size)
    largest, smallest = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    if symmetric:
        scales, zeros = wide.abs().amax(2) / largest, None
        scales = torch.where(scales == 0, 1.0, scales).to(w.dtype)
        q = (wide / scales.float().unsqueeze(2)).round().clamp(-largest, largest)
    else:
        low, high = wide.amin(2).clamp(max=0), wide.amax(2).clamp(min=0)
        scales = (high - low) / (largest - smallest)
        scales = torch.where(scales == 0, 1.0, scales).to(w.dtype)
        zeros = (smallest - low / scales.float()).round().clamp(smallest, largest)
        q = ((wide / scales.float().unsqueeze(2)).round() + zeros.unsqueeze(2)).clamp(smallest, largest)
        zeros = (zeros + (8 if bits == 4 else 0)).to(w.dtype)
    q = q.reshape(out_features, groups * size)[:, :in_features].to(torch.int8)
    return Quantized(pack_int4(q) if bits == 4 else q, scales, zeros)


def dequantize(
    qweight: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, bits: int = 8, group_size: int = 0
) -> Tensor:
    """The float32 (out_features, in_features) weight that `quant_linear` multiplies by (float64 for float64 scales)."""
    q = qweight if bits == 8 else unpack_int4(qweight, in_features)
    dtype = torch.float64 if scales.dtype == torch.float64 else torch.float32
    w = q.to(dtype)
    if zeros is not None:
        w = w - _per_input(zeros.to(dtype) - (8 if bits == 4 else 0), in_features, group_size)
    return w * _per_input(scales.to(dtype), in_features, group_size)


def _per_input(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """(N, groups) -> (N, in_features), or (N, 1) where one group spans the row."""
    return values if group_size == 0 else values.repeat_interleave(group_size, 1)[:, :in_features]


def pack_int4(q: Tensor) -> Tensor:
    """int8 (..., n) with values -8..7 -> uint8 (..., ceil(n / 2)): value + 8, value 2j in the low half of byte j.

    Raises:
        ValueError: a value is outside -8..7.
    """
    if q.numel() and bool((q.amin() < -8) | (q.amax() > 7)):
        raise ValueError(f"pack_int4: values {int(q.amin())}..{int(q.amax())}, allowed -8..7; round to 4 bits first")
    nibbles = F.pad((q + 8).to(torch.uint8), (0, q.shape[-1] % 2))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, size: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 (..., ceil(size / 2)) -> int8 (..., size)."""
    halves = torch.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)
    return halves[..., :size].to(torch.int8) - 8


def round_activations(x: Tensor, group_size: int = 0) -> Tensor:
    """x rounded to 255 levels by row and group, in float32 (float64 for float64): level * (largest / 127).

    level = round(x * (127 / largest)) in float32, ties to even; groups of `group_size`, or ACTIVATION_GROUP for 0.
    """
    size = group_size or ACTIVATION_GROUP
    k = x.shape[-1]
    groups = -(-k // size)
    wide = F.pad(x.float(), (0, groups * size - k)).reshape(*x.shape[:-1], groups, size)
    largest = wide.abs().amax(-1, keepdim=True) if k else wide.sum(-1, keepdim=True)
    # 127.0 / largest would be 127 times a reciprocal, rounded twice.
    factor = torch.where(largest == 0, 0.0, torch.full_like(largest, 127.0) / largest)
    levels = (wide * factor).round().clamp(-127, 127)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rounded = levels.to(dtype) * (largest / 127.0).to(dtype)
    return rounded.reshape(*x.shape[:-1], groups * size)[..., :k]


def straight_through(x: Tensor, group_size: int) -> Tensor:
    """`round_activations` whose gradient is that of x itself."""
    rounded = round_activations(x.detach(), group_size)
    return x.to(rounded.dtype) + (rounded - x.detach().to(rounded.dtype))


def _check_layout(where: str, bits: int, group_size: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"{where}: bits is {bits}, allowed 4 or 8; choose one")
    if group_size < 0 or group_size % 2:
        raise ValueError(f"{where}: group_size is {group_size}, allowed 0 or a positive even number; choose one")


def check_activation_bits(where: str, activation_bits: int) -> None:
    """Raise unless activations are left alone or rounded to 8 bits."""
    if activation_bits not in (0, 8):
        raise ValueError(f"{where}: activation_bits is {activation_bits}, allowed 0 or 8; choose one")


def check_factor(
    where: str,
    name: str,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    in_features: int,
    bits: int,
    group_size: int,
    like: Tensor,
) -> None:
    """Raise unless a rounded factor fits `in_features` inputs; `quant_lowrank_linear` shares it."""
    _check_layout(where, bits, group_size)
    stored, dtype = (in_features, torch.int8) if bits == 8 else ((in_features + 1) // 2, torch.uint8)
    _checks.shaped(where, name, q, (None, stored), like, (dtype,))
    groups = 1 if group_size == 0 else -(-in_features // group_size)
    _checks.shaped(where, f"scales of {name}", scales, (q.shape[0], groups), like, _checks.FLOATS)
    if zeros is not None:
        _checks.shaped(where, f"zeros of {name}", zeros, (q.shape[0], groups), scales)


def _check(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation_bits: int,
) -> None:
    _checks.tensor(_NAME, "x", x)
    check_activation_bits(_NAME, activation_bits)
    check_factor(_NAME, "qweight", qweight, scales, zeros, x.shape[-1], bits, group_size, x)
    _checks.bias(_NAME, bias, qweight.shape[0], x)


def _reference(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    w = dequantize(qweight, scales, zeros, x.shape[-1], bits, group_size)
    if not activation_bits:
        return F.linear(x, w.to(x.dtype), bias)
    rounded = straight_through(x, group_size)
    return F.linear(rounded, w.to(rounded.dtype), None if bias is None else bias.to(rounded.dtype)).to(x.dtype)


def _fake(x: Tensor, qweight: Tensor, *args) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _backward(args: Sequence, needs: Sequence[bool], gy: Tensor) -> tuple[Tensor | None, ...]:
    x, qweight, scales, zeros, _, bits, group_size, activation_bits = args
    gx, gs, gz = None, None, None
    gy2 = _checks.as_matrix(gy)
    if needs[0]:
        w = dequantize(qweight, scales, zeros, x.shape[-1], bits, group_size).to(gy.dtype)
        gx = (gy2 @ w).reshape(x.shape)
    if needs[2] or needs[3]:
        used = round_activations(x, group_size).to(x.dtype) if activation_bits else x
        gs, gz = scale_gradients(gy2.t() @ _checks.as_matrix(used), qweight, scales, zeros, bits, group_size)
    return gx, None, gs, gz, gy2.sum(0) if needs[4] else None, None, None, None


def scale_gradients(
    gw: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of scales and zeros from that of the (out_features, in_features) weight."""
    gw, ones = gw.to(scales.dtype), torch.ones_like(scales)
    levels = dequantize(qweight, ones, zeros, gw.shape[1], bits, group_size).to(scales.dtype)
    gs = _group_sum(gw * levels, scales.shape[1], group_size)
    return gs, None if zeros is None else -scales * _group_sum(gw, scales.shape[1], group_size)


def _group_sum(values: Tensor, groups: int, group_size: int) -> Tensor:
    """(N, in_features) -> (N, groups): the sum over each group."""
    padded = F.pad(values, (0, groups * group_size - values.shape[1])) if group_size else values
    return padded.reshape(padded.shape[0], groups, padded.shape[1] // max(groups, 1)).sum(2)


def _cost(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *sizes: int,
) -> Cost:
    rows = x.numel() // max(x.shape[-1], 1)
    weights = qweight.nbytes + scales.nbytes + sum(t.nbytes for t in (zeros, bias) if t is not None)
    out = rows * qweight.shape[0]
    return Cost(2 * out * x.shape[-1], x.nbytes + weights + out * x.element_size())


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...],
        k: int,
        n: int,
        bits: int,
        group_size: int,
        symmetric: bool,
        bias: bool = True,
        activation_bits: int = 0,
    ) -> tuple[Tensor | int | None, ...]:
        draw = Draw(dtype)
        q = quantize(draw(n, k), bits, group_size, symmetric)
        return draw(*lead, k), *q, draw(n) if bias else None, bits, group_size, activation_bits

    for bits in (8, 4):
        yield Sample(f"int{bits}-1row", make((1,), 64, 48, bits, 0, True))
        yield Sample(f"int{bits}-1row-grouped", make((1,), 128, 48, bits, 32, False))
        yield Sample(f"int{bits}-odd", make((2, 3), 33, 41, bits, 8, False, bias=False))
        yield Sample(f"int{bits}-grouped-symmetric", make((3,), 34, 7, bits, 10, True))
        yield Sample(f"int{bits}-many-rows", make((70,), 100, 90, bits, 0, False))
        yield Sample(f"int{bits}-0rows", make((0,), 33, 41, bits, 8, True))
        yield Sample(f"int{bits}-rounded-1row", make((1,), 300, 48, bits, 0, True, activation_bits=8))
        yield Sample(f"int{bits}-rounded-odd", make((2, 3), 33, 41, bits, 8, False, False, 8))
        yield Sample(f"int{bits}-rounded-many-rows", make((70,), 201, 90, bits, 128, False, activation_bits=8))
        yield Sample(f"int{bits}-rounded-0rows", make((0,), 33, 41, bits, 0, True, activation_bits=8))
        base = make((5,), 33, 41, bits, 8, False)
        yield Sample(f"int{bits}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"int{bits}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define(
    Op(
        name=_NAME,
        schema=(
            "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros=None, Tensor? bias=None, int bits=8, "
            "int group_size=0, int activation_bits=0) -> Tensor"
        ),
        check=_check,
        reference=_reference,
        fake=_fake,
        cost=_cost,
        samples=_samples,
        backward=_backward,
        autocast=(0, 4),
    )
)
