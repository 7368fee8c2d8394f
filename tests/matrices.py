"""Random matrices, and a linear with statistics, that several test files draw."""

from __future__ import annotations

import torch
from torch import Tensor

from tinycomp.methods._base import Linear, Unit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(n: int, seed: int = 1, rank: int | None = None) -> Tensor:
    """Second moment of inputs with outlier features; of the given rank."""
    x = normal(rank or 4 * n, n, seed=seed) * torch.logspace(0.5, -1.5, n)
    return x.T @ x / len(x)


def linear_unit(m: int = 12, n: int = 20, *, statistics: bool = True, dtype: torch.dtype = torch.float32) -> Unit:
    gram, output_gram = (moment(n), moment(m, seed=2)) if statistics else (None, None)
    weight = normal(m, n).to(dtype).float()
    return Unit("fc", "linear", (Linear("fc", weight, normal(m, seed=3), gram, output_gram, dtype=dtype),))
