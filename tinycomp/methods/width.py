"""Feed-forward width pruning: hidden units leave one after another, the down projection is refit in closed form.

Units are removed by structured optimal brain surgeon on the down projection, weighted by the loss gradient at its
output; the kept units' rows of the input projections stay exact. The result is a narrower plain linear.

Source: Hassibi and Stork 1993; Kurtic et al. 2023 (ZipLM) for the structured form. Differs: both sides of the error
are weighted (K-FAC), and the whole curve over widths comes from one elimination.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tinycomp.edits import Slice
from tinycomp.linalg import Elimination
from tinycomp.methods._base import Linear, Method, MethodConfig, Option, Result, Unit, record
from tinycomp.methods._options import dense_option, require_finite

GRID = 48


class WidthPrune(MethodConfig):
    """Structured pruning of feed-forward hidden units.

    Args:
        selection: "surgeon" removes the unit whose loss is least after refitting the others; "energy" keeps the units
            whose contribution to the output, |w_j|² E[h_j²], is largest.
        refit: solve the down projection anew on the kept units.
        round_to: kept widths are multiples of this (kernels and tensor cores like 8 or 16).
    """

    selection: str = Field(default="surgeon", pattern="^(surgeon|energy)$")
    refit: bool = True
    round_to: int = Field(default=8, ge=1)


def needs(config: WidthPrune) -> frozenset[str]:
    return frozenset({"gram", "output_gram"}) if config.selection == "surgeon" else frozenset({"gram"})


def widths(width: int, round_to: int) -> list[int]:
    """Candidate widths, multiples of `round_to` spread evenly below the dense width."""
    found = {max(round(width * (i + 1) / GRID / round_to), 1) * round_to for i in range(GRID)}
    return sorted(w for w in found if w < width)


class Selection:
    """Which units to keep at every width, and the predicted loss of each."""

    def __init__(self, down: Linear, config: WidthPrune):
        require_finite(down)
        if down.gram is None:
            raise ValueError(f"{down.path}: got no calibration statistics, allowed WidthPrune with data; pass `data`")
        self.down, self.config = down, config
        if config.selection == "surgeon":
            found = down.remember(f"elimination {config.damping}", self._eliminate)
            self.order, self.losses = found["order"], found["losses"]
        else:
            energy = down.weight.float().pow(2).sum(0) * down.gram.diagonal()
            self.order = energy.argsort(stable=True)

    def _eliminate(self) -> dict[str, Tensor]:
        found = Elimination(self.down.weight, self.down.gram, self.down.output_gram, self.config.damping)  # type: ignore[arg-type]
        return {"order": found.order, "losses": found.loss}

    def kept(self, count: int) -> Tensor:
        """Ascending indices of the units kept at this width."""
        return self.order[len(self.order) - count :].sort().values

    def weight(self, kept: Tensor) -> Tensor:
        """The down projection on the kept units: refit W S[:, P] S[P, P]^-1, or W[:, P]."""
        if not self.config.refit:
            return self.down.weight[:, kept].float()
        return Elimination.solve(self.down.weight, self.down.gram, kept, self.config.damping)  # type: ignore[arg-type]

    def loss(self, count: int) -> float:
        """Predicted loss in nats per token."""
        if self.config.selection == "surgeon" and self.config.refit:
            return float(self.losses[len(self.order) - count])
        kept = self.kept(count)
        approximation = torch.zeros_like(self.down.weight, dtype=torch.float32)
        approximation[:, kept] = self.weight(kept)
        return self.down.predicted_loss(self.down.weight.float() - approximation)


def _bits(unit: Unit, width: int) -> int:
    per_unit = sum(x.weight.numel() // unit.linears[-1].in_features * 8 * x.dtype.itemsize for x in unit.linears)
    return per_unit * width


def options(unit: Unit, config: WidthPrune) -> list[Option]:
    *_, down = unit.linears
    full = down.in_features
    selection = Selection(down, config)
    per_unit = unit.size // full
    found = [
        Option(w * per_unit, _bits(unit, w), selection.loss(w), {"width": w}) for w in widths(full, config.round_to)
    ]
    return [*found, dense_option(unit)]


def build(unit: Unit, choice: dict[str, Any], config: WidthPrune) -> Result:
    *inputs, down = unit.linears
    field = unit.ffn.config_field if unit.ffn else None
    width = choice["width"]
    selection = Selection(down, config)
    kept = selection.kept(width)
    result = Result()
    for linear in inputs:
        require_finite(linear)
        result.edits.append(Slice(linear.path, dim=0, keep=width, config_field=field))
        _store(result, linear, linear.weight[kept])
        if linear.bias is not None:
            result.tensors[f"{linear.path}.bias"] = linear.bias[kept].to(linear.dtype)
        row = record(linear, "WidthPrune", 0, 0, torch.zeros_like(linear.weight, dtype=torch.float32), width=width)
        result.records.append(row | _sizes(linear, width * linear.in_features))
    new = selection.weight(kept)
    approximation = torch.zeros_like(down.weight, dtype=torch.float32)
    approximation[:, kept] = new
    result.edits.append(Slice(down.path, dim=1, keep=width, config_field=field))
    _store(result, down, new)
    row = record(down, "WidthPrune", 0, 0, down.weight.float() - approximation, width=width)
    result.records.append(row | _sizes(down, width * down.out_features))
    return result


def _sizes(linear: Linear, size: int) -> dict[str, int]:
    return {"size_after": size, "bits_after": size * 8 * linear.dtype.itemsize}


def _store(result: Result, linear: Linear, weight: Tensor) -> None:
    weight = weight.to(linear.dtype)
    result.tensors[f"{linear.path}.weight"] = (weight.T if linear.transposed else weight).contiguous()


METHOD = Method("WidthPrune", WidthPrune, needs, options, build, unit_kind="ffn")
