"""Magnitude pruning: the smallest weights, or the feed-forward units of smallest weights, go. No data.

Source: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015.
Weights are compared within each output row, as in Wanda, so that the two differ by the inputs' RMS alone.
"""

from __future__ import annotations

from torch import Tensor

from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._pruning import Pruning, prediction_needs, pruning_methods


class Magnitude(Pruning):
    """Prune the smallest weights, or the feed-forward units of smallest norm. Fields: see `Pruning`."""


def weight_scores(linear: Linear, config: Magnitude) -> Tensor:
    """|W_ij|, (out, in)."""
    return linear.weight.abs()


def unit_scores(unit: Unit, config: Magnitude) -> Tensor:
    """Product over the sublayer's linears of the norm of the unit's weights, (width,).

    A product, so that a scale moved from one linear of the unit to another changes nothing.
    """
    *inputs, down = unit.linears
    score = down.weight.norm(dim=0)
    for linear in inputs:
        score = score * linear.weight.norm(dim=1)
    return score


METHOD, MASKED = pruning_methods("Magnitude", Magnitude, prediction_needs, unit_scores, weight_scores)
