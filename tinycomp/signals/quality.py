"""How good a model is on labelled or plain text batches: accuracy of a classifier, loss of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.calib.loss import no_cache
from tinycomp.data import check_labels
from tinycomp.eval.size import is_causal

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Quality:
    """loss: mean in nats per sequence or token; accuracy: of a classifier, None for a language model.

    score is what people judge by, larger is better: the accuracy, or minus the loss. gain is what regressors learn:
    minus the loss, which few samples tell more exactly than the accuracy.
    """

    loss: float
    accuracy: float | None
    correct: tuple[bool, ...] = ()

    @property
    def score(self) -> float:
        return -self.loss if self.accuracy is None else self.accuracy

    @property
    def gain(self) -> float:
        return -self.loss


def rows_of(batch: Batch) -> list[Batch]:
    """The samples of a batch as batches of one, without the padding before and behind them.

    Raises:
        ValueError: a sample is nothing but padding.
    """
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(next(iter(batch.values()))))]
    return [_trimmed(row) for row in rows]


def _trimmed(row: Batch) -> Batch:
    mask = row.get("attention_mask")
    if mask is None or bool(mask.all()):
        return row
    real = mask[0].nonzero()[:, 0].tolist()
    if not real:
        raise ValueError("layer pruning: got a sample whose attention_mask is all 0, allowed is text; leave it out")
    return {k: v[:, real[0] : real[-1] + 1] if v.shape[:2] == mask.shape else v for k, v in row.items()}


def losses(model: Any, batch: Batch, attentions: bool = False) -> tuple[Tensor, Any]:
    """(loss of each sequence (B,) of a classifier or of each next token (B, T - 1), the model's output).

    A classifier without labels is judged by its own prediction. Padding has loss 0.

    Raises:
        ValueError: a model that is neither.
    """
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    output = model(**inputs, **({"output_attentions": True} if attentions else {}))
    logits = getattr(output, "logits", None)
    wanted = 3 if is_causal(model) else 2
    if not isinstance(logits, Tensor) or logits.ndim != wanted or logits.shape[-1] < 2:
        raise ValueError(
            f"layer pruning: got a {type(model).__name__}, allowed are causal language models and classifiers: "
            "their quality can be measured; put a classification head on the encoder"
        )
    if logits.ndim == 2:
        labels = batch.get("labels", logits.detach().argmax(-1))
        check_labels(labels, logits.shape[:1], logits.shape[1], "layer pruning")
        return functional.cross_entropy(logits.float(), labels, reduction="none"), output
    ids = batch["input_ids"]
    loss = functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    mask = batch.get("attention_mask")
    return (loss if mask is None else loss * (mask[:, 1:] * mask[:, :-1])), output


def quality(model: nn.Module, batches: Sequence[Batch]) -> Quality:
    """Mean loss, and accuracy of a classifier, over all batches; one forward pass each.

    Raises:
        ValueError: a classifier without labels, or a model that is neither classifier nor language model.
    """
    total, count, correct = 0.0, 0, []
    training = model.training
    model.eval()
    with torch.no_grad(), no_cache(model):
        for batch in batches:
            loss, output = losses(model, batch)
            total += float(loss.double().sum())
            if loss.ndim == 1:
                if "labels" not in batch:
                    raise ValueError(
                        "layer pruning: got a classifier and data without labels; add labels to each batch"
                    )
                correct += (output.logits.argmax(-1) == batch["labels"]).tolist()
                count += len(loss)
            else:
                mask = batch.get("attention_mask")
                count += loss.numel() if mask is None else int((mask[:, 1:] * mask[:, :-1]).sum())
    model.train(training)
    if not count:
        raise ValueError("layer pruning: got samples of one token, allowed are longer ones; nothing is predicted here")
    return Quality(total / count, sum(correct) / len(correct) if correct else None, tuple(correct))
