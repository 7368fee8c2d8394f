"""Rounding one matrix: what `Rounding` does to a weight, and the low-bit factors of the other methods to theirs."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from tinycomp import linalg, ops
from tinycomp.edits import Replace
from tinycomp.methods._base import Linear, MethodConfig, Result, record

INT4_GROUP = 64
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
FEEDBACK_BLOCK = 64  # inputs whose errors are spread one by one; beyond the block they go in one product
FEEDBACK_DAMPING = 1e-3


class RoundedConfig(MethodConfig):
    """Fields of the methods that may round what they store.

    Args:
        bits: of a stored number: 16 keeps the model's dtype; 8 rounds by row, 4 by group of 64 inputs, and matrices
            that keep their full size are rounded as well. `ratio` counts numbers, whatever their bits; the loss of
            rounding is part of every predicted loss.
        activation_bits: 8 also rounds the layer's inputs as it runs, faster for many rows; not in the predicted loss.
    """

    bits: Literal[16, 8, 4] = 16
    activation_bits: Literal[0, 8] = 0

    @model_validator(mode="after")
    def _rounded_together(self) -> RoundedConfig:
        if self.activation_bits and self.bits == 16:
            raise ValueError("activation_bits: got 8 with bits=16, allowed with bits 8 or 4; set bits=8")
        return self


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


def round_weight(linear: Linear, bits: int, group_size: int, search: bool) -> tuple[ops.Quantized, Tensor, int]:
    """The rounded weight, its error (m, n) and the bits it takes on disk."""
    importance = linear.gram.diagonal() if search and linear.gram is not None else None
    packed = rounded(linear.weight.to(linear.dtype), bits, group_size, importance)
    error = linear.weight - ops.dequantize(*packed, linear.in_features, bits, group_size).to(linear.dtype).float()
    return packed, error, 8 * sum(t.nbytes for t in packed if t is not None)


def rounded_result(
    linear: Linear, method: str, bits: int, group_size: int, search: bool, activation_bits: int = 0
) -> Result:
    """Edit, tensors and record for the whole matrix as one QuantLinear."""
    packed, error, stored = round_weight(linear, bits, group_size, search)
    row = record(linear, method, linear.weight.numel(), stored, error, bits=bits, group_size=group_size)
    return quantized(linear, packed, bits, group_size, activation_bits, [row])


def quantized(
    linear: Linear, packed: ops.Quantized, bits: int, group_size: int, activation_bits: int, rows: list[dict[str, Any]]
) -> Result:
    """Edit and tensors that put a QuantLinear of `packed` in the linear's place, beside the records `rows`."""
    kwargs = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bits": bits,
        "group_size": group_size,
        "bias": linear.bias is not None,
        "symmetric": packed.zeros is None,
        "activation_bits": activation_bits,
    }
    tensors = {f"{linear.path}.{name}": t for name, t in packed._asdict().items() if t is not None}
    if linear.bias is not None:
        tensors[f"{linear.path}.bias"] = linear.bias.to(linear.dtype)
    return Result([Replace(linear.path, layer="QuantLinear", kwargs=kwargs)], tensors, rows)


def spread_errors(
    weight: Tensor, packed: ops.Quantized, bits: int, group_size: int, upper: Tensor, moment: Tensor
) -> ops.Quantized:
    """Integers chosen input by input, so that later inputs make up for the errors of earlier ones; scales stay.

    Lowers tr((W - W') H (W - W')ᵀ): the error e_j = (w_j - w'_j) / U_jj of column j is taken from the later columns as
    e_j U_j, where H^-1 = Uᵀ U. A row for which that came out worse keeps its integers.

    Args:
        weight: (m, n) floating.
        packed: its rounding.
        bits: 8 or 4.
        group_size: inputs per scale, 0 for the row.
        upper: U of `feedback`, (n, n) float32.
        moment: H (n, n) float32, second moment of the inputs.

    Source: Frantar et al. 2022, "GPTQ", arXiv 2210.17323, with fixed scales and in the order of the inputs.
    """
    n = weight.shape[1]
    repeat = group_size or n
    scales, zeros = (
        None if t is None else t.float().repeat_interleave(repeat, 1)[:, :n].T for t in (packed.scales, packed.zeros)
    )
    assert scales is not None
    shift = torch.zeros_like(scales) if zeros is None else zeros - 8
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    left = weight.T.float().clone(memory_format=torch.contiguous_format)  # changed below, never the caller's
    q = torch.empty_like(left)
    for start in range(0, n, FEEDBACK_BLOCK):
        stop = min(start + FEEDBACK_BLOCK, n)
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            q[j] = (left[j] / scales[j] + shift[j]).round_().clamp_(low, high)
            errors[j - start] = (left[j] - (q[j] - shift[j]) * scales[j]) / upper[j, j]
            left[j:stop].addr_(upper[j, j:stop], errors[j - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    levels = q.T.to(torch.int8)
    spread = packed._replace(qweight=ops.pack_int4(levels) if bits == 4 else levels.contiguous())

    def cost(made: ops.Quantized) -> Tensor:
        error = weight.float() - ops.dequantize(*made, n, bits, group_size)
        return ((error @ moment) * error).sum(1, keepdim=True)

    better = cost(spread) < cost(packed)
    return packed._replace(qweight=torch.where(better, spread.qweight, packed.qweight))


def feedback(moment: Tensor) -> Tensor:
    """U (n, n) float32, upper triangular, with (H + damping)^-1 = Uᵀ U."""
    inverse = torch.cholesky_inverse(linalg.cholesky(moment, FEEDBACK_DAMPING, "moment of rounded inputs"))
    return linalg.cholesky(inverse, 0.0, "inverse moment of rounded inputs").T.float()
