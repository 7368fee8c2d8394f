"""Two or three rounded linear layers of the same input in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed
from tinycomp.ops.quant_linear import quantize


def quant_linears(x: Tensor, *layers: Tensor | int | None) -> Tensor:
    """`quant_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [quant_linear(x, qweight1, ..., bias1, bits, ...), quant_linear(x, qweight2, ..., bias2, bits, ...), ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: qweight, scales, zeros, bias of each of three layers, as for `quant_linear` (None throughout for a
            third that is not there), then bits, group_size and activation_bits of all.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `quant_linear`.

    Cost: that of the layers, x read and rounded once; on a GPU one launch for at most 16 inputs.
    """
    return _call(x, *layers)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(
        lead: tuple[int, ...], k: int, bits: int, group: int, symmetric: bool, activation_bits: int, *sizes: int
    ) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for i, n in enumerate(sizes):
            args += *quantize(draw(n, k), bits, group, symmetric), draw(n) if i % 2 == 0 else None
        return args + (None,) * (13 - len(args)) + (bits, group, activation_bits)

    for bits in (8, 4):
        yield Sample(f"int{bits}-qkv-1row", make((1,), 64, bits, 0, True, 0, 48, 24, 16))
        yield Sample(f"int{bits}-gate-up-odd", make((2, 3), 33, bits, 8, False, 0, 41, 7))
        yield Sample(f"int{bits}-many-rows", make((70,), 100, bits, 10, False, 0, 90, 50, 33))
        yield Sample(f"int{bits}-0rows", make((0,), 33, bits, 0, True, 0, 41, 20))
        yield Sample(f"int{bits}-rounded-odd", make((2, 3), 33, bits, 8, False, 8, 41, 20, 7))
        base = make((5,), 33, bits, 8, False, 0, 41, 41)
        yield Sample(f"int{bits}-transposed", tuple(transposed(v) if isinstance(v, Tensor) else v for v in base))
        yield Sample(f"int{bits}-sliced", tuple(sliced(v) if isinstance(v, Tensor) else v for v in base))


_call = define_group("quant_linears", "quant_linear", _samples)
