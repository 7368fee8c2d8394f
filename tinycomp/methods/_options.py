"""What the options of several methods have in common: the sizes tried, leaving a unit dense, refusing bad input."""

from __future__ import annotations

from tinycomp import linalg
from tinycomp.methods._base import Linear, Option, Unit


def size_grid(ratio: float | None, count: int) -> tuple[float, ...]:
    """`count` evenly spread kept fractions below 1 and the requested one, ascending; 1 is `dense_option`."""
    asked = () if ratio is None or ratio >= 1.0 else (ratio,)
    return tuple(sorted({*((i + 1) / (count + 1) for i in range(count)), *asked}))


def dense_option(unit: Unit) -> Option:
    """Leave the unit as it is."""
    bits = sum(linear.weight.numel() * linear.dtype.itemsize * 8 for linear in unit.linears)
    return Option(unit.size, bits, 0.0, {"dense": True})


def require_finite(linear: Linear) -> None:
    """Refuse NaN and infinity before they spread: ValueError naming the tensor."""
    named = {"weight": linear.weight, "bias": linear.bias, "gram": linear.gram, "output_gram": linear.output_gram}
    for name, tensor in named.items():
        if tensor is not None:
            linalg.require_finite(f"{linear.path}.{name}", tensor)
