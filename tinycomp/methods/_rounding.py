"""Rounding one matrix: what `Rounding` does to a weight, and the low-bit factors of the other methods to theirs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp import ops

INT4_GROUP = 64
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


def default_group(bits: int) -> int:
    """Inputs per scale: the whole row (0) for 8 bits, where scales by group gain little."""
    return 0 if bits == 8 else INT4_GROUP


def rounded_bits(rows: int, columns: int, bits: int, group_size: int, number_bits: int) -> int:
    """Bits on disk of a rounded (rows, columns) matrix: scales, and for 4 bits zeros, in numbers of `number_bits`."""
    groups = -(-columns // group_size) if group_size else 1
    return rows * (8 * -(-columns * bits // 8) + groups * number_bits * (1 if bits == 8 else 2))


def rounded(weight: Tensor, bits: int, group_size: int, importance: Tensor | None = None) -> ops.Quantized:
    """Round an (m, n) weight, 8 bits symmetric and 4 bits min-max; scales take its dtype.

    Args:
        weight: (m, n) floating.
        bits: 8 or 4.
        group_size: inputs per scale, 0 for the row.
        importance: (n,) non-negative weight of every input in the clip search; None for plain rounding.
    """
    plain = ops.quantize(weight, bits, group_size, symmetric=bits == 8)
    if importance is None:
        return plain
    wide, cost = _grouped(weight.float(), group_size), _grouped(importance.float()[None], group_size)
    low, high = wide.amin(2, keepdim=True), wide.amax(2, keepdim=True)
    n = weight.shape[1]
    least = torch.full_like(low, torch.inf)
    best_clip = torch.ones_like(low)
    for clip in CLIPS:
        clipped = _ungrouped(wide.clamp(low * clip, high * clip), n).to(weight.dtype)
        tried = ops.dequantize(*ops.quantize(clipped, bits, group_size, symmetric=bits == 8), n, bits, group_size)
        error = (cost * (wide - _grouped(tried, group_size)).square()).sum(2, keepdim=True)
        best_clip = torch.where(error < least, clip, best_clip)
        least = torch.minimum(least, error)
    clipped = _ungrouped(wide.clamp(low * best_clip, high * best_clip), n).to(weight.dtype)
    q, scales, zeros = ops.quantize(clipped, bits, group_size, symmetric=bits == 8)
    integers = _grouped(ops.dequantize(q, torch.ones_like(scales), zeros, n, bits, group_size), group_size)
    bottom = (cost * integers.square()).sum(2)
    fitted = (cost * wide * integers).sum(2) / bottom.clamp_min(1e-30)
    scales = torch.where((bottom > 0) & (fitted > 0), fitted, scales.float()).to(weight.dtype)
    return ops.Quantized(q, scales, zeros)


def _grouped(w: Tensor, group_size: int) -> Tensor:
    """(m, n) -> (m, groups, inputs of a group), the last group padded with zeros."""
    size = group_size or w.shape[1]
    padded = F.pad(w, (0, -w.shape[1] % size))
    return padded.reshape(w.shape[0], padded.shape[1] // size, size)


def _ungrouped(w: Tensor, n: int) -> Tensor:
    return w.reshape(w.shape[0], -1)[:, :n]
