"""Random pruning, the floor: feed-forward units or weights leave in a seeded random order, its own in every matrix."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from tinycomp.methods._base import Linear, Unit
from tinycomp.methods._pruning import Pruning, prediction_needs, pruning_methods


class Random(Pruning):
    """Prune at random. Fields: see `Pruning`."""


def _scores(path: str, shape: tuple[int, ...], like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + (zlib.crc32(path.encode()) << 16))
    return torch.rand(shape, generator=generator).to(like.device)


def weight_scores(linear: Linear, config: Random) -> Tensor:
    """Uniform numbers, (out, in), from the seed and the matrix's path."""
    return _scores(linear.path, tuple(linear.weight.shape), linear.weight, config.seed)


def unit_scores(unit: Unit, config: Random) -> Tensor:
    """Uniform numbers, (width,)."""
    down = unit.linears[-1]
    return _scores(down.path, (down.in_features,), down.weight, config.seed)


METHOD, MASKED = pruning_methods("Random", Random, prediction_needs, unit_scores, weight_scores)
