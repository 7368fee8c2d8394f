"""Triton backend of `quant_lowrank_linear`."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._group import Layer, low_rank
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels._product import Rounded


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
    on_r, on_t = (Rounded(bits, s, z, group_size) for s, z in ((r_scales, r_zeros), (t_scales, t_zeros)))
    return low_rank(x, [Layer(r, t, order, bias, on_r, on_t)])
