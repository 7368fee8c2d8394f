"""RIA: prune by a weight's share of its row and of its column, times the RMS of its input.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024:
(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) (|X_j|_2)^power; SPP's language-model part builds on it. Scores are
compared within each output row, as in Wanda, and the RMS stands for the 2-norm: one factor per matrix.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._pruning import Pruning, prediction_needs, pruning_methods


class RIA(Pruning):
    """Prune the weights, or feed-forward units, of least relative importance. Other fields: see `Pruning`.

    Args:
        power: of the input's RMS.
    """

    power: float = Field(default=0.5, ge=0.0)


def needs(config: RIA) -> frozenset[str]:
    return frozenset({"gram"}) | prediction_needs(config)


def weight_scores(linear: Linear, config: RIA) -> Tensor:
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) E[x_j²]^(power/2), (out, in)."""
    if linear.gram is None:
        raise ValueError(f"{linear.path}: got no calibration statistics, RIA needs them; pass `data`")
    w = linear.weight.abs()
    shares = w / w.sum(0, keepdim=True).clamp(min=1e-30) + w / w.sum(1, keepdim=True).clamp(min=1e-30)
    return shares * linear.gram.diagonal().clamp_min(0.0).pow(config.power / 2)


def unit_scores(unit: Unit, config: RIA) -> Tensor:
    """Mean score of each column of the down projection, (width,)."""
    return weight_scores(unit.linears[-1], config).mean(0)


METHOD, MASKED = pruning_methods("RIA", RIA, needs, unit_scores, weight_scores)
