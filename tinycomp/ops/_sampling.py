"""Random tensors and awkward layouts for the contracts' samples."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Seeded normal tensors of one dtype: `Draw(dtype)(3, 4)`."""

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) + 0.5).to(self.dtype)

    def labels(self, size: int, clusters: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(clusters, (size,), generator=self.generator).to(dtype)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator).to(torch.int32)


def transposed(t: Tensor) -> Tensor:
    """The same values, stored column by column."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else sliced(t)


def sliced(t: Tensor) -> Tensor:
    """The same values as a view with gaps in a larger tensor that holds NaN (or zeros) in between."""
    fill = float("nan") if t.is_floating_point() else 0
    wide = torch.full([2 * s + 1 for s in t.shape], fill, dtype=t.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view
