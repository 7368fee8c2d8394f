"""Truncated SVD in the norm of the loss, stored in as many numbers as a rank-r matrix has degrees of freedom.

min |Lgᵀ (W - L R) Ls|_F with S = Ls Lsᵀ the raw second moment of the inputs and G = Lg Lgᵀ that of the loss gradient
at the outputs (K-FAC); r independent rows of L R are stored, the others as T times those: r (m + n - r) numbers.

Source: Eckart and Young 1936; input whitening as in SVD-LLM (Wang et al. 2024); Kronecker-factored curvature from
Martens and Grosse 2015. The pivoted storage and the two-sided weighting are this library's.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tinycomp.linalg import Truncation, pivoted_factors
from tinycomp.methods._base import Linear, Method, Option, Result, Unit
from tinycomp.methods._low_rank import (
    FactorRounding,
    Factors,
    LowRankConfig,
    check_rank,
    full_option,
    full_result,
    low_rank_result,
    rank_grid,
    stored_bits,
    stored_size,
    with_rounding,
)
from tinycomp.methods._options import require_finite


class SVD(LowRankConfig):
    """Truncated SVD. Fields beside these: see `LowRankConfig`.

    Args:
        weighting: "loss" whitens inputs and weights outputs by the loss gradient, "inputs" whitens inputs only,
            "none" is the plain SVD of the weight (data-free).
        pivoted: store r (m + n - r) numbers instead of r (m + n).
    """

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


def decompose(linear: Linear, rank: int, config: SVD) -> Factors:
    """The best factors of this rank, pivoted or plain."""
    check_rank(linear, rank)
    left, right = _truncation(linear, config).factors(rank)
    if config.pivoted:
        return Factors(*pivoted_factors(left, right))
    return Factors(right.float(), left.float(), None)


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
            stored_bits(m, n, r, linear.dtype, config.pivoted, config.bits),
            float(losses[r]),
            {"rank": r},
        )
        for r in ranks
    ]
    if config.bits != 16:
        rounding = FactorRounding(linear, config.bits)
        found = with_rounding(found, lambda o: rounding.loss(decompose(linear, o.choice["rank"], config)))
    return found if config.rank else [*found, full_option(unit, config.bits)]


def build(unit: Unit, choice: dict[str, Any], config: SVD) -> Result:
    (linear,) = unit.linears
    if choice.get("full"):
        return full_result(linear, "SVD", config)
    return low_rank_result(linear, "SVD", decompose(linear, choice["rank"], config), config)


METHOD = Method("SVD", SVD, needs, options, build)
