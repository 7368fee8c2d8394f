"""The scalar whose gradients measure curvature, and a forward pass without a cache."""

from __future__ import annotations

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
            # Inverse transform: torch.multinomial takes ten times as long on a large vocabulary.
            cumulative = flat.detach().softmax(-1).cumsum(-1)
            draws = torch.rand(len(flat), 1).to(flat.device) * cumulative[:, -1:]
            labels = torch.searchsorted(cumulative, draws).flatten().clamp(max=flat.shape[-1] - 1)
            return nn.functional.cross_entropy(flat, labels, reduction="sum")
        hidden = getattr(output, "last_hidden_state", None)
        value = hidden if isinstance(hidden, Tensor) else next(v for v in _tensors(output) if v.is_floating_point())
        value = value.float()
        if mask is not None and value.shape[: mask.ndim] == mask.shape:
            value = value[mask]
        signs = torch.randint(0, 2, value.shape).to(value) * 2 - 1
        # Per row: |d value|^2 / |value|^2, whose second derivative is 2 / |value|^2.
        scale = (2.0 / value.detach().pow(2).sum(-1, keepdim=True).mean().clamp(min=1e-12)).sqrt()
        return (value * signs).sum() * scale


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [v for v in values if isinstance(v, Tensor)]  # type: ignore[attr-defined, union-attr]
