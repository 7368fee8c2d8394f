"""Wanda: prune by |W_ij| times the RMS of input j.

Source: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024
(arXiv 2306.11695): scores are compared within each output row. The structured form scores a feed-forward unit by the
mean of its column of down-projection scores, as the extensions of Wanda to structured pruning do. The RMS is taken over
calibration tokens instead of the 2-norm: one factor per matrix, which changes no selection.
"""

from __future__ import annotations

from torch import Tensor

from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._pruning import Pruning, prediction_needs, pruning_methods


class Wanda(Pruning):
    """Prune the weights, or feed-forward units, of least |W| times input RMS. Fields: see `Pruning`."""


def needs(config: Wanda) -> frozenset[str]:
    return frozenset({"gram"}) | prediction_needs(config)


def weight_scores(linear: Linear, config: Wanda) -> Tensor:
    """|W_ij| sqrt(E[x_j^2]), (out, in)."""
    if linear.gram is None:
        raise ValueError(f"{linear.path}: got no calibration statistics, Wanda needs them; pass `data`")
    return linear.weight.abs() * linear.gram.diagonal().clamp_min(0.0).sqrt()


def unit_scores(unit: Unit, config: Wanda) -> Tensor:
    """Mean score of each column of the down projection, (width,)."""
    return weight_scores(unit.linears[-1], config).mean(0)


METHOD, MASKED = pruning_methods("Wanda", Wanda, needs, unit_scores, weight_scores)
