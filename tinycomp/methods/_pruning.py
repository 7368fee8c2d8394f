"""Pruning by scores, shared by Wanda, RIA, Magnitude and Random: feed-forward units sliced out, or weights masked.

Nothing is refitted: kept weights stay as they are. That is what makes these the baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from tinycomp import ops
from tinycomp.edits import Replace, Slice
from tinycomp.methods._base import Linear, Method, MethodConfig, Option, Result, Unit, record
from tinycomp.methods._options import dense_option, require_finite, size_grid

SLICED_SIZES = 47
MASKED_SIZES = 9


class Pruning(MethodConfig):
    """Fields of the three score-based pruning methods.

    Args:
        structured: remove whole hidden units of the feed-forward sublayers: plain, narrower linears. Otherwise zero
            the lowest scores of every output row and store a bit mask with the packed rest.
        round_to: kept widths are multiples of this (structured).
        value_bits: 8 or 4 also rounds the kept weights, one scale per row (masked); 0 keeps their dtype.
        rows: batch rows (sequences times tokens per step) at which masks must not be slower than dense.
        guard_speed: measure that on this machine, and refuse masks that lose; off accepts them for their bytes.
        pattern: "row" keeps the largest scores of a row, "2:4" the two largest of every four consecutive inputs,
            whatever the ratio (masked).
    """

    structured: bool = True
    round_to: int = Field(default=8, ge=1)
    value_bits: Literal[0, 4, 8] = 0
    rows: int = Field(default=1, ge=1)
    guard_speed: bool = True
    pattern: Literal["row", "2:4"] = "row"

    @model_validator(mode="after")
    def _pattern_is_of_masks(self) -> Pruning:
        if self.pattern == "2:4" and self.structured:
            raise ValueError("got pattern='2:4' with structured=True, allowed with structured=False")
        return self

    @property
    def format(self) -> str:
        """Of `ops.pack_masked`."""
        return "bitmask" if self.pattern == "row" else "2:4"


def prediction_needs(config: Pruning) -> frozenset[str]:
    """Losses are compared across units only when one budget is spread over them."""
    return frozenset({"gram", "output_gram"}) if config.allocation == "global" else frozenset()


def pruning_methods(
    name: str,
    config: type[Pruning],
    needs: Callable[[Any], frozenset[str]],
    unit_scores: Callable[[Unit, Any], Tensor],
    weight_scores: Callable[[Linear, Any], Tensor],
) -> tuple[Method, Method]:
    """The rows for `structured=True` (feed-forward units) and `structured=False` (masked matrices).

    Args:
        name: for the report.
        config: the config class of both.
        needs: statistics to collect.
        unit_scores: (ffn unit, config) -> (width,) score of every hidden unit; the largest stay.
        weight_scores: (linear, config) -> (out, in) score of every weight; the largest of each row stay.
    """

    def sliced_options(unit: Unit, cfg: Any) -> list[Option]:
        return _sliced_options(unit, unit_scores(_checked(unit), cfg), cfg)

    def sliced_build(unit: Unit, choice: dict[str, Any], cfg: Any) -> Result:
        return _sliced_build(name, unit, unit_scores(_checked(unit), cfg), choice["width"])

    def masked_options(unit: Unit, cfg: Any) -> list[Option]:
        return _masked_options(unit, weight_scores(_checked(unit).linears[0], cfg), cfg)

    def masked_build(unit: Unit, choice: dict[str, Any], cfg: Any) -> Result:
        return _masked_build(name, unit, weight_scores(_checked(unit).linears[0], cfg), choice["kept_per_row"], cfg)

    return (
        Method(name, config, needs, sliced_options, sliced_build, unit_kind="ffn"),
        Method(name, config, needs, masked_options, masked_build),
    )


def _checked(unit: Unit) -> Unit:
    for linear in unit.linears:
        require_finite(linear)
    return unit


# --- feed-forward units ----------------------------------------------------------------------------------------------


def removal_losses(down: Linear, order: Tensor) -> Tensor:
    """Predicted loss of removing the first 0, 1, ..., width units of `order` from the down projection.

    Removing the set R zeroes columns R of W: tr(G W_R S_RR W_Rt)/2 = sum over R x R of S * (Wt G W) / 2.
    """
    w = down.weight.double()[:, order]
    pair = w.T @ (w if down.output_gram is None else down.output_gram.double() @ w)
    s = torch.eye(len(order)).to(pair) if down.gram is None else down.gram.double()[order][:, order]
    pair = pair * s
    total = pair.cumsum(0).cumsum(1).diagonal().clamp_min(0.0)
    return 0.5 * torch.cat([total.new_zeros(1), total])


def _sliced_options(unit: Unit, scores: Tensor, config: Pruning) -> list[Option]:
    width = len(scores)
    losses = removal_losses(unit.linears[-1], scores.argsort(stable=True))
    wanted = {round(f * width / config.round_to) * config.round_to for f in size_grid(config.ratio, SLICED_SIZES)}
    dense = dense_option(unit)
    found = [
        Option(dense.size // width * kept, dense.bits // width * kept, float(losses[width - kept]), {"width": kept})
        for kept in sorted(wanted)
        if 0 < kept < width
    ]
    return [*found, dense]


def _sliced_build(name: str, unit: Unit, scores: Tensor, width: int) -> Result:
    *inputs, down = unit.linears
    kept = scores.argsort(stable=True)[len(scores) - width :].sort().values
    field = unit.ffn.config_field if unit.ffn else None
    result = Result()
    for linear, dim in [*((x, 0) for x in inputs), (down, 1)]:
        weight = linear.weight.index_select(dim, kept).to(linear.dtype)
        result.edits.append(Slice(linear.path, dim=dim, keep=width, config_field=field))
        result.tensors[f"{linear.path}.weight"] = (weight.T if linear.transposed else weight).contiguous()
        if dim == 0 and linear.bias is not None:
            result.tensors[f"{linear.path}.bias"] = linear.bias[kept].to(linear.dtype)
        # A removed unit's whole effect is its column of the down projection: the inputs' rows cost nothing more.
        error = torch.zeros_like(linear.weight)
        if dim == 1:
            error = linear.weight.index_fill(1, kept, 0.0)
        bits = weight.numel() * linear.dtype.itemsize * 8
        result.records.append(record(linear, name, weight.numel(), bits, error, width=width))
    return result


# --- masked matrices -------------------------------------------------------------------------------------------------


def row_places(scores: Tensor) -> Tensor:
    """int64 (out, in): place of every score in its row, 0 the largest, the earlier input first among equals."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def mask_width(n: int, ratio: float, config: Pruning) -> int:
    """Weights that a row of n keeps: no more than this ratio allows, but one; with a pattern what that gives."""
    return max(int(ratio * n + 1e-9), 1) if config.pattern == "row" else n // 4 * 2 + min(n % 4, 2)


def masked_bits(m: int, n: int, kept: int, config: Pruning, number_bits: int) -> int:
    """Bits on disk of an (m, n) matrix with `kept` weights in every row: values, mask, row offsets, scales."""
    groups = -(-n // 4)
    stored, mask, offsets = (kept, -(-n // 8), m + 1) if config.pattern == "row" else (2 * groups, -(-groups // 2), 0)
    width = config.value_bits or number_bits
    return 8 * -(-m * stored * width // 8) + 8 * m * mask + 32 * offsets + (m * number_bits if config.value_bits else 0)


def _places(scores: Tensor, config: Pruning) -> Tensor:
    """Place of every score in its row, or in its group of four consecutive inputs."""
    if config.pattern == "row":
        return row_places(scores)
    m, n = scores.shape
    groups = functional.pad(scores, (0, -n % 4), value=-1.0).reshape(-1, 4)  # scores are not negative
    return row_places(groups).reshape(m, -1)[:, :n]


def _mask(linear: Linear, places: Tensor, kept: int, config: Pruning) -> tuple[ops.Packed, Tensor, int, int]:
    """The matrix packed with its first places, its error, the bits on disk, and the number of kept weights."""
    keep = places < (kept if config.pattern == "row" else 2)
    layout = config.format, config.value_bits
    packed = ops.pack_masked(linear.weight.to(linear.dtype), keep, *layout)
    dense = ops.unpack_masked(packed, linear.out_features, linear.in_features, *layout)
    bits = 8 * sum(t.nbytes for t in packed if t is not None)
    return packed, linear.weight - dense.float(), bits, int(keep.sum())


def _masked_options(unit: Unit, scores: Tensor, config: Pruning) -> list[Option]:
    linear = unit.linears[0]
    n = linear.in_features
    places, found = _places(scores, config), []
    for kept in sorted({mask_width(n, f, config) for f in size_grid(config.ratio, MASKED_SIZES)}):
        _, error, bits, count = _mask(linear, places, kept, config)
        found.append(Option(count, bits, linear.predicted_loss(error), {"kept_per_row": kept}))
    return [*found, dense_option(unit)]


def _masked_build(name: str, unit: Unit, scores: Tensor, kept: int, config: Pruning) -> Result:
    linear = unit.linears[0]
    packed, error, bits, count = _mask(linear, _places(scores, config), kept, config)
    kwargs = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "nnz": count if config.pattern == "row" else None,
        "bias": linear.bias is not None,
        "format": config.format,
        "value_bits": config.value_bits,
    }
    tensors = {f"{linear.path}.{field}": t for field, t in packed._asdict().items() if t is not None}
    if linear.bias is not None:
        tensors[f"{linear.path}.bias"] = linear.bias.to(linear.dtype)
    row = record(linear, name, count, bits, error, kept_per_row=kept, value_bits=config.value_bits)
    return Result([Replace(linear.path, layer="MaskedLinear", kwargs=kwargs)], tensors, [row])
