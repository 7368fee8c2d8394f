"""Triton backend of `sliced_linear`."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import product


@kernel_op("sliced_linear")
def sliced_linear(x: Tensor, w: Tensor, bias: Tensor | None, in_features: int, out_features: int) -> Tensor:
    y = x.new_empty(*x.shape[:-1], out_features)
    flat = rows_of(x)[:, :in_features]
    product(flat, w[:out_features, :in_features], y.view(flat.shape[0], out_features), bias=adjacent(bias))
    return y
