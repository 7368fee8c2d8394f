"""Two or three linear layers with packed sparse weights, of the same input, in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.masked_formats import FORMATS, pack_masked
from tinycomp.ops.masked_linear import kept


def masked_linears(x: Tensor, *layers: Tensor | int | str | None) -> Tensor:
    """`masked_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [masked_linear(x, values1, ..., out_features1, format, value_bits), masked_linear(x, values2, ...), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: values, mask, offsets, scales, bias, out_features of each of three layers, as for `masked_linear` (None
            throughout for a third that is not there), then format and value_bits of all ("bitmask" and 0 unless given).

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `masked_linear`.

    Cost: that of the layers, x read once; on a GPU one launch for at most 16 inputs.
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(lead: tuple[int, ...], k: int, format: str, bits: int, *sizes: int) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for i, n in enumerate(sizes):
            packed = pack_masked(draw(n, k), kept(draw, n, k, format), format, bits)
            args += *packed, draw(n) if i % 2 == 0 else None, n
        return args + (None,) * (19 - len(args)) + (format, bits)

    for format in FORMATS:
        yield Sample(f"{format}-qkv-1row", make((1,), 96, format, 0, 64, 33, 16))
        for bits in (8, 4):
            yield Sample(f"{format}-{bits}-gate-up-odd", make((2, 3), 33, format, bits, 41, 7))
        yield Sample(f"{format}-many-rows", make((37,), 100, format, 0, 41, 70, 33))
        yield Sample(f"{format}-0rows", make((0,), 33, format, 0, 41, 20))
        base = make((5,), 33, format, 8, 41, 41)
        yield Sample(f"{format}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"{format}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define_group("masked_linears", "masked_linear", _samples)
