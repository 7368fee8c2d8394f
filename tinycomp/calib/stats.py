"""Accumulators that hooks fill: Gram matrices of inputs, of output gradients, and across two streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinycomp import ops

GRAM_SLABS = 4


@dataclass
class LinearStats:
    """Second moments of one linear over calibration tokens; each is None unless it was asked for.

    gram: (in, in) float32, mean of x xᵀ.
    output_gram: (out, out) float32, mean of g gᵀ with g the loss gradient at the output.
    cross: (in, in) float32, mean of x_original x_compressedᵀ.
    tokens: how many were averaged.
    """

    gram: Tensor | None = None
    output_gram: Tensor | None = None
    cross: Tensor | None = None
    tokens: int = 0


def linear_paths(model: nn.Module, paths: list[str]) -> dict[str, nn.Module]:
    """The modules at `paths`, in that order."""
    return {path: model.get_submodule(path) for path in paths}


def features_out(module: nn.Module) -> int:
    """Output features of an nn.Linear or a transformers Conv1D."""
    return module.out_features if isinstance(module, nn.Linear) else module.nf  # type: ignore[return-value]


class Rows:
    """Flattens (..., features) to the rows of real tokens: padding is left out where the mask has the same layout."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def set_batch(self, batch: dict[str, Tensor], decoder: bool = False) -> None:
        mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
        full = mask is None or mask.ndim != 2 or bool(mask.bool().all())
        self.mask = None if full else mask.bool()  # type: ignore[union-attr]

    def __call__(self, x: Tensor) -> Tensor:
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            return x[self.mask]
        return x.reshape(-1, x.shape[-1])


def add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    """total + rowsᵀ rows, allocating a float32 accumulator the first time.

    On the CPU only the upper triangle is kept up, in slabs: two thirds of the time. `mirrored` fills the rest.
    """
    n = rows.shape[-1]
    if total is None:
        total = torch.zeros(n, n, dtype=torch.float32, device=rows.device)
    if rows.device.type != "cpu":
        ops.gram_accumulate_(total, rows)
        return total
    wide = rows.float()
    height = -(-n // GRAM_SLABS)
    for start in range(0, n, height):
        stop = start + height
        total[start:stop, start:].addmm_(wide[:, start:stop].T, wide[:, start:])
    return total


def mirrored(total: Tensor) -> Tensor:
    """`total`, whose upper triangle counts, made symmetric in place."""
    lower = total.triu_().T.contiguous()  # adding a transposed view instead takes several times as long
    lower.diagonal().zero_()
    return total.add_(lower)
