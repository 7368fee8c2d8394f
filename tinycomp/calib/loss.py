"""The scalar whose gradients measure curvature, and a forward pass without a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class no_cache:
    """Within it the model keeps no key/value cache, which a calibration pass has no use for."""

    def __init__(self, model: nn.Module):
        self.config = getattr(model, "config", None)

    def __enter__(self) -> None:
        self.before = getattr(self.config, "use_cache", None)
        if self.before is not None:
            self.config.use_cache = False  # type: ignore[union-attr]

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.config.use_cache = self.before  # type: ignore[union-attr]


def fisher_loss(output: object, mask: Tensor | None, seed: int) -> Tensor:
    """A scalar whose gradients, squared and averaged, are the curvature of the model's own loss.

    With token or class logits: cross-entropy against labels sampled from the model's own distribution (the true
    Fisher information, in nats). Otherwise: the outputs times a fixed random sign pattern, scaled so that the
    curvature is that of the relative squared error of the output (Hutchinson's estimator).
    """
    logits = getattr(output, "logits", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(logits, Tensor) and logits.ndim >= 2 and logits.shape[-1] > 1:
            flat = logits.reshape(-1, logits.shape[-1]).float()
            if mask is not None and logits.shape[:-1] == mask.shape:
                flat = flat[mask.flatten()]
            numbers = torch.rand(len(flat), 1).to(flat.device)
            return _SampledLoss.apply(flat, numbers)  # type: ignore[no-any-return, no-untyped-call]
        hidden = getattr(output, "last_hidden_state", None)
        value = hidden if isinstance(hidden, Tensor) else next(v for v in _tensors(output) if v.is_floating_point())
        value = value.float()
        if mask is not None and value.shape[: mask.ndim] == mask.shape:
            value = value[mask]
        signs = torch.randint(0, 2, value.shape).to(value) * 2 - 1
        # Per row: |d value|^2 / |value|^2, whose second derivative is 2 / |value|^2.
        scale = (2.0 / value.detach().pow(2).sum(-1, keepdim=True).mean().clamp(min=1e-12)).sqrt()
        return (value * signs).sum() * scale


class _SampledLoss(torch.autograd.Function):
    """Sum of the cross-entropies of logits (tokens, classes) against labels drawn from their own distribution.

    In one array of that size, whose gradient is the probabilities less one at the label: a large vocabulary otherwise
    costs as much as the model's own layers. Each label is where the cumulated probabilities pass a number in [0, 1).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, numbers: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        labels = _draw(probabilities, numbers)
        ctx.save_for_backward(probabilities, labels)
        return -probabilities.gather(1, labels).clamp(min=torch.finfo(logits.dtype).tiny).log().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities, labels = ctx.saved_tensors
        change = probabilities.scatter_add(1, labels, probabilities.new_full(labels.shape, -1.0))
        return change.mul_(gradients[0]), None


def _draw(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """(tokens, 1) classes where the cumulated probabilities pass `numbers` (tokens, 1) in [0, 1).

    First a run of classes by its sum, then a class in it: cumulating all of them takes ten times as long.
    """
    tokens, classes = probabilities.shape
    width = max(d for d in range(1, math.isqrt(classes) + 1) if classes % d == 0)
    runs = probabilities.view(tokens, -1, width)
    ends = nn.functional.pad(runs.sum(-1).cumsum(-1), (1, 0))
    run, rest = _passed(ends, numbers * ends[:, -1:])
    inside = nn.functional.pad(runs.gather(1, run[:, :, None].expand(-1, -1, width))[:, 0].cumsum(-1), (1, 0))
    return run * width + _passed(inside, rest)[0]


def _passed(ends: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first step of `ends` (tokens, steps + 1) that ends above a number, and what is left of this."""
    numbers = torch.minimum(numbers, ends[:, -1:] * (1 - 1e-6))  # rounding must not lead past the last step
    step = torch.searchsorted(ends, numbers, right=True) - 1
    return step, numbers - ends.gather(1, step)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [v for v in values if isinstance(v, Tensor)]  # type: ignore[attr-defined, union-attr]
