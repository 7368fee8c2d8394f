"""Triton backend of `cur_linear`."""

from __future__ import annotations

from torch import Tensor

from tinycomp.triton_kernels._launch import adjacent, kernel_op, rows_of
from tinycomp.triton_kernels._stages import Part, run_stages


@kernel_op("cur_linear")
def cur_linear(x: Tensor, r: Tensor, u: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = rows_of(x)
    y = x.new_empty(*x.shape[:-1], c.shape[0])
    z, linked = x.new_empty(flat.shape[0], r.shape[0]), x.new_empty(flat.shape[0], u.shape[0])
    out = y.view(flat.shape[0], c.shape[0])
    run_stages([Part(flat, r, kept=z)], [Part(z, u, kept=linked)], [Part(linked, c, out, bias=adjacent(bias))])
    return y
