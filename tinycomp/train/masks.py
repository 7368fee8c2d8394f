"""Masks on a frozen model's units, and the losses that are differentiated with respect to them.

The weights ask for no gradient while masks are attached, so that a backward pass computes activation gradients only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.eval.size import is_causal
from tinycomp.models.units import UnitGroup
from tinycomp.train.losses import Batch, Task
from tinycomp.train.samples import logits_of, model_inputs, task_of


class Refit:
    """The weight that reads masked inputs, refit to the mask: smooth between the dense weight and the refit sliced one.

    With R the correlation of the inputs, W in units of their RMS, and D = diag(m):

        W(m) = W R D (I + D (R - I) D)^-1 D

    It minimises E|W x - W' z|² for z_j = m_j x_j + sqrt(1 - m_j²) noise of the input's own energy. Where every m is
    zero or one that is the least-squares refit on the inputs that stay; a removed input that others can stand in for
    is missed little.

    Args:
        weight: (out, in).
        gram: (in, in), second moment of the input.
        damping: added to the diagonal of R.
    """

    def __init__(self, weight: Tensor, gram: Tensor, damping: float = 1e-3):
        gram = gram.float()
        self.rms = gram.diagonal().clamp(min=0).sqrt()
        self.rms = self.rms.masked_fill(self.rms == 0, 1.0)
        correlation = gram / self.rms[:, None] / self.rms
        self.diagonal = torch.full_like(self.rms, 1 + damping)
        self.others = correlation - torch.diag(correlation.diagonal())
        self.cross = (weight.detach().float() * self.rms) @ (self.others + torch.diag(self.diagonal))

    def __call__(self, mask: Tensor) -> Tensor:
        """(in,) -> (out, in)."""
        matrix = torch.diag(self.diagonal * mask.square().clamp(min=1.0)) + mask[:, None] * self.others * mask
        return torch.linalg.solve(matrix, (self.cross * mask).T).T * (mask / self.rms)


class Masks:
    """One mask per unit group, all ones, multiplied into the activations of a frozen model; a context manager.

    A zero acts as the removal of the unit. Weights, their gradients and `requires_grad` are as before at the end.

    Args:
        model: any module.
        groups: its unit groups.
        per_head: every head has its own indices; else index j of all heads of a sublayer shares one number (SPP's
            released form).
        grams: path -> (in, in) second moment of the input of every linear that reads units: its weight is then refit
            to the masks, see `Refit`; None leaves the weights as they are.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[UnitGroup], per_head: bool = True,
        grams: Mapping[str, Tensor] | None = None,
    ):  # fmt: skip
        self.model, self.groups, self.grams = model, tuple(groups), grams
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
        self._refitted: list[Any] = []
        for value, units, group in zip(self.values, self.units, self.groups, strict=True):
            reader = group.members[-1]
            if self.grams is not None and reader.dim == 1:
                index = torch.full((reader.shape[1],), len(value))
                index[reader.features] = units[:, None].expand_as(reader.features)
                self._refit_at(self.model.get_submodule(reader.path), self.grams[reader.path], value, index)
                continue
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

    def _refit_at(self, module: Any, gram: Tensor, value: Tensor, index: Tensor) -> None:
        weight = module.weight.T if hasattr(module, "nf") else module.weight
        curve, dense, one = Refit(weight, gram.to(self.device)), module.forward, torch.ones(1, device=self.device)
        index = index.to(self.device)

        def forward(x: Tensor) -> Tensor:
            if not self.active:
                return dense(x)
            return functional.linear(x, curve(torch.cat([value, one])[index]).to(x.dtype), module.bias)

        module.forward = forward
        self._refitted.append(module)

    def __exit__(self, *_: object) -> None:
        for module in self._refitted:
            del module.forward
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
