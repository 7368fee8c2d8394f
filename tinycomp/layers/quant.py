"""Linear layer with rounded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.layers._base import CompressedLinear, buffers_and_bias, check_size
from tinycomp.layers.grouped import Grouped
from tinycomp.ops.quant_linear import check_activation_bits, dequantize, quantize

_BUFFERS = ("qweight", "scales", "zeros")


class QuantLinear(Grouped, CompressedLinear):
    """Weights rounded to int8 or int4: y = x wᵀ + bias, w = (q - zeros) scales, by row or by group of inputs.

    Integer tensors never change with the model's dtype. Scales and zeros have it: a model that is loaded in a dtype
    other than its own rounds them, which moves each weight by up to one rounding of that dtype.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bits: 8 or 4.
        group_size: inputs per scale, even; 0 for the whole row.
        bias: whether a bias is added.
        symmetric: levels symmetric around zero, without `zeros`.
        activation_bits: 0 leaves inputs as they are; 8 rounds them by row and group on the way in, which is faster for
            many inputs.
        device: where the tensors are.
        dtype: dtype of scales, zeros and bias.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None

    op, group_op = "quant_linear", "quant_linears"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = 0,
        bias: bool = True,
        symmetric: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation_bits: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_size("QuantLinear", "group_size", group_size, 0)
        if bits not in (4, 8):
            raise ValueError(f"QuantLinear: bits is {bits!r}, allowed 4 or 8; change it")
        if group_size % 2:
            raise ValueError(f"QuantLinear: group_size is {group_size}, allowed even numbers or 0; change it")
        check_activation_bits("QuantLinear", activation_bits)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.activation_bits = activation_bits
        groups = -(-in_features // group_size) if group_size else 1
        columns, integer = (in_features, torch.int8) if bits == 8 else (-(-in_features // 2), torch.uint8)
        self.register_buffer("qweight", torch.zeros(out_features, columns, dtype=integer, device=device))
        self.register_buffer("scales", torch.ones(out_features, groups, device=device, dtype=dtype))
        zeros = None if symmetric else torch.zeros(out_features, groups, device=device, dtype=dtype)
        self.register_buffer("zeros", zeros)

    @classmethod
    def from_linear(
        cls, module: nn.Linear, bits: int, group_size: int = 0, symmetric: bool = True, activation_bits: int = 0
    ) -> QuantLinear:
        """Round the weight of an nn.Linear to the nearest levels."""
        w = module.weight.detach()
        layer = cls(
            module.in_features,
            module.out_features,
            bits,
            group_size,
            module.bias is not None,
            symmetric,
            "meta",
            w.dtype,
            activation_bits,
        )
        layer.qweight, layer.scales, layer.zeros = quantize(w, bits, group_size, symmetric)
        layer.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
        layer.weight = w.new_empty(0)
        return layer

    @property
    def stored_numbers(self) -> int:
        """Rounded weights, scales and zeros; two 4-bit weights that share a byte count as two."""
        zeros = 0 if self.zeros is None else self.zeros.numel()
        return self.in_features * self.out_features + self.scales.numel() + zeros

    def group_tensors(self) -> list[Any]:
        return buffers_and_bias(self, _BUFFERS)

    def group_numbers(self) -> tuple[int, ...]:
        return self.bits, self.group_size, self.activation_bits

    def dense_weight(self) -> Tensor:
        w = dequantize(self.qweight, self.scales, self.zeros, self.in_features, self.bits, self.group_size)
        return w.to(self.scales.dtype)

    def extra_repr(self) -> str:
        more = f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
        more += f", activation_bits={self.activation_bits}"
        return f"{super().extra_repr()}, {more}"
