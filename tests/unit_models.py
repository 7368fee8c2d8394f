"""For tests of units: random paths, and models whose removed units are multiplied by zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.methods._base import Linear
from tinycomp.models import UnitGroup, UnitPath


def random_path(groups: Sequence[UnitGroup], seed: int = 0) -> UnitPath:
    """Some units entered at steps with ties, some never did."""
    generator = torch.Generator().manual_seed(seed)
    entry = {g.name: torch.randint(-1, 5, (g.count,), generator=generator, dtype=torch.int32) for g in groups}
    return UnitPath(entry, {g.name: torch.rand(g.count, generator=generator) for g in groups})


@contextmanager
def masked(model: nn.Module, groups: Sequence[UnitGroup], kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the units that are not kept are multiplied by zero."""
    hooks = []
    for group in groups:
        mask = torch.zeros(group.count)
        mask[kept[group.name]] = 1
        for path, side, features in group.mask_at:
            module = model.get_submodule(path)
            factor = torch.ones(_width(module, side))
            factor[features] = mask[:, None].expand(features.shape)
            if side == "input":
                hooks.append(module.register_forward_pre_hook(lambda _, args, f=factor: (args[0] * f, *args[1:])))
            else:
                hooks.append(module.register_forward_hook(lambda _, args, out, f=factor: out * f))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _width(module: Any, side: str) -> int:
    outputs, inputs = module.weight.T.shape if hasattr(module, "nf") else module.weight.shape
    return inputs if side == "input" else outputs


def linears_of(model: nn.Module, groups: Sequence[UnitGroup], grams: Mapping[str, Tensor] | None = None) -> dict:
    """Path -> Linear for every linear of the groups."""
    found = {}
    for path in {member.path: None for group in groups for member in group.members}:
        module: Any = model.get_submodule(path)
        transposed = hasattr(module, "nf")
        weight = module.weight.detach().T if transposed else module.weight.detach()
        bias = None if module.bias is None else module.bias.detach().float()
        found[path] = Linear(
            path, weight.float(), bias, (grams or {}).get(path), transposed=transposed, dtype=weight.dtype
        )
    return found
