"""Dense rounding: int8 by row or int4 by group, the comparator that every other method has to beat at equal bytes.

    w ~ (q - z) s    q integer, s and z by row (8 bits, symmetric, z = 0) or by group of inputs (4 bits, min-max)

Source: plain round-to-nearest; nothing published is claimed. All parameters are kept: `size` is that of the dense
matrix, `bits` counts what is stored, scales and zeros included. With `search`, each group's range is clipped by the
factor that costs least in  sum_j S_jj (w_j - w'_j)^2 , and its scale is then the least squares one for those integers,
s = sum_j S_jj w_j c_j / sum_j S_jj c_j^2  with  c = q - z.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tinycomp.methods._base import Method, MethodConfig, Option, Result, Unit
from tinycomp.methods._options import dense_option, require_finite
from tinycomp.methods._rounding import default_group, round_weight, rounded_result


class Rounding(MethodConfig):
    """Dense weights rounded to 8 or 4 bits.

    Args:
        bits: 8 (symmetric, by row) or 4 (min-max, by group); None offers both to the allocation.
        group_size: inputs per scale, even, 0 for the whole row; None: 0 for 8 bits, 64 for 4.
        search: choose clip and scale per group by the inputs' second moment (calibration data needed); None: for 4
            bits only, whose output error it cuts by a sixth against a fiftieth for 8.
    """

    bits: Literal[8, 4] | None = None
    group_size: int | None = Field(default=None, ge=0, multiple_of=2)
    search: bool | None = None

    def searches(self, bits: int) -> bool:
        return bits == 4 if self.search is None else self.search

    def group(self, bits: int) -> int:
        return default_group(bits) if self.group_size is None else self.group_size


def needs(config: Rounding) -> frozenset[str]:
    if config.bits is None:  # only a choice between widths needs losses that compare
        return frozenset({"gram", "output_gram"})
    return frozenset({"gram"}) if config.searches(config.bits) else frozenset()


def options(unit: Unit, config: Rounding) -> list[Option]:
    """One candidate per allowed number of bits, and the dense matrix where the number is left open."""
    linear = unit.linears[0]
    require_finite(linear)
    found = []
    for bits in (8, 4) if config.bits is None else (config.bits,):
        _, error, stored = round_weight(linear, bits, config.group(bits), config.searches(bits))
        found.append(Option(unit.size, stored, linear.predicted_loss(error), {"bits": bits}))
    return found + ([dense_option(unit)] if config.bits is None else [])


def build(unit: Unit, choice: dict[str, Any], config: Rounding) -> Result:
    """The chosen rounding as one QuantLinear."""
    linear = unit.linears[0]
    require_finite(linear)
    bits = choice["bits"]
    return rounded_result(linear, "Rounding", bits, config.group(bits), config.searches(bits))


METHOD = Method(name="Rounding", config=Rounding, needs=needs, options=options, build=build)
