"""What the low-rank methods share: sizes, the grid of ranks, and the edit that stores pivoted factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinycomp.edits import Replace
from tinycomp.linalg import pivoted_rank
from tinycomp.methods._base import Linear, Result, record

GRID = 64  # candidate ranks per matrix: fine enough that rounding to it costs under 1 % of the budget


def stored_size(m: int, n: int, rank: int, pivoted: bool = True) -> int:
    """Numbers a rank-r factorisation of an (m, n) weight stores."""
    return rank * (m + n - rank) if pivoted else rank * (m + n)


def stored_bits(m: int, n: int, rank: int, dtype: torch.dtype, pivoted: bool = True) -> int:
    """Bits on disk, the int32 row order of the pivoted form included."""
    return stored_size(m, n, rank, pivoted) * 8 * dtype.itemsize + (32 * m if pivoted else 0)


def rank_for(m: int, n: int, ratio: float, pivoted: bool = True) -> int:
    """Largest rank stored in at most `ratio * m * n` numbers, at least 1."""
    budget = ratio * m * n
    rank = pivoted_rank(budget, m, n) if pivoted else int(budget / (m + n))
    return max(min(rank, m, n), 1)


def rank_grid(m: int, n: int, pivoted: bool = True) -> list[int]:
    """Ascending ranks whose sizes are spread evenly below the dense size."""
    ranks = {rank_for(m, n, (i + 1) / GRID, pivoted) for i in range(GRID)}
    return sorted(r for r in ranks if stored_size(m, n, r, pivoted) < m * n)


def check_rank(linear: Linear, rank: int) -> None:
    """Raise ValueError when the matrix has no such rank."""
    limit = min(linear.out_features, linear.in_features)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"{linear.path}: got rank {rank}, allowed 1 to {limit} for a {linear.out_features} x "
            f"{linear.in_features} weight; lower `rank`, or give `ratio` instead"
        )


def low_rank_result(
    linear: Linear, method: str, rank: int, rows: Tensor, t: Tensor, order: Tensor | None, **extra: Any
) -> Result:
    """Edit, tensors and record for y = [rows; t rows] x (pivoted, with `order`) or y = t rows x (plain)."""
    m, n = linear.weight.shape
    pivoted = order is not None
    kwargs = {"in_features": n, "out_features": m, "rank": rank, "bias": linear.bias is not None, "pivoted": pivoted}
    tensors = {f"{linear.path}.down.weight": rows.to(linear.dtype), f"{linear.path}.up.weight": t.to(linear.dtype)}
    dense = t.float() @ rows.float()
    if order is not None:
        tensors[f"{linear.path}.order"] = order
        full = torch.empty_like(linear.weight, dtype=torch.float32)
        full[order.long()] = torch.cat([rows.float(), dense])
        dense = full
    if linear.bias is not None:
        tensors[f"{linear.path}.bias"] = linear.bias.to(linear.dtype)
    row = record(
        linear,
        method,
        stored_size(m, n, rank, pivoted),
        stored_bits(m, n, rank, linear.dtype, pivoted),
        linear.weight.float() - dense,
        rank=rank,
        **extra,
    )
    return Result([Replace(linear.path, layer="LowRankLinear", kwargs=kwargs)], tensors, [row])
