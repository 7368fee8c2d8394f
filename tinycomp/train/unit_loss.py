"""What removing each unit is predicted to cost, in nats per token: the one-shot order that a search may start from.

With S the second moment of a linear's inputs and G that of the loss gradient at its outputs, an error E of its weight
costs tr(G E S Eᵀ)/2 (K-FAC). Units that a linear reads (feed-forward neurons, attention values) are eliminated one
after another with the others refit; a unit's loss is what its removal adds, and never less than that of those removed
before it. A query/key index, which no linear reads, costs what zeroing its rows costs, in the mean of both sides:
either zero makes their product zero.

Source: Hassibi and Stork 1993 and Martens and Grosse 2015 for the two parts; their use for attention indices is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.calib import StatsStore, collect
from tinycomp.linalg import Elimination
from tinycomp.models import UnitGroup, spec_of
from tinycomp.train.losses import Batch

DAMPING = 1e-4


def unit_losses(
    model: nn.Module, groups: Sequence[UnitGroup], batches: Sequence[Batch], seed: int = 0
) -> dict[str, Tensor]:
    """Group name -> float32 (count,) predicted loss of each unit's removal.

    Args:
        model: in eval mode, left as it is.
        groups: of its units.
        batches: calibration data.
        seed: of the labels that are drawn where there are none.
    """
    paths = {m.path for g in groups for m in (g.members[-1:] if _reader(g) else g.members)}
    needs = frozenset({"gram", "output_gram"})
    store = collect(model, spec_of(model), list(batches), needs, paths=sorted(paths), seed=seed)
    try:
        removed: dict[str, Tensor] = {}
        found = {}
        for group in groups:
            reader = _reader(group)
            if reader is None:
                found[group.name] = _zeroed(model, group, store)
                continue
            if reader not in removed:
                removed[reader] = _eliminated(*_matrices(model, reader, store))
            found[group.name] = removed[reader][group.members[-1].features].sum(1)
        return found
    finally:
        store.close()


def places(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same units' places in (0, 1] in the order of their losses over all groups, the largest last."""
    every = torch.cat(list(losses.values()))
    place = torch.empty(len(every))
    place[every.argsort(stable=True)] = torch.arange(1, len(every) + 1) / len(every)
    return dict(zip(losses, place.split([len(v) for v in losses.values()]), strict=True))


def _reader(group: UnitGroup) -> str | None:
    """The linear that has the group's units as inputs, if any."""
    return group.members[-1].path if group.members[-1].dim == 1 else None


def _matrices(model: nn.Module, path: str, store: StatsStore) -> tuple[Tensor, Tensor, Tensor]:
    """(W (out, in), S, G), float32."""
    module: Any = model.get_submodule(path)
    weight = module.weight.detach().T if hasattr(module, "nf") else module.weight.detach()
    stats = store.get([path])[path]
    assert stats.gram is not None
    assert stats.output_gram is not None
    return weight.float().cpu(), stats.gram.float().cpu(), stats.output_gram.float().cpu()


def _eliminated(weight: Tensor, gram: Tensor, output_gram: Tensor) -> Tensor:
    """(in,) what removing each input adds to the predicted loss."""
    found = Elimination(weight, gram, output_gram, DAMPING)
    added = torch.empty(weight.shape[1])
    added[found.order] = found.loss.diff().cummax(0).values
    return added


def _zeroed(model: nn.Module, group: UnitGroup, store: StatsStore) -> Tensor:
    """(count,) predicted loss of zeroing each unit's rows, mean over the linears that make it."""
    total = torch.zeros(group.count)
    for member in group.members:
        weight, gram, output_gram = _matrices(model, member.path, store)
        at = member.features
        rows, columns = at[:, :, None], at[:, None, :]
        total += (output_gram[rows, columns] * (weight @ gram @ weight.T)[rows, columns]).sum((1, 2)).clamp(min=0) / 2
    return total / len(group.members)
