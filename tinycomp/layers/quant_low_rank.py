"""Low-rank linear layer whose factors are rounded to int8 or int4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.layers._base import CompressedLinear, buffers_and_bias, check_size
from tinycomp.layers.grouped import Grouped
from tinycomp.layers.low_rank import LowRankLinear
from tinycomp.ops.quant_linear import check_activation_bits, dequantize, quantize

_BUFFERS = ("r", "r_scales", "t", "t_scales", "order", "r_zeros", "t_zeros")


class QuantLowRankLinear(Grouped, CompressedLinear):
    """`LowRankLinear` with rounded factors: r = (q - zeros) scales and t likewise, by row or by group of inputs.

    Buffers r, r_scales, t, t_scales, with `symmetric=False` r_zeros and t_zeros, and `order` where pivoted, are those
    of `ops.quant_lowrank_linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: 1..min(in_features, out_features).
        bits: 8 or 4, for both factors.
        group_size: inputs per scale, even; 0 for the whole row.
        bias: whether a bias is added.
        pivoted: storage, see `LowRankLinear`.
        symmetric: levels symmetric around zero, without zeros.
        activation_bits: 0, or 8 to round inputs and the middle by row and group.
        device: where the tensors are.
        dtype: dtype of scales, zeros and bias.
    """

    op, group_op = "quant_lowrank_linear", "quant_lowrank_linears"
    order: Tensor | None
    r: Tensor
    r_scales: Tensor
    r_zeros: Tensor | None
    t: Tensor
    t_scales: Tensor
    t_zeros: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bits: int,
        group_size: int = 0,
        bias: bool = True,
        pivoted: bool = False,
        symmetric: bool = True,
        activation_bits: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_size("QuantLowRankLinear", "rank", rank, 1, min(in_features, out_features))
        check_size("QuantLowRankLinear", "group_size", group_size, 0)
        check_activation_bits("QuantLowRankLinear", activation_bits)
        if bits not in (4, 8) or group_size % 2:
            got = f"bits {bits!r}, group_size {group_size}"
            raise ValueError(f"QuantLowRankLinear: {got}, allowed 4 or 8 and an even number; change it")
        self.rank, self.pivoted, self.bits, self.group_size = rank, pivoted, bits, group_size
        self.symmetric, self.activation_bits = symmetric, activation_bits
        sizes = {"r": (rank, in_features), "t": (out_features - rank if pivoted else out_features, rank)}
        for name, (rows, columns) in sizes.items():
            groups = -(-columns // group_size) if group_size else 1
            stored, integer = (columns, torch.int8) if bits == 8 else (-(-columns // 2), torch.uint8)
            self.register_buffer(name, torch.zeros(rows, stored, dtype=integer, device=device))
            self.register_buffer(f"{name}_scales", torch.ones(rows, groups, device=device, dtype=dtype))
            zeros = None if symmetric else torch.zeros(rows, groups, device=device, dtype=dtype)
            self.register_buffer(f"{name}_zeros", zeros)
        order = torch.arange(out_features, dtype=torch.int32, device=device) if pivoted else None
        self.register_buffer("order", order)

    @classmethod
    def from_low_rank(
        cls, layer: LowRankLinear, bits: int, group_size: int = 0, symmetric: bool = True, activation_bits: int = 0
    ) -> QuantLowRankLinear:
        """Round both factors of a layer to the nearest levels."""
        r, t = layer.down.weight.detach(), layer.up.weight.detach()
        rounded = cls(
            *(layer.in_features, layer.out_features, layer.rank, bits, group_size, layer.bias is not None),
            *(layer.pivoted, symmetric, activation_bits),
            device="meta",
            dtype=r.dtype,
        )
        rounded.r, rounded.r_scales, rounded.r_zeros = quantize(r, bits, group_size, symmetric)
        rounded.t, rounded.t_scales, rounded.t_zeros = quantize(t, bits, group_size, symmetric)
        rounded.order = layer.order
        rounded.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach())
        rounded.weight = r.new_empty(0)
        return rounded

    @property
    def stored_numbers(self) -> int:
        """Rounded factors, scales and zeros; two 4-bit numbers that share a byte count as two."""
        kept = [self.r_scales, self.r_zeros, self.t_scales, self.t_zeros]
        factors = self.rank * (self.in_features + self.t.shape[0])
        return factors + sum(t.numel() for t in kept if t is not None)

    def group_tensors(self) -> list[Any]:
        return buffers_and_bias(self, _BUFFERS)

    def group_numbers(self) -> tuple[int, ...]:
        return self.bits, self.group_size, self.activation_bits

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors that the levels stand for, in the layer's dtype."""
        r = dequantize(self.r, self.r_scales, self.r_zeros, self.in_features, self.bits, self.group_size)
        t = dequantize(self.t, self.t_scales, self.t_zeros, self.rank, self.bits, self.group_size)
        return r.to(self.r_scales.dtype), t.to(self.r_scales.dtype)

    def dense_weight(self) -> Tensor:
        r, t = self.factors()
        return LowRankLinear.from_factors(r, t, self.order).dense_weight().detach()

    def extra_repr(self) -> str:
        more = f"rank={self.rank}, pivoted={self.pivoted}, bits={self.bits}, group_size={self.group_size}"
        return f"{super().extra_repr()}, {more}, activation_bits={self.activation_bits}"
