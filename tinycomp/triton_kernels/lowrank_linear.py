"""Triton backend of `lowrank_linear`: one launch per factor."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._product import PLAIN, Rounded, product


def lowrank(
    x: Tensor,
    r: Tensor,
    t: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    rounded_r: Rounded = PLAIN,
    rounded_t: Rounded = PLAIN,
) -> Tensor:
    """z = x rᵀ, then t zᵀ; with an order both are outputs. The factors may be rounded."""
    rank = r.shape[0]
    out_features = t.shape[0] + (0 if order is None else rank)
    y = x.new_empty(*x.shape[:-1], out_features)
    flat, order, bias = rows_of(x), adjacent(order), adjacent(bias)
    z = x.new_empty(flat.shape[0], rank)
    out = y.view(flat.shape[0], out_features)
    if order is None:
        product(flat, r, None, rounded=rounded_r, kept=z)
        product(z, t, out, rounded=rounded_t, bias=bias)
    else:
        product(flat, r, out, rounded=rounded_r, kept=z, order=order[:rank], bias=bias)
        product(z, t, out, rounded=rounded_t, order=order[rank:], bias=bias)
    return y


@kernel_op("lowrank_linear")
def lowrank_linear(x: Tensor, r: Tensor, t: Tensor, order: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return lowrank(x, r, t, order, bias)
