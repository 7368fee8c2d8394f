"""Training samples: one row per text window or input, padded when they are put together; and the held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tinycomp import data as inputs
from tinycomp.eval.size import is_causal
from tinycomp.train.config import Distill
from tinycomp.train.losses import Batch, Task

_PADDING = {"labels": -100, "attention_mask": 0, "decoder_attention_mask": 0}


class Samples(Dataset[Batch]):
    """Rows without a batch dimension; each carries its number, under which the teacher's answers are stored."""

    def __init__(self, rows: Sequence[Batch], first: int, pad_token_id: int):
        self.rows, self.first, self.pad_token_id = list(rows), first, pad_token_id

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return self.rows[index] | {"sample": torch.tensor(self.first + index)}

    def collate(self, rows: Sequence[Batch]) -> Batch:
        """One batch; rows of unequal length are padded at the end, with a mask that says so."""
        if any(len({row[name].shape for row in rows}) > 1 for name in rows[0]):
            rows = [self._masked(row) for row in rows]
        out = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if values[0].ndim == 1:
                length, fill = max(len(v) for v in values), _PADDING.get(name, 0)
                if name in ("input_ids", "decoder_input_ids"):
                    fill = self.pad_token_id
                values = [functional.pad(v, (0, length - len(v)), value=fill) for v in values]
            out[name] = torch.stack(values)
        return out

    @staticmethod
    def _masked(row: Batch) -> Batch:
        for name, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if name in row and mask not in row:
                row = row | {mask: torch.ones_like(row[name])}
        return row

    def batches(self, size: int) -> list[Batch]:
        return [self.collate([self[j] for j in range(i, min(i + size, len(self)))]) for i in range(0, len(self), size)]


@dataclass(frozen=True)
class Split:
    """Samples to learn from and samples to judge by."""

    train: Samples
    held_out: Samples


def split_samples(
    model: nn.Module, data: Any, held_out: Any, tokenizer: Any, config: Distill, num_samples: int, max_seq_length: int
) -> Split:
    """The samples of both parts, the same on every process; without `held_out` the last part of `data` is it.

    Raises:
        ValueError: fewer than two samples, or fewer than one batch.
    """
    train = _rows(model, data, tokenizer, num_samples, max_seq_length, config)
    if held_out is None:
        count = max(round(len(train) * config.held_out), 1)
        train, judged = train[:-count], train[-count:]
    else:
        judged = _rows(model, held_out, tokenizer, num_samples, max_seq_length, config)
    if not train or (config.steps and len(train) < config.batch_size):
        raise ValueError(
            f"recover: got {len(train)} samples to learn from and {len(judged)} held out, allowed is at least one "
            f"batch of {config.batch_size}; pass more data or lower batch_size"
        )
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    return Split(Samples(train, 0, pad), Samples(judged, len(train), pad))


def _rows(model: nn.Module, data: Any, tokenizer: Any, count: int, length: int, config: Distill) -> list[Batch]:
    batches = inputs.batches(
        data, tokenizer, num_calibration_samples=count, max_seq_length=length, batch_size=config.batch_size,
        seed=config.seed,
    )  # fmt: skip
    text = is_causal(model) or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    ready = [inputs.for_model(batch, model, labels=text and "decoder_input_ids" not in batch) for batch in batches]
    return [{name: value[i] for name, value in batch.items()} for batch in ready for i in range(_size(batch))]


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def task_of(model: nn.Module, batch: Batch) -> tuple[Task, int]:
    """Find out with one forward pass what the model predicts, and among how many classes."""
    with torch.no_grad():
        logits = logits_of(model(**model_inputs(batch)))
    if logits is None or logits.ndim > 3:
        return Task("none"), 0
    if logits.ndim == 2:
        return Task("sequence"), logits.shape[-1]
    if is_causal(model):
        return Task("causal"), logits.shape[-1]
    return Task("seq2seq" if model.config.is_encoder_decoder else "token"), logits.shape[-1]  # type: ignore[union-attr]


def logits_of(output: Any) -> Tensor | None:
    """The logits of a model's output; None when it has none, or one class only (a regression)."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.ndim >= 2 and logits.shape[-1] > 1 else None


def model_inputs(batch: Batch) -> Batch:
    """What the model is called with: everything but the labels and the sample's number."""
    return {name: value for name, value in batch.items() if name not in ("labels", "sample")}
