"""Triton backend of `column_norms`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op, rows_of

# Rows and columns per step.
NORM_BLOCK = (32, 64)


@triton.jit
def column_norms_kernel(w_ptr, stride, norms_ptr, rows, columns, BR: tl.constexpr, BC: tl.constexpr):
    """Squares added in float64, in a fixed order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    sums = tl.zeros((BC,), tl.float64)
    for start in range(0, rows, BR):
        r = (start + tl.arange(0, BR)).to(tl.int64)
        inside = (r < rows)[:, None] & (c < columns)[None, :]
        w = tl.load(w_ptr + r[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float64)
        sums += tl.sum(w * w, 0)
    tl.store(norms_ptr + c, tl.sqrt(sums).to(tl.float32), mask=c < columns)


@kernel_op("column_norms")
def column_norms(w: Tensor) -> Tensor:
    norms = w.new_empty(w.shape[1], dtype=torch.float32)
    if w.shape[1]:
        w = rows_of(w)
        br, bc = NORM_BLOCK
        torch.library.wrap_triton(column_norms_kernel)[(triton.cdiv(w.shape[1], bc),)](
            w, w.stride(0), norms, w.shape[0], w.shape[1], BR=br, BC=bc
        )
    return norms
