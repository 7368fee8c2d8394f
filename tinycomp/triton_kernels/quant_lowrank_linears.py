"""Triton backend of `quant_lowrank_linears`: for few inputs one launch for all layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tinycomp.triton_kernels._group import Layer, low_rank, with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels._product import Rounded


@kernel_op("quant_lowrank_linears")
@with_signature("quant_lowrank_linears")
def quant_lowrank_linears(x: Tensor, *args: Any) -> Tensor:
    bits, group_size, _ = args[24:]
    layers = []
    for r, r_scales, t, t_scales, order, r_zeros, t_zeros, bias in (args[i : i + 8] for i in (0, 8, 16)):
        if r is not None:
            on_r, on_t = (Rounded(bits, s, z, group_size) for s, z in ((r_scales, r_zeros), (t_scales, t_zeros)))
            layers.append(Layer(r, t, order, bias, on_r, on_t))
    return low_rank(x, layers)
