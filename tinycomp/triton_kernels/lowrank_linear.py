"""Triton backend of `lowrank_linear`."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._group import Layer, low_rank
from tinycomp.triton_kernels._launch import kernel_op


@kernel_op("lowrank_linear")
def lowrank_linear(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return low_rank(x, [Layer(r, t, order, bias)])
