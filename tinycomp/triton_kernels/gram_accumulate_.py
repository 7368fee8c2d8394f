"""Triton backend of `gram_accumulate_`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op, rows_of

# Columns per side of a tile, rows per step.
GRAM_BLOCK = (32, 32)


@triton.jit
def gram_kernel(x_ptr, x_stride, gram_ptr, gram_stride, gram_step, rows, columns, BC: tl.constexpr, BR: tl.constexpr):
    """Add one tile of xᵀ x and, off the diagonal, its mirror image."""
    first = tl.program_id(0)
    second = tl.program_id(1)
    if first <= second:
        a = first.to(tl.int64) * BC + tl.arange(0, BC)
        b = second.to(tl.int64) * BC + tl.arange(0, BC)
        sums = tl.zeros((BC, BC), tl.float32)
        for start in range(0, rows, BR):
            r = (start + tl.arange(0, BR)).to(tl.int64)
            left = tl.load(
                x_ptr + r[None, :] * x_stride + a[:, None], mask=(r < rows)[None, :] & (a < columns)[:, None], other=0.0
            )
            right = tl.load(
                x_ptr + r[:, None] * x_stride + b[None, :], mask=(r < rows)[:, None] & (b < columns)[None, :], other=0.0
            )
            sums = tl.dot(left, right, sums, input_precision="ieee")
        inside = (a < columns)[:, None] & (b < columns)[None, :]
        at = gram_ptr + a[:, None] * gram_stride + b[None, :] * gram_step
        tl.store(at, tl.load(at, mask=inside, other=0.0) + sums, mask=inside)
        if first != second:
            mirror = gram_ptr + b[None, :] * gram_stride + a[:, None] * gram_step
            tl.store(mirror, tl.load(mirror, mask=inside, other=0.0) + sums, mask=inside)


def _why_not(gram: Tensor, *args: Any) -> str | None:
    if gram.dtype == torch.float64:
        return "the Triton kernel of gram_accumulate_ adds in float32, gram is float64"
    return None


@kernel_op("gram_accumulate_", mutates=("gram",), why_not=_why_not)
def gram_accumulate_(gram: Tensor, x: Tensor) -> None:
    x = rows_of(x)
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    bc, br = GRAM_BLOCK
    tiles = triton.cdiv(columns, bc)
    torch.library.wrap_triton(gram_kernel)[(tiles, tiles)](
        x, x.stride(0), gram, gram.stride(0), gram.stride(1), rows, columns, BC=bc, BR=br
    )
