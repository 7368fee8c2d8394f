"""What the low-rank methods share: sizes, the grid of ranks, rounded factors, and the edit that stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tinycomp import linalg, ops
from tinycomp.edits import Replace
from tinycomp.linalg import pivoted_rank
from tinycomp.methods._base import Linear, Option, Result, Unit, record
from tinycomp.methods._options import dense_option
from tinycomp.methods._rounding import (
    RoundedConfig,
    default_group,
    feedback,
    round_weight,
    rounded,
    rounded_bits,
    rounded_result,
    spread_errors,
)

GRID = 64  # candidate ranks per matrix: fine enough that rounding to it costs under 1 % of the budget
ROUNDING_POINTS = 5  # sizes whose rounding is measured; between them its loss is interpolated
REFIT_DAMPING = 1e-4  # pull towards the exact second factor, when it is refit to the rounded first one


class LowRankConfig(RoundedConfig):
    """Fields of the methods that store two factors. With `bits` below 16 the second one is refit to the rounded first.

    Args:
        rank: one rank for every target, instead of `ratio`.
    """

    rank: int | None = Field(default=None, ge=1)


class Factors(NamedTuple):
    """Plain: W' = t rows, rows (r, n), t (m, r). Pivoted: W'[order] = [rows; t rows], t (m - r, r), int32 order."""

    rows: Tensor
    t: Tensor
    order: Tensor | None

    def dense(self) -> Tensor:
        """W' (m, n) float32."""
        rows = self.rows.float()
        made = self.t.float() @ rows
        if self.order is None:
            return made
        made = torch.cat([rows, made])
        return torch.empty_like(made).index_copy(0, self.order.long(), made)


def stored_size(m: int, n: int, rank: int, pivoted: bool = True) -> int:
    """Numbers a rank-r factorisation of an (m, n) weight stores; scales of rounded ones are not counted."""
    return rank * (m + n - rank) if pivoted else rank * (m + n)


def stored_bits(m: int, n: int, rank: int, dtype: torch.dtype, pivoted: bool = True, bits: int = 16) -> int:
    """Bits on disk, the int32 row order of the pivoted form and the scales of rounded factors included."""
    order = 32 * m if pivoted else 0
    number_bits = 8 * dtype.itemsize
    if bits == 16:
        return stored_size(m, n, rank, pivoted) * number_bits + order
    shapes = ((rank, n), (m - rank if pivoted else m, rank))
    return order + sum(rounded_bits(*shape, bits, default_group(bits), number_bits) for shape in shapes)


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


def with_rounding(options: list[Option], lost: Callable[[Option], float]) -> list[Option]:
    """The options with the loss of rounding added: `lost` at a few of them, linear in the size between.

    Rounding errors are taken as uncorrelated with those of the truncation, so losses add.

    Args:
        options: ascending in size.
        lost: predicted loss of rounding this option's factors, against the exact ones.
    """
    places = np.unique(np.linspace(0, len(options) - 1, ROUNDING_POINTS).round().astype(int))
    losses = np.interp([o.size for o in options], [options[i].size for i in places], [lost(options[i]) for i in places])
    return [replace(o, loss=o.loss + float(loss)) for o, loss in zip(options, losses, strict=True)]


def full_option(unit: Unit, bits: int) -> Option:
    """The matrix at full rank: as it is, or rounded."""
    if bits == 16:
        return dense_option(unit)
    (linear,) = unit.linears
    _, error, stored = round_weight(linear, bits, default_group(bits), bits == 4)
    return Option(unit.size, stored, linear.predicted_loss(error), {"full": True})


class FactorRounding:
    """Rounds factors of one linear; what depends on its inputs alone is made once."""

    def __init__(self, linear: Linear, bits: int) -> None:
        self.linear, self.bits, self.group = linear, bits, default_group(bits)

    @cached_property
    def gram(self) -> Tensor:
        n = self.linear.in_features
        return torch.eye(n).to(self.linear.weight) if self.linear.gram is None else self.linear.gram.float()

    @cached_property
    def upper(self) -> Tensor:
        return feedback(self.gram)

    def loss(self, factors: Factors) -> float:
        """Predicted loss of rounding these factors, in nats per token."""
        return self.linear.predicted_loss(factors.dense() - self.rounded(factors)[0].dense())

    def rounded(self, factors: Factors) -> tuple[Factors, dict[str, Tensor]]:
        """The factors that rounded ones stand for, and the tensors of a QuantLowRankLinear.

        t is refit to the rounded rows: the least squares map from what they compute to what t made of the exact rows.
        """
        first, rows = self._factor(factors.rows, self.upper, self.gram)
        seen = rows @ self.gram
        moment, t = seen @ rows.T, factors.t
        if t.numel():
            t = linalg.refit(t, factors.rows.float() @ seen.T, moment, REFIT_DAMPING)
        second, t = self._factor(t, feedback(moment), moment)
        packed = {"r": first.qweight, "r_scales": first.scales, "r_zeros": first.zeros,
                  "t": second.qweight, "t_scales": second.scales, "t_zeros": second.zeros}  # fmt: skip
        return factors._replace(rows=rows, t=t), {name: tensor for name, tensor in packed.items() if tensor is not None}

    def _factor(self, factor: Tensor, upper: Tensor, moment: Tensor) -> tuple[ops.Quantized, Tensor]:
        """A factor rounded for inputs of this second moment, and the matrix that stands for."""
        importance = moment.diagonal().clamp_min(0.0) if self.bits == 4 else None
        packed = rounded(factor.to(self.linear.dtype), self.bits, self.group, importance)
        packed = spread_errors(factor, packed, self.bits, self.group, upper, moment)
        return packed, ops.dequantize(*packed, factor.shape[1], self.bits, self.group)


def full_result(linear: Linear, method: str, config: LowRankConfig) -> Result:
    """What `full_option` offers for rounded factors."""
    return rounded_result(
        linear, method, config.bits, default_group(config.bits), config.bits == 4, config.activation_bits
    )


def low_rank_result(linear: Linear, method: str, factors: Factors, config: LowRankConfig) -> Result:
    """Edit, tensors and record for the factors, rounded where the config says so."""
    m, n = linear.weight.shape
    rank, pivoted, bits = len(factors.rows), factors.order is not None, config.bits
    kwargs = {"in_features": n, "out_features": m, "rank": rank, "bias": linear.bias is not None, "pivoted": pivoted}
    extra: dict[str, Any] = {"rank": rank}
    if bits == 16:
        layer, stored = "LowRankLinear", factors
        tensors = {"down.weight": factors.rows.to(linear.dtype), "up.weight": factors.t.to(linear.dtype)}
    else:
        layer = "QuantLowRankLinear"
        stored, tensors = FactorRounding(linear, bits).rounded(factors)
        kwargs |= {"bits": bits, "group_size": default_group(bits), "symmetric": bits == 8}
        kwargs["activation_bits"] = config.activation_bits
        exact = factors.dense()
        extra |= {
            "bits": bits,
            "truncation_loss": linear.predicted_loss(linear.weight.float() - exact),
            "rounding_loss": linear.predicted_loss(exact - stored.dense()),
        }
    if factors.order is not None:
        tensors["order"] = factors.order
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(linear.dtype)
    row = record(
        linear,
        method,
        stored_size(m, n, rank, pivoted),
        stored_bits(m, n, rank, linear.dtype, pivoted, bits),
        linear.weight.float() - stored.dense(),
        **extra,
    )
    edit = Replace(linear.path, layer=layer, kwargs=kwargs)
    return Result([edit], {f"{linear.path}.{name}": tensor for name, tensor in tensors.items()}, [row])
