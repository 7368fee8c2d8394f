"""Timing, speed and the machine's limits against answers computed by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import counted_bert, counted_llama, counted_t5
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
)

from tinycomp.eval import machine, speed
from tinycomp.eval.machine import Ceilings, peak_memory
from tinycomp.eval.size import bytes_per_token, size_of
from tinycomp.eval.speed import speed_of
from tinycomp.eval.timing import Timing, interleaved, time_interleaved


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


@pytest.mark.parametrize("build", [counted_llama, counted_t5, counted_bert])
def test_speed_counts_steps_and_restores_the_mode(build, monkeypatch):
    monkeypatch.setattr(speed, "ceilings", lambda dtype: Ceilings(1e9, 1e9, 1))
    model, other = build().train(), build()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    other.register_forward_pre_hook(lambda *_: calls.append("other"))
    done = []
    found = speed_of({"model": model, "other": other}, 16, 3, repeats=2, on_progress=lambda *p: done.append(p))
    runs = [name for index, name in enumerate(calls) if index == 0 or calls[index - 1] != name]
    if build is not counted_bert:
        prefill = 0 if build is counted_t5 else 1  # the encoder-decoder's prefill calls its encoder only
        warm, timed = prefill + 1, prefill + 3
        assert calls[: 2 * warm] == ["model"] * warm + ["other"] * warm
        assert calls[2 * warm : 2 * (warm + timed)] == ["model"] * timed + ["other"] * timed
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
    model = counted_llama()
    seen = []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    speed_of({"model": model}, prefill_tokens=8, decode_tokens=4, repeats=1)
    prompt, steps = seen[2], torch.cat(seen[3:7], 1)  # behind the warm-up: its prompt and one step
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(steps, wanted[:, 8:])


def test_rates_above_the_limit_are_flagged(monkeypatch):
    monkeypatch.setattr(speed, "ceilings", lambda dtype: Ceilings(1e-6, 1e-6, 1))
    (found,) = speed_of({"model": counted_llama()}, 8, 2, repeats=1).values()
    assert [flag.split()[0] for flag in found.flags] == ["prefill", "decode"]
    assert "above this machine's limit" in found.flags[0]
    assert speed.above_limit("decode", 10.0, 10.0) == ()


def test_speed_errors():
    with pytest.raises(ValueError, match="got 0 models"):
        speed_of({})
    with pytest.raises(ValueError, match="repeats=0"):
        speed_of({"model": counted_llama()}, repeats=0)


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
