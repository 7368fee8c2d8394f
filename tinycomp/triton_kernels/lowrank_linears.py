"""Triton backend of `lowrank_linears`: for few inputs one launch for all layers."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._group import Layer, low_rank, with_signature
from tinycomp.triton_kernels._launch import kernel_op


@kernel_op("lowrank_linears")
@with_signature("lowrank_linears")
def lowrank_linears(x: Tensor, *tensors: Tensor | None) -> Tensor:
    parts = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
    return low_rank(x, [Layer(r, t, order, bias) for r, t, order, bias in parts if r is not None and t is not None])
