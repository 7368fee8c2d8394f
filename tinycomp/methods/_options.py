"""What the options of several methods have in common: the sizes tried, keeping a unit dense, refusing bad input."""

from __future__ import annotations

import torch

from tinycomp.methods._base import Linear, Option, Result, Unit, record

RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def size_grid(ratio: float | None) -> tuple[float, ...]:
    """Kept fractions to offer, the requested one among them, ascending; 1.0 is `dense_option`."""
    return tuple(sorted({*RATIOS, *(() if ratio is None or ratio >= 1.0 else (ratio,))}))


def dense_option(unit: Unit) -> Option:
    """Leave the unit as it is."""
    bits = sum(linear.weight.numel() * linear.dtype.itemsize * 8 for linear in unit.linears)
    return Option(unit.size, bits, 0.0, {"dense": True})


def keep_dense(unit: Unit) -> Result:
    """`build` of `dense_option`: no edit, one record per linear."""
    rows = []
    for linear in unit.linears:
        bits = linear.weight.numel() * linear.dtype.itemsize * 8
        rows.append(record(linear, "dense", linear.weight.numel(), bits, torch.zeros_like(linear.weight)))
    return Result(records=rows)


def require_finite(linear: Linear) -> None:
    """Refuse NaN and infinity before they spread.

    Raises:
        ValueError: naming the tensor.
    """
    named = (("weight", linear.weight), ("bias", linear.bias), ("input second moment", linear.gram))
    for name, tensor in (*named, ("output second moment", linear.output_gram)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{linear.path}.{name}: got NaN or infinite values, allowed are finite ones; "
                "repair the checkpoint or the calibration data, or put this module in ignore"
            )
