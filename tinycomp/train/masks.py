"""Masks on a frozen model's units, and the losses that are differentiated with respect to them.

The weights ask for no gradient while masks are attached, so that a backward pass computes activation gradients only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.eval.size import is_causal
from tinycomp.models.units import UnitGroup
from tinycomp.train.losses import Batch, Task
from tinycomp.train.samples import logits_of, model_inputs, task_of


class Masks:
    """One mask per unit group, all ones, multiplied into the activations of a frozen model; a context manager.

    A zero acts as the removal of the unit. Weights, their gradients and `requires_grad` are as before at the end.

    Args:
        model: any module.
        groups: its unit groups.
        per_head: every head has its own indices; else index j of all heads of a sublayer shares one number (SPP's
            released form).
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup], per_head: bool = True):
        self.model, self.groups = model, tuple(groups)
        self.device = next(model.parameters()).device
        self.units = [
            torch.arange(g.count) if per_head else torch.arange(g.count) % (g.count // g.heads) for g in groups
        ]
        sizes = [int(units.max()) + 1 for units in self.units]
        self.values = [torch.ones(size, device=self.device, requires_grad=True) for size in sizes]
        self.active = True

    def __enter__(self) -> Masks:
        self._flags = {id(p): p.requires_grad for p in self.model.parameters()}
        self.model.requires_grad_(False)
        self._handles = []
        for value, units, group in zip(self.values, self.units, self.groups, strict=True):
            for path, side, features in group.mask_at:
                module: Any = self.model.get_submodule(path)
                width = module.weight.shape[(side == "output") == hasattr(module, "nf")]
                index = torch.full((width,), len(value))  # a one stands behind the mask, for features of other groups
                index[features] = units[:, None].expand_as(features)
                self._handles.append(self._attach(module, side, value, index.to(self.device)))
        return self

    def _attach(self, module: nn.Module, side: str, value: Tensor, index: Tensor) -> Any:
        one = torch.ones(1, device=self.device)

        def scaled(x: Tensor) -> Tensor:
            return x * torch.cat([value, one])[index].to(x.dtype) if self.active else x

        if side == "output":
            return module.register_forward_hook(lambda _, __, output: scaled(output))
        return module.register_forward_pre_hook(lambda _, inputs: (scaled(inputs[0]), *inputs[1:]))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self.model.parameters():
            parameter.requires_grad_(self._flags[id(parameter)])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model is the dense one."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def names(self) -> list[str]:
        return [group.name for group in self.groups]

    def spread(self, flat: Tensor) -> dict[str, Tensor]:
        """Group name -> (count,): a value of every unit, from one number per mask entry in a flat tensor."""
        parts = flat.split([len(v) for v in self.values])
        return {g.name: p.cpu()[u] for g, p, u in zip(self.groups, parts, self.units, strict=True)}

    def head_numbers(self) -> Tensor:
        """int64, one per mask entry: numbers of the heads (feed-forward: of the sublayer), for the group prox."""
        numbers, first = [], 0
        for value, group in zip(self.values, self.groups, strict=True):
            heads = group.heads if len(value) == group.count else 1
            numbers.append(first + torch.arange(len(value)) // (len(value) // heads))
            first += heads
        return torch.cat(numbers).to(self.device)


Loss = Callable[[Batch], Tensor]


def search_loss(model: nn.Module, masks: Masks, batch: Batch, kind: str) -> Loss:
    """What a search differentiates, as a function of a batch; its scale is nats per prediction, or a relative error.

    Args:
        model: with `masks` attached.
        masks: switched off for the dense model's answers.
        batch: a first batch, to see what the model answers.
        kind: "labels", the model's own loss (a causal model's labels are its inputs); "distill", the divergence from
            the dense model's distribution, |h - h'|² / variance of its last hidden states where there are no logits;
            "auto", "labels" where there are any, else "distill". The gradient of "distill" is zero where all masks are
            one, and only its curvature tells units apart there.

    Raises:
        ValueError: labels are asked for and there are none.
    """
    with masks.off():
        task, _ = task_of(model, batch)
    has_labels = "labels" in batch or is_causal(model)
    if kind == "labels" and not has_labels:
        raise ValueError("SPP: got loss='labels' and batches without labels; add labels, or use loss='distill'")
    if kind == "labels" or (kind == "auto" and has_labels):
        return lambda batch: _own_loss(model, task, batch)
    return lambda batch: _distance(model, masks, task, batch)


def _own_loss(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    if "labels" not in batch:
        padding = batch.get("attention_mask")
        ids = batch["input_ids"]
        batch = batch | {"labels": ids if padding is None else ids.masked_fill(padding == 0, -100)}
    if task.kind == "none":  # a regression: the model knows its loss
        return model(**batch).loss
    rows, labels = task.rows(model(**model_inputs(batch)).logits, batch), task.labels(batch)
    assert labels is not None
    return functional.cross_entropy(rows, labels, ignore_index=-100)


def _distance(model: nn.Module, masks: Masks, task: Task, batch: Batch) -> Tensor:
    inputs = model_inputs(batch)
    with masks.off(), torch.no_grad():
        target = model(**inputs)
    output = model(**inputs)
    if task.kind != "none":
        p, q = (task.rows(logits_of(o), batch).log_softmax(1) for o in (target, output))  # type: ignore[arg-type]
        return functional.kl_div(q, p, reduction="batchmean", log_target=True)
    h, goal = (_last_hidden(o) for o in (output, target))
    real = task.real(batch, h.shape[1]) if h.ndim == 3 else torch.ones(len(h), dtype=torch.bool)
    h, goal = h[real].float(), goal[real].float()
    return (h - goal).square().sum() / (goal - goal.mean(0)).square().sum().clamp(min=1e-12)


def _last_hidden(output: Any) -> Tensor:
    found = getattr(output, "last_hidden_state", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"SPP: got {type(output).__name__} with neither logits nor last_hidden_state, allowed is one of them; "
            "give batches with labels"
        )
    return found
