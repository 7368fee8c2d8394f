"""Two or three dense linear layers of the same input in one call."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tinycomp.ops._group import Args, define_group
from tinycomp.ops._registry import Sample
from tinycomp.ops._sampling import Draw, sliced, transposed


def sliced_linears(x: Tensor, *layers: Tensor | None) -> Tensor:
    """`sliced_linear` of two or three layers, their outputs beside each other: q, k, v or gate, up.

        y = [x w1ᵀ + bias1, x w2ᵀ + bias2, ...]

    Args:
        x: (..., in_features) float32, bfloat16, float16 or float64.
        *layers: w1, bias1, w2, bias2 and, for three, w3, bias3: each w (out_features, in_features), which may be a
            view of a larger weight; bias (out_features,) or None. Sizes may differ between layers.

    Returns:
        (..., sum of out_features) in the dtype of x.

    Raises:
        ValueError, TypeError: as `sliced_linear`.

    Cost: that of the layers, x read once; on a GPU one launch for at most 16 inputs.
    """
    return _call(x, *layers)


def _sizes(layer: Args) -> Args:
    out_features, in_features = layer[0].shape
    return in_features, out_features


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def make(lead: tuple[int, ...], k: int, *layers: tuple[int, bool]) -> Args:
        draw = Draw(dtype)
        args: Args = (draw(*lead, k),)
        for n, bias in layers:
            args += draw(n, k), draw(n) if bias else None
        return args + (None,) * (7 - len(args))

    yield Sample("qkv-1row", make((1,), 64, (48, True), (24, False), (16, True)))
    yield Sample("gate-up-odd", make((2, 3), 33, (41, False), (7, True)))
    yield Sample("many-rows", make((70,), 100, (90, True), (50, False), (33, True)))
    yield Sample("0rows", make((0,), 33, (41, True), (20, False)))
    yield Sample("no-outputs", make((5,), 33, (0, False), (20, True), (0, True)))
    yield Sample("vector", make((), 33, (41, True), (20, False), (7, True)))
    base = make((5,), 33, (41, True), (41, False))
    yield Sample("transposed", tuple(None if a is None else transposed(a) for a in base))
    yield Sample("sliced", tuple(None if a is None else sliced(a) for a in base))


_call = define_group("sliced_linears", "sliced_linear", _samples, _sizes)
