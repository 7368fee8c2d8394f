"""Triton backend of `select_pivots`: one launch per pivot and no word with the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinycomp.triton_kernels._launch import kernel_op

# Rows per program and columns per step.
PIVOT_BLOCK = (8, 64)


@triton.jit
def pivot_kernel(
    rest_ptr,
    taken_ptr,
    scores_ptr,
    rows_ptr,
    pivots_ptr,
    rows,
    columns,
    step,
    steps,
    QR: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Decide pivot step - 1 from the programs' maxima, remove its row from the others, leave the next maxima."""
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    blocks = tl.num_programs(0)
    pivot = -1
    if step > 0:
        b = tl.arange(0, BLOCKS)
        at = (step + 1) % 2 * blocks + b
        score = tl.load(scores_ptr + at, mask=b < blocks, other=-2.0)
        row = tl.load(rows_ptr + at, mask=b < blocks, other=2147483647)
        pivot = tl.min(tl.where(score == tl.max(score, 0), row, 2147483647), 0)
        if tl.program_id(0) == 0:
            tl.store(pivots_ptr + step - 1, pivot.to(tl.int64))
            tl.store(taken_ptr + pivot, 1)
    if step < steps:
        taken = tl.load(taken_ptr + i, mask=i < rows, other=1)
        free = (taken == 0) & (i != pivot) & (i < rows)
        own = rest_ptr + i[:, None].to(tl.int64) * columns
        removed = rest_ptr + tl.maximum(pivot, 0).to(tl.int64) * columns
        share = tl.zeros((BR,), tl.float64)
        if step > 0:
            if QR:
                square = tl.zeros((BC,), tl.float64)
                for start in range(0, columns, BC):
                    c = start + tl.arange(0, BC)
                    value = tl.load(removed + c, mask=c < columns, other=0.0)
                    square += value * value
                norm = tl.maximum(tl.sqrt(tl.sum(square, 0)), 2.2250738585072014e-308)
                for start in range(0, columns, BC):
                    c = start + tl.arange(0, BC)
                    inside = free[:, None] & (c < columns)[None, :]
                    unit = tl.load(removed + c, mask=c < columns, other=0.0) / norm
                    share += tl.sum(tl.load(own + c[None, :], mask=inside, other=0.0) * unit[None, :], 1)
                share /= norm
            else:
                entry = tl.load(removed + step - 1)
                entry = tl.where(entry == 0, 1.0, entry)
                share = tl.load(rest_ptr + i.to(tl.int64) * columns + step - 1, mask=free, other=0.0) / entry
        total = tl.zeros((BR,), tl.float64)
        for start in range(0, columns, BC):
            c = start + tl.arange(0, BC)
            inside = free[:, None] & (c < columns)[None, :]
            value = tl.load(own + c[None, :], mask=inside, other=0.0)
            if step > 0:
                value -= share[:, None] * tl.load(removed + c, mask=c < columns, other=0.0)[None, :]
                tl.store(own + c[None, :], value, mask=inside)
            if QR:
                total += tl.sum(value * value, 1)
            else:
                total += tl.sum(tl.where((c == step)[None, :], tl.abs(value), 0.0), 1)
        total = tl.where(free, total, tl.where(i < rows, -1.0, -2.0))
        best = tl.max(total, 0)
        tl.store(scores_ptr + step % 2 * blocks + tl.program_id(0), best)
        tl.store(rows_ptr + step % 2 * blocks + tl.program_id(0), tl.min(tl.where(total == best, i, 2147483647), 0))


@kernel_op("select_pivots")
def select_pivots(a: Tensor, k: int, method: str = "qr") -> Tensor:
    pivots = a.new_empty(k, dtype=torch.int64)
    if k == 0:
        return pivots
    rest = a.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    br, bc = PIVOT_BLOCK
    blocks = triton.cdiv(a.shape[0], br)
    scores = a.new_empty(2, blocks, dtype=torch.float64)
    rows = a.new_empty(2, blocks, dtype=torch.int32)
    taken = a.new_zeros(a.shape[0], dtype=torch.int32)
    for step in range(k + 1):
        torch.library.wrap_triton(pivot_kernel)[(blocks,)](
            rest,
            taken,
            scores,
            rows,
            pivots,
            a.shape[0],
            a.shape[1],
            step,
            k,
            QR=method == "qr",
            BR=br,
            BC=bc,
            BLOCKS=triton.next_power_of_2(blocks),
        )
    return pivots
