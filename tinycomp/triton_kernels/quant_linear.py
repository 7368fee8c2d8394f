"""Triton backend of `quant_linear`: the weight is rebuilt on its way to the tensor cores."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import Rounded, product


@kernel_op("quant_linear")
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
    flat, y = rows_of(x), x.new_empty(*x.shape[:-1], qweight.shape[0])
    out = y.view(flat.shape[0], qweight.shape[0])
    product(flat, qweight, out, rounded=Rounded(bits, scales, zeros, group_size), bias=adjacent(bias))
    return y
