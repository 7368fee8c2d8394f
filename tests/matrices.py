"""Random matrices that several test files draw."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(n: int, seed: int = 1, rank: int | None = None) -> Tensor:
    """Second moment of inputs with outlier features; of the given rank."""
    x = normal(rank or 4 * n, n, seed=seed) * torch.logspace(0.5, -1.5, n)
    return x.T @ x / len(x)
