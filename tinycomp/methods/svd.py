"""Truncated SVD in the norm of the loss, stored in as many numbers as a rank-r matrix has degrees of freedom.

min |Lgᵀ (W - L R) Ls|_F with S = Ls Lsᵀ the raw second moment of the inputs and G = Lg Lgᵀ that of the loss gradient
at the outputs (K-FAC); r independent rows of L R are stored, the others as T times those: r (m + n - r) numbers.

Source: Eckart and Young 1936; input whitening as in SVD-LLM (Wang et al. 2024); Kronecker-factored curvature from
Martens and Grosse 2015. The pivoted storage and the two-sided weighting are this library's.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from tinycomp.linalg import Truncation, pivoted_factors
from tinycomp.methods._base import Linear, Method, MethodConfig, Option, Result, Unit
from tinycomp.methods._low_rank import (
    check_rank,
    low_rank_result,
    rank_grid,
    stored_bits,
    stored_size,
)
from tinycomp.methods._options import dense_option, require_finite


class SVD(MethodConfig):
    """Truncated SVD.

    Args:
        rank: one rank for every target, instead of `ratio`.
        weighting: "loss" whitens inputs and weights outputs by the loss gradient, "inputs" whitens inputs only,
            "none" is the plain SVD of the weight (data-free).
        pivoted: store r (m + n - r) numbers instead of r (m + n).
    """

    rank: int | None = Field(default=None, ge=1)
    weighting: str = Field(default="loss", pattern="^(loss|inputs|none)$")
    pivoted: bool = True


def needs(config: SVD) -> frozenset[str]:
    return {
        "none": frozenset[str](),
        "inputs": frozenset({"gram"}),
        "loss": frozenset({"gram", "output_gram"}),
    }[config.weighting]


def _truncation(linear: Linear, config: SVD) -> Truncation:
    require_finite(linear)
    gram = None if config.weighting == "none" else linear.gram
    output_gram = linear.output_gram if config.weighting == "loss" else None
    return Truncation(linear.weight, gram, output_gram, config.damping, linear.remember)


def decompose(linear: Linear, rank: int, config: SVD) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(rows (r, n), t, order): pivoted t is (m - r, r) with order int32 (m,); plain t is (m, r) with order None."""
    check_rank(linear, rank)
    left, right = _truncation(linear, config).factors(rank)
    if config.pivoted:
        return pivoted_factors(left, right)
    return right.float(), left.float(), None


def options(unit: Unit, config: SVD) -> list[Option]:
    (linear,) = unit.linears
    m, n = linear.weight.shape
    losses = _truncation(linear, config).losses()
    ranks = [config.rank] if config.rank else rank_grid(m, n, config.pivoted)
    for rank in ranks:
        check_rank(linear, rank)
    found = [
        Option(
            stored_size(m, n, r, config.pivoted),
            stored_bits(m, n, r, linear.dtype, config.pivoted),
            float(losses[r]),
            {"rank": r},
        )
        for r in ranks
    ]
    return found if config.rank else [*found, dense_option(unit)]


def build(unit: Unit, choice: dict[str, Any], config: SVD) -> Result:
    (linear,) = unit.linears
    rows, t, order = decompose(linear, choice["rank"], config)
    return low_rank_result(linear, "SVD", choice["rank"], rows, t, order)


METHOD = Method("SVD", SVD, needs, options, build)
