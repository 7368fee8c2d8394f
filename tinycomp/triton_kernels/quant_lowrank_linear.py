"""Triton backend of `quant_lowrank_linear`: one launch per rounded factor."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels._product import Rounded
from tinycomp.triton_kernels.lowrank_linear import lowrank


@kernel_op("quant_lowrank_linear")
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
    rounded_r = Rounded(bits, r_scales, r_zeros, group_size)
    return lowrank(x, r, t, order, bias, rounded_r, Rounded(bits, t_scales, t_zeros, group_size))
