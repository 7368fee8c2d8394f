"""The signals that say how much a block matters: definitions, which end is removed first, and what each costs.

A_l (n, d) is the output of block l on n real tokens, U_l = A_l - A_(l-1) what the block adds ("@update"), P the softmax
attention, theta_l the block's parameters. Where the publication gives no formula, the one here is ours.

Source: Strategic Fusion Optimizes Transformer Compression (arXiv 2501.03273), which names seven of twelve signals and
one formula; Block Influence: ShortGPT; angular distance: Gromov et al. 2024; CKA: Kornblith et al. 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Family = Literal["activation", "information", "gradient", "weight", "attention", "similarity", "probe", "input"]
# What one sample costs, in forward passes of that sample; "weights" and "input" read no data.
PRICES = {"weights": 0, "forward": 1, "backward": 3, "input": 0}


@dataclass(frozen=True)
class Signal:
    """One number per block.

    Args:
        family: the publication's five families, and ours.
        remove: which end of the scale goes first.
        needs: "weights", "forward", "backward", "probe" (a forward pass without each block), or "input" (given).
        formula: the definition.
        update: also recorded on what the block adds.
        identity_first: a block that adds nothing (its output projections are zero) is this signal's first choice;
            with `update` that holds for the "@update" column.
        of_paper: one of the twelve.
    """

    family: Family
    remove: Literal["smallest", "largest"]
    needs: Literal["weights", "forward", "backward", "probe", "input"]
    formula: str
    update: bool = False
    identity_first: bool = False
    of_paper: bool = True


SIGNALS: dict[str, Signal] = {
    "inhibition": Signal("activation", "smallest", "forward", "mean of all entries of A", update=True),
    "intensity": Signal(
        "activation", "smallest", "forward", "mean over tokens of |A_i|_2", update=True, identity_first=True
    ),
    "energy": Signal("activation", "smallest", "forward", "|A|_F² / n", update=True, identity_first=True),
    "task_relevance": Signal(
        "information", "smallest", "forward",
        "I(u; y): u the pooled output and y the label (sequences), or u a token's output and y its loss (decoders); "
        "8 principal components; nearest neighbours (Ross 2014, Kraskov et al. 2004; k = 3)", update=True,
    ),
    "flow": Signal(
        "information", "largest", "forward", "I(u_(l-1); u_l), 8 principal components each, Kraskov et al. 2004, k = 3",
        identity_first=True,
    ),
    "gradient_magnitude": Signal("gradient", "smallest", "backward", "mean over samples of |dLoss/dtheta|_2"),
    "gradient_fisher": Signal("gradient", "smallest", "backward", "sum over theta of the mean of (dLoss/dtheta)²"),
    "gradient_taylor": Signal(
        "gradient", "smallest", "backward", "|sum over theta of theta dLoss/dtheta|", identity_first=True
    ),
    "weight_norm": Signal("weight", "smallest", "weights", "|theta|_F / sqrt(#theta)"),
    "weight_entropy": Signal("weight", "smallest", "weights", "entropy of a 64-bin histogram of theta"),
    "attention_weight": Signal("attention", "smallest", "forward", "mean over heads and queries of max_k P"),
    "attention_entropy": Signal("attention", "largest", "forward", "mean over heads and queries of -sum_k P log P"),
    "block_influence": Signal(
        "similarity", "smallest", "forward", "1 - mean cos(A_(l-1), A_l)", identity_first=True, of_paper=False
    ),
    "angular_distance": Signal(
        "similarity", "smallest", "forward", "mean arccos(cos(A_(l-1), A_l)) / pi", identity_first=True, of_paper=False
    ),
    "cka": Signal(
        "similarity", "largest", "forward", "linear CKA of A_(l-1) and A_l", identity_first=True, of_paper=False
    ),
    "stable_rank": Signal(
        "weight", "smallest", "weights", "mean over the block's linears of |W|_F² / |W|_2²", of_paper=False
    ),
    "skip_loss": Signal("probe", "smallest", "probe", "loss of the model without the block", of_paper=False),
    "entry_time": Signal(
        "input", "largest", "input", "mean step at which the block's units enter an SPP path; late is unimportant",
        of_paper=False,
    ),
}  # fmt: skip

TWELVE = tuple(name for name, signal in SIGNALS.items() if signal.of_paper)


def signal_of(column: str) -> Signal:
    """The signal of a column name, "energy" or "energy@update".

    Raises:
        ValueError: there is none of that name.
    """
    name, _, suffix = column.partition("@")
    if name not in SIGNALS or suffix not in ("", "update") or (suffix and not SIGNALS[name].update):
        raise ValueError(f"signal: got {column!r}, allowed: {', '.join(columns())}")
    return SIGNALS[name]


def columns() -> list[str]:
    """Every column there can be."""
    return [c for name, s in SIGNALS.items() for c in ((name, f"{name}@update") if s.update else (name,))]


def price(column: str, depth: int) -> float:
    """What the column costs per calibration sample alone, in forward passes of the whole model.

    Asked for together, all "forward" and "backward" signals cost 3: one pass forward and one backward.
    """
    needs = signal_of(column).needs
    return float(depth - 1) if needs == "probe" else float(PRICES[needs])  # depth passes, each a block short


def rank_correlations(values: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Spearman's correlation of every two columns over the blocks, turned so that large means keep; 0 if constant."""
    from scipy.stats import rankdata  # takes most of a second to import

    names = [c for c in columns() if c in values]
    ranks = {}
    for name in names:
        sign = 1.0 if signal_of(name).remove == "smallest" else -1.0
        x = rankdata(sign * np.asarray(values[name], dtype=np.float64))
        spread = x.std()
        ranks[name] = (x - x.mean()) / spread if spread > 0 else np.zeros_like(x)
    return {a: {b: float(np.mean(ranks[a] * ranks[b])) for b in names} for a in names}


def rank(values: dict[str, list[float]], column: str) -> list[int]:
    """Block indices, the first to remove first; ties in block order."""
    sign = 1.0 if signal_of(column).remove == "smallest" else -1.0
    numbers = values[column]
    return sorted(range(len(numbers)), key=lambda i: sign * numbers[i])
