"""Triton backend of `lowrank_linears`: for few inputs two launches for all layers."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._group import Layer, run_group, with_signature
from tinycomp.triton_kernels._launch import kernel_op
from tinycomp.triton_kernels._product import PLAIN


@kernel_op("lowrank_linears")
@with_signature("lowrank_linears")
def lowrank_linears(x: Tensor, *tensors: Tensor | None) -> Tensor:
    parts = [tensors[i : i + 4] for i in range(0, len(tensors), 4)]
    there = [Layer(r, t, order, bias, PLAIN, PLAIN) for r, t, order, bias in parts if r is not None and t is not None]
    return run_group(x, there)
