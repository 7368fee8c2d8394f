"""The recovery objective: divergence from stored teacher logits, cross-entropy, hidden states; padding counts nowhere.

Every term is a sum that the caller divides by a count, so that accumulated batches and several processes add up to
exactly the mean of one large batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.train.config import Distill

Batch = dict[str, Tensor]
SMALLEST_TAIL = 1e-6  # floor of the student's mass outside the stored logits: its logarithm must stay finite


@dataclass(frozen=True)
class Task:
    """Where a model makes predictions, and which tokens of each stack are real.

    kind: "causal" (the next token at every position), "seq2seq" and "token" (one prediction at every position of the
        decoder or encoder), "sequence" (one per sample), "none" (no logits).
    """

    kind: Literal["causal", "seq2seq", "token", "sequence", "none"]

    def real(self, batch: Batch, length: int, decoder: bool = False) -> Tensor:
        """(B, length) bool: tokens of a stack that are not padding."""
        mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None and decoder and batch.get("labels") is not None and self.kind == "seq2seq":
            mask = batch["labels"] != -100
        if mask is not None and mask.ndim == 2 and mask.shape[1] == length:
            return mask.bool()
        first = next(iter(batch.values()))
        return torch.ones(len(first), length, dtype=torch.bool, device=first.device)

    def positions(self, batch: Batch) -> Tensor:
        """(B, T) bool, or (B,) for "sequence": where a prediction counts. Causal: T is one less than the ids'."""
        if self.kind == "none":
            return torch.zeros(0, dtype=torch.bool)
        if self.kind == "sequence":
            return torch.ones(len(next(iter(batch.values()))), dtype=torch.bool)
        name = "decoder_input_ids" if self.kind == "seq2seq" else "input_ids"
        real = self.real(batch, batch[name].shape[1], self.kind == "seq2seq")
        return real[:, 1:] & real[:, :-1] if self.kind == "causal" else real

    def rows(self, logits: Tensor, batch: Batch) -> Tensor:
        """(n, classes) float32: the logits of the predictions that count, sample after sample."""
        positions = self.positions(batch).to(logits.device)
        return (logits[:, :-1] if self.kind == "causal" else logits)[positions].float()

    def labels(self, batch: Batch) -> Tensor | None:
        """(n,) int64 labels of the same predictions, -100 where there is none; None without labels."""
        labels = batch.get("labels")
        if labels is None or self.kind == "none":
            return None
        positions = self.positions(batch).to(labels.device)
        return (labels[:, 1:] if self.kind == "causal" else labels)[positions]

    def counts(self, batch: Batch) -> Tensor:
        """(3,) float64: predictions, labels, samples: what the three sums are divided by."""
        labels = self.labels(batch)
        counted = 0 if labels is None else int((labels != -100).sum())
        return torch.tensor(
            [int(self.positions(batch).sum()), counted, len(next(iter(batch.values())))], dtype=torch.float64
        )


@dataclass
class Targets:
    """What the teacher said about one batch: its largest logits, and the outputs of its blocks.

    values: (n, k) float32, indices (n, k) int64, total (n,) float32: log-sum-exp of all logits over the temperature;
        all None without a teacher or logits.
    hidden: per student block (real tokens of the batch, d), or None.
    scales: per student block the variance of the teacher's output.
    """

    values: Any
    indices: Any
    total: Any
    hidden: list[Tensor] | None
    scales: list[float]


def divergence(rows: Tensor, targets: Targets, temperature: float) -> Tensor:
    """Sum over predictions of KL(p || q), both at `temperature`, with every class that is not stored in one bucket.

    Exact when all classes are stored; otherwise a lower bound of the full divergence, zero where the models agree.
    """
    z = rows / temperature
    log_q = z.gather(1, targets.indices) - z.logsumexp(1, keepdim=True)
    log_p = targets.values / temperature - targets.total[:, None]
    p = log_p.exp()
    loss = (p * (log_p - log_q)).sum()
    if targets.indices.shape[1] < rows.shape[1]:
        p_rest = (1 - p.sum(1)).clamp(min=0)
        q_rest = (1 - log_q.exp().sum(1)).clamp(min=SMALLEST_TAIL)
        loss = loss + (torch.xlogy(p_rest, p_rest.clamp(min=SMALLEST_TAIL)) - p_rest * q_rest.log()).sum()
    return loss


def hidden_error(hidden: list[Tensor], masks: list[Tensor], targets: Targets) -> Tensor:
    """Sum over samples of the mean over real tokens and blocks of |h - h_teacher|² / (d · variance of the block).

    Args:
        hidden: block outputs (B, T, d).
        masks: (B, T) bool of each.
        targets: of the same batch.
    """
    assert targets.hidden is not None
    total = hidden[0].new_zeros((), dtype=torch.float32)
    for h, mask, target, scale in zip(hidden, masks, targets.hidden, targets.scales, strict=True):
        per_token = (h[mask].float() - target.float()).pow(2).mean(1) / scale
        weight = (1.0 / mask.sum(1).clamp(min=1))[:, None].expand(mask.shape)[mask]
        total = total + (per_token * weight.to(per_token)).sum()
    return total / len(hidden)


def objective(
    task: Task, logits: Tensor | None, hidden: list[Tensor], masks: list[Tensor], batch: Batch, targets: Targets,
    counts: Tensor, config: Distill,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """(weighted sum of the terms, each divided by its count; {term: its unweighted value}).

    Args:
        task: of the model.
        logits: of the student, or None.
        hidden: its block outputs, empty when not needed.
        masks: real tokens of each block.
        batch: the inputs, with labels where there are any.
        targets: the teacher's.
        counts: (3,), see `Task.counts`, of the whole step (all accumulated batches of all processes).
        config: weights and temperature.
    """
    predictions, labelled, samples = (max(float(c), 1.0) for c in counts)
    total: Any = 0.0
    terms: dict[str, float] = {}
    rows = None if logits is None else task.rows(logits, batch)
    if rows is not None and config.kl and targets.values is not None:
        value = divergence(rows, targets, config.temperature) * config.temperature**2 / predictions
        total, terms["kl"] = total + config.kl * value, float(value.detach())
    labels = task.labels(batch)
    if rows is not None and labels is not None and (config.ce or not torch.is_grad_enabled()):  # judged even if unused
        value = functional.cross_entropy(rows, labels, ignore_index=-100, reduction="sum") / labelled
        total, terms["ce"] = total + config.ce * value, float(value.detach())
    if config.hidden and hidden:
        value = hidden_error(hidden, masks, targets) / samples
        total, terms["hidden"] = total + config.hidden * value, float(value.detach())
    return total, terms


class BlockOutputs:
    """Records the hidden state that each block returns; a context manager around forward passes."""

    def __init__(self, model: nn.Module, paths: list[str]):
        self.model, self.paths = model, paths
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> BlockOutputs:
        def hook(path: str) -> Any:
            def record(_: nn.Module, __: Any, output: Any) -> None:
                self.found[path] = output if isinstance(output, Tensor) else output[0]

            return record

        self._handles = [self.model.get_submodule(p).register_forward_hook(hook(p)) for p in self.paths]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, in the order of `paths`."""
        out = [self.found[p] for p in self.paths]
        self.found.clear()
        return out
