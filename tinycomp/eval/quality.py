"""Quality under named protocols: token perplexity of causal language models, linear probes of encoder features."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.data import evaluation_text, token_ids

FULL_TOKENS = 4096
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of a linear probe, as fractions of the mean diagonal of the covariance


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a perplexity, but the model and its tokenizer.

    The text is tokenised without special tokens and its first `max_tokens` + 1 tokens are read. Windows of `context`
    predictions start every `stride` tokens; each scores the predictions that no earlier window has scored. The result
    is the exponential of the mean negative log-likelihood of the `max_tokens` predictions.

    Args:
        text: name of a bundled text, or the label of the text that the caller passes.
        context: tokens a prediction can see at most.
        stride: tokens between window starts, at most `context`; equal to it, windows do not overlap.
        unit: what the mean runs over; "token" only.
        max_tokens: predictions scored, fewer when the text is shorter.
    """

    text: str = "sotu-2013-2014"
    context: int = 512
    stride: int = 512
    unit: str = "token"
    max_tokens: int = FULL_TOKENS

    def __post_init__(self) -> None:
        if self.unit != "token":
            raise ValueError(f"protocol: got unit={self.unit!r}, allowed is 'token'")
        if not 1 <= self.stride <= self.context:
            raise ValueError(
                f"protocol: got stride={self.stride}, context={self.context}; needs 1 <= stride <= context"
            )
        if self.max_tokens < self.context:
            raise ValueError(f"protocol: got max_tokens={self.max_tokens}, must be at least context={self.context}")

    @property
    def name(self) -> str:
        """`ppl/<text>/<context>/<stride>/token`, and `/first-<n>` where it is not the usual 4,096 predictions."""
        name = f"ppl/{self.text}/{self.context}/{self.stride}/{self.unit}"
        return name if self.max_tokens == FULL_TOKENS else f"{name}/first-{self.max_tokens}"

    @property
    def hash(self) -> str:
        """`fingerprint` of the bundled text that the protocol names."""
        return self.fingerprint(evaluation_text(self.text).encode())

    def fingerprint(self, content: bytes) -> str:
        """First 16 hex digits of the SHA-256 of all parameters and the text: equal only for equal protocols."""
        fields = json.dumps({**asdict(self), "sha256": hashlib.sha256(content).hexdigest()}, sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    def shortened(self, max_tokens: int) -> Protocol:
        """The same protocol over fewer predictions; its name and hash say so."""
        return replace(self, max_tokens=max_tokens)

    def windows(self, predictions: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, first): predictions begin..end share one forward, those from `first` on are scored."""
        scored = 0
        for begin in range(0, predictions, self.stride):
            end = min(begin + self.context, predictions)
            yield begin, end, scored
            scored = end
            if end == predictions:
                return


DEFAULT = Protocol()


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on. `loss` is the mean in nats per token; `seconds` are wall time."""

    protocol: str
    hash: str
    perplexity: float
    loss: float
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    model: nn.Module,
    tokenizer_or_ids: Any,
    protocol: Protocol = DEFAULT,
    *,
    text: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """exp(mean over predicted tokens of -log p(token | its window so far)).

    Args:
        model: causal language model; called as `model(input_ids=...)`, gives `.logits` or logits (1, length, vocab).
        tokenizer_or_ids: tokenizer for the protocol's text, or token ids, int64 (tokens,) or (1, tokens).
        protocol: window lengths and the text's name.
        text: the text, where the protocol names none that is bundled.
        on_progress: called with (predictions scored, predictions in all) after each window.

    Raises:
        ValueError: empty text, fewer tokens than one window, ids outside the vocabulary.
        TypeError: ids that are not integers, a model without per-token logits.

    Source: fixed-length perplexity as in common use; the shared boundary token makes every token but the first count.
    """
    ids, content = _ids_and_content(tokenizer_or_ids, protocol, text)
    if len(ids) <= protocol.context:
        raise ValueError(
            f"perplexity: got {len(ids)} tokens, {protocol.name} needs at least {protocol.context + 1}; pass a longer "
            "text or a protocol with a smaller context"
        )
    ids = ids[: protocol.max_tokens + 1]
    rows = _vocabulary(model)
    if int(ids.min()) < 0 or (rows is not None and int(ids.max()) >= rows):
        raise ValueError(
            f"perplexity: token id {int(ids.max())} is outside the model's {rows} embeddings; "
            "pass the tokenizer that belongs to the model"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training, start, total = model.training, time.perf_counter(), 0.0
    model.eval()
    try:
        for begin, end, first in protocol.windows(len(ids) - 1):
            window = ids[begin : end + 1].to(device)
            total += _negative_log_likelihood(model, window, first - begin)
            if on_progress is not None:
                on_progress(end, len(ids) - 1)
    finally:
        model.train(training)
    loss = total / (len(ids) - 1)
    return PerplexityResult(
        protocol=protocol.name,
        hash=protocol.fingerprint(content),
        perplexity=float(torch.tensor(loss, dtype=torch.float64).exp()),  # inf, not an overflow error, when it explodes
        loss=loss,
        tokens=len(ids) - 1,
        seconds=time.perf_counter() - start,
    )


def _ids_and_content(source: Any, protocol: Protocol, text: str | None) -> tuple[Tensor, bytes]:
    """Token ids (tokens,) and the bytes that stand for the text in the protocol's hash."""
    if isinstance(source, Tensor | list | tuple):
        ids = torch.as_tensor(source).cpu()
        ids = ids[0] if ids.dim() == 2 and ids.shape[0] == 1 else ids
        if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"perplexity: got ids {tuple(ids.shape)} {ids.dtype}, allowed are int64 (tokens,)")
        return ids.long(), ids.long().numpy().tobytes()
    text = evaluation_text(protocol.text) if text is None else text
    if not text.strip():
        raise ValueError("perplexity: the text is empty; pass text, or name a bundled one in the protocol")
    return torch.tensor(token_ids(source, text), dtype=torch.int64), text.encode()


def _vocabulary(model: nn.Module) -> int | None:
    """Rows of the input embedding, or None where the model does not say."""
    get: Any = getattr(model, "get_input_embeddings", None)
    return getattr(get(), "num_embeddings", None) if get is not None else None


@torch.no_grad()
def _negative_log_likelihood(model: nn.Module, window: Tensor, skip: int) -> float:
    """Sum over predictions from index `skip` on, in nats; fp32 whatever the model's dtype."""
    output = model(input_ids=window[None, :-1])
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[1] != len(window) - 1:
        raise TypeError("perplexity: the model gives no logits (1, length, vocab); allowed are causal language models")
    return float(functional.cross_entropy(logits[0, skip:].float(), window[skip + 1 :], reduction="sum"))


def linear_probe(features_train: Tensor, labels_train: Tensor, features_test: Tensor, labels_test: Tensor) -> float:
    """Test accuracy of a linear classifier fitted in closed form.

    argmax of (x - mean) B + prior with B = (Xc' Xc + ridge * mean diagonal * I)^-1 Xc' Yc, Y one-hot, and the ridge of
    `RIDGES` that has the least exact leave-one-out squared error on the training part: a fixed one that suits one model
    flatters another. Deterministic, so two models differ only by their features.

    Args:
        features_train: (n, d), any float dtype; solved in fp64.
        labels_train: (n,) integers.
        features_test: (m, d).
        labels_test: (m,).

    Raises:
        ValueError: shapes that do not match, fewer than two classes, NaN or Inf features.
    """
    x, z = features_train.double(), features_test.double()
    shapes = f"train {tuple(x.shape)} with {len(labels_train)} labels, test {tuple(z.shape)} with {len(labels_test)}"
    if x.dim() != 2 or z.dim() != 2 or x.shape[1] != z.shape[1] or not len(z):
        raise ValueError(f"linear probe: got {shapes}; allowed are (n, d) and (m, d), m at least 1")
    if len(x) != len(labels_train) or len(z) != len(labels_test):
        raise ValueError(f"linear probe: got {shapes}; needs one label a row")
    if not (x.isfinite().all() and z.isfinite().all()):
        raise ValueError("linear probe: the features hold NaN or Inf; check the compressed model")
    classes, codes = torch.unique(labels_train, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"linear probe: got {len(classes)} class in the training labels, needs at least 2")
    targets = functional.one_hot(codes, len(classes)).double()
    mean, prior = x.mean(0), targets.mean(0)
    x, targets = x - mean, targets - prior
    energy, basis = torch.linalg.eigh(x.mT @ x)
    energy = energy.clamp(min=0)
    rotated = x @ basis
    moment = rotated.mT @ targets
    best, weight = math.inf, moment
    for ridge in RIDGES:
        damped = (energy + max(ridge * float(energy.mean()), torch.finfo(x.dtype).tiny))[:, None]
        leverage = (rotated.square() @ damped.reciprocal()).add(1 / len(x)).clamp(max=1 - 1e-9)
        left_out = float(((targets - rotated @ (moment / damped)) / (1 - leverage)).square().sum())
        if left_out < best:
            best, weight = left_out, basis @ (moment / damped)
    predicted = classes[((z - mean) @ weight + prior).argmax(1)]
    return float((predicted == labels_test).double().mean())
