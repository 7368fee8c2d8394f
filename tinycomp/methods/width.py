"""Feed-forward width pruning: hidden units leave one after another, the down projection is refit in closed form.

Units are removed by structured optimal brain surgeon on the down projection, weighted by the loss gradient at its
output; the kept units' rows of the input projections stay exact. The result is a narrower plain linear.

Source: Hassibi and Stork 1993; Kurtic et al. 2023 (ZipLM) for the structured form. Differs: both sides of the error
are weighted (K-FAC), and the whole curve over widths comes from one elimination.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinycomp.edits import Slice
from tinycomp.linalg import Elimination, cholesky, made_anew
from tinycomp.methods._base import Linear, Method, Option, Result, Unit, record
from tinycomp.methods._options import dense_option, require_finite
from tinycomp.methods._rounding import RoundedConfig, default_group, quantized, round_weight, rounded_bits
from tinycomp.models import UnitPath

GRID = 48


class WidthPrune(RoundedConfig):
    """Structured pruning of feed-forward hidden units. `bits` are those of the kept weights: see `RoundedConfig`.

    Args:
        selection: "surgeon" removes the unit whose loss is least after refitting the others; "energy" keeps the units
            whose contribution to the output, |w_j|² E[h_j²], is largest; "path" those that enter `path` first.
        path: file of the unit path of an SPP search on this model; gives selection="path".
        refit: solve the down projection anew on the kept units.
        round_to: kept widths are multiples of this (kernels and tensor cores like 8 or 16).
    """

    selection: Literal["surgeon", "energy", "path"] = "surgeon"
    path: str | None = None
    refit: bool = True
    round_to: int = Field(default=8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") is not None:
            return {"selection": "path"} | values
        return values

    @model_validator(mode="after")
    def _one_order(self) -> WidthPrune:
        if (self.selection == "path") != (self.path is not None):
            raise ValueError(
                f"got selection={self.selection!r} and path={self.path!r}, allowed is a path with selection='path' "
                "only; leave one of them out, or name the file of the path"
            )
        return self


def needs(config: WidthPrune) -> frozenset[str]:
    return frozenset({"gram"}) if config.selection == "energy" else frozenset({"gram", "output_gram"})


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
            return
        if config.path is not None:
            self.order = _path_order(config.path, down)
        else:
            energy = down.weight.float().pow(2).sum(0) * down.gram.diagonal()
            self.order = energy.argsort(stable=True)
        if config.refit:
            self.losses = _refit_losses(down.weight, down.gram, down.output_gram, self.order, config.damping)

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
        if self.config.refit:
            return float(self.losses[len(self.order) - count])
        kept = self.kept(count)
        approximation = torch.zeros_like(self.down.weight, dtype=torch.float32)
        approximation[:, kept] = self.weight(kept)
        return self.down.predicted_loss(self.down.weight.float() - approximation)


def _refit_losses(
    weight: Tensor, gram: Tensor, output_gram: Tensor | None, order: Tensor, damping: float
) -> Tensor:  # fmt: skip
    """Loss after removing the first 0, 1, ... n columns of `order`, the others refit: float32 (n + 1,).

    With the last of `order` first and L the Cholesky factor of S in that order, column j of W L is what column j adds
    to the outputs that the columns before it cannot: an error tr(G (W - W') S (W - W')ᵀ)/2 is a sum over columns.
    """
    kept_first = order.flip(0)
    factor = cholesky(gram[kept_first][:, kept_first], damping, "hidden gram").float()
    own = weight[:, kept_first].float() @ factor
    weighted = own if output_gram is None else output_gram.float() @ own
    costs = (own * weighted).sum(0).clamp(min=0).flip(0) / 2
    return torch.cat([costs.new_zeros(1), costs.cumsum(0)])


def _path_order(file: str, down: Linear) -> Tensor:
    """The neurons that `down` reads, those that enter the path last first."""
    path = UnitPath.load(file)
    name = next((n for n in path.entry if n.endswith(".ffn") and down.path.startswith(n.removesuffix("ffn"))), None)
    units = 0 if name is None else len(path.entry[name])
    if name is None or units != down.in_features:
        raise ValueError(
            f"{down.path}: got {file}, which ranks {units} neurons of this block, allowed {down.in_features}; use a "
            "path of this model"
        )
    return path.order(name).flip(0)


def _bits(unit: Unit, width: int, config: WidthPrune) -> int:
    """Bits on disk of the sublayer's weights at this width."""
    *inputs, down = unit.linears
    shapes = [(x, width, x.in_features) for x in inputs] + [(down, down.out_features, width)]
    if config.bits == 16:
        return sum(rows * columns * 8 * x.dtype.itemsize for x, rows, columns in shapes)
    group = default_group(config.bits)
    return sum(rounded_bits(rows, columns, config.bits, group, 8 * x.dtype.itemsize) for x, rows, columns in shapes)


def options(unit: Unit, config: WidthPrune) -> list[Option]:
    *_, down = unit.linears
    full = down.in_features
    selection = Selection(down, config)
    per_unit = unit.size // full
    rounding = 0.0
    if config.bits != 16:
        group, search = default_group(config.bits), config.bits == 4
        rounding = sum(x.predicted_loss(round_weight(x, config.bits, group, search)[1]) for x in unit.linears)
    found = [
        Option(w * per_unit, _bits(unit, w, config), selection.loss(w) + rounding * w / full, {"width": w})
        for w in widths(full, config.round_to)
    ]
    if config.bits == 16:
        return [*found, dense_option(unit)]
    return [*found, Option(unit.size, _bits(unit, full, config), rounding, {"width": full, "full": True})]


def build(unit: Unit, choice: dict[str, Any], config: WidthPrune) -> Result:
    *inputs, down = unit.linears
    field = unit.ffn.config_field if unit.ffn else None
    width = choice["width"]
    selection = Selection(down, config)
    kept = selection.kept(width) if width < down.in_features else torch.arange(width, device=down.weight.device)
    result = Result()
    for linear in inputs:
        require_finite(linear)
        bias, moment = None if linear.bias is None else linear.bias[kept], _part(linear.output_gram, kept)
        narrow = replace(linear, weight=linear.weight[kept], bias=bias, output_gram=moment, remember=made_anew)
        _put(result, linear, narrow, Slice(linear.path, dim=0, keep=width, config_field=field), kept, config)
    weight = selection.weight(kept) if width < down.in_features else down.weight.float()
    narrow = replace(down, weight=weight, gram=_part(down.gram, kept), remember=made_anew)
    _put(result, down, narrow, Slice(down.path, dim=1, keep=width, config_field=field), kept, config)
    return result


def _part(moment: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if moment is None else moment[kept][:, kept]


def _put(result: Result, linear: Linear, narrow: Linear, edit: Slice, kept: Tensor, config: WidthPrune) -> None:
    """Edits, tensors and record that leave `narrow`, rounded where the config says so, in the place of `linear`."""
    index = (kept, slice(None)) if edit.dim == 0 else (slice(None), kept)

    def error(weight: Tensor) -> Tensor:
        """Of the whole matrix; units that are gone cost what their refit neighbours do not make up for."""
        whole = linear.weight.float().clone() if edit.dim == 0 else torch.zeros_like(linear.weight, dtype=torch.float32)
        whole[index] = weight
        return linear.weight.float() - whole

    size, bits = narrow.weight.numel(), config.bits
    result.edits.append(edit)
    if bits == 16:
        weight = narrow.weight.to(linear.dtype)
        result.tensors[f"{linear.path}.weight"] = (weight.T if linear.transposed else weight).contiguous()
        if narrow.bias is not None and edit.dim == 0:
            result.tensors[f"{linear.path}.bias"] = narrow.bias.to(linear.dtype)
        stored = size * 8 * linear.dtype.itemsize
        result.records.append(record(linear, "WidthPrune", size, stored, error(narrow.weight), width=edit.keep))
        return
    group = default_group(bits)
    packed, rounding, stored = round_weight(narrow, bits, group, bits == 4)
    cut = linear.predicted_loss(error(narrow.weight))
    row = record(
        linear, "WidthPrune", size, stored, error(narrow.weight.float() - rounding), width=edit.keep, bits=bits,
        truncation_loss=cut, rounding_loss=narrow.predicted_loss(rounding),
    )  # fmt: skip
    made = quantized(narrow, packed, bits, group, config.activation_bits, [row])
    result.edits += made.edits
    result.tensors |= made.tensors
    result.records += made.records


METHOD = Method("WidthPrune", WidthPrune, needs, options, build, unit_kind="ffn")
