"""SPPMask: single weights in the order in which a split Bregman path of their own matrix lets them in.

One mask number per weight, a loss per output row i of E|w_i x - (m_i w_i) x|² from the inputs' second moment S alone,
relative to that of the empty row, and the coupled iteration of `tinycomp.train.bregman`:

    grad_ij = n / rise · w_ij (S ((m_i - 1) w_i))_j / (w_i S w_i)

Weights enter the support one after another; a row keeps the first ones. With `pattern="2:4"` the twins of four
consecutive inputs compete: once two of them have entered, the others are held at zero, and the two go on without them.

Source: the unstructured language-model part of SPP, arXiv 2501.03289. Differs: its repository has no such part, and the
paper combines the search with RIA's scores in a way that was not published.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._pruning import Pruning, prediction_needs, pruning_methods, row_places
from tinycomp.train.bregman import SplitBregman

TRAVEL, THRESHOLD = 4.0, 2.0  # as in the search over units: a weight whose mask stays at one enters half-way


class SPPMask(Pruning):
    """Masks of single weights along a split Bregman path. Other fields: see `Pruning`.

    Args:
        structured: False unless given; True removes the hidden units whose weights enter late on average.
        steps: of the iteration, each one product with the inputs' second moment.
        rise: what the coupling may cost, in units of a row's output energy; larger is a stronger pull.
    """

    structured: bool = False
    steps: int = Field(default=40, ge=2)
    rise: float = Field(default=1.0, gt=0.0)


def needs(config: SPPMask) -> frozenset[str]:
    return frozenset({"gram"}) | prediction_needs(config)


def weight_scores(linear: Linear, config: SPPMask) -> Tensor:
    """(out, in), not negative: steps left at the entry, then |V| squashed into [0, 1)."""
    key = f"spp mask {config.steps} {config.rise} {config.pattern}"
    return linear.remember(key, lambda: {"scores": _search(linear, config)})["scores"]


def _search(linear: Linear, config: SPPMask) -> Tensor:
    if linear.gram is None:
        raise ValueError(f"{linear.path}: got no calibration statistics, SPPMask needs them; pass `data`")
    w, n = linear.weight.float(), linear.in_features
    energy = ((w @ linear.gram) * w).sum(1, keepdim=True).clamp(min=1e-30)
    mask = torch.ones_like(w)
    path = SplitBregman([mask], lr=TRAVEL / config.steps, threshold=THRESHOLD, direction="adam", beta=0.9)
    shape = w.shape
    for _ in range(config.steps):
        path.grad.copy_((w * ((w * (mask - 1)) @ linear.gram) * (n / config.rise) / energy).flatten())
        path.step()
        if config.pattern == "2:4":
            losers = _losers(path.entry.view(shape), path.dual.view(shape)).flatten()
            path.gamma[losers] = 0.0
            path.entry[losers] = -1
            path.dual[losers] = path.dual[losers].clamp(-THRESHOLD, THRESHOLD)
    return _rank(path.entry, path.dual, config.steps).view(shape)


def _rank(entry: Tensor, dual: Tensor, steps: int) -> Tensor:
    size = dual.abs()
    return (steps + 1 - entry).masked_fill(entry < 0, 0).float() + size / (1 + size)


def _losers(entry: Tensor, dual: Tensor) -> Tensor:
    """bool (out, in): not among the two that entered first of four consecutive inputs, where two have entered."""
    steps = int(entry.max()) + 1
    width = entry.shape[1]
    ranks = functional.pad(_rank(entry, dual, steps), (0, -width % 4)).reshape(-1, 4)
    entered = functional.pad(entry, (0, -width % 4), value=-1).reshape(-1, 4) > 0
    lost = (row_places(ranks) >= 2) & (entered.sum(1, keepdim=True) >= 2)
    return lost.reshape(len(entry), -1)[:, :width]


def unit_scores(unit: Unit, config: SPPMask) -> Tensor:
    """Mean score of each column of the down projection, (width,)."""
    return weight_scores(unit.linears[-1], config).mean(0)


METHOD, MASKED = pruning_methods("SPPMask", SPPMask, needs, unit_scores, weight_scores)
