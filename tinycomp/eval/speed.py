"""Tokens per second of models, interleaved in one process and held against the machine's limits."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from tinycomp.eval.machine import ceilings, load_average
from tinycomp.eval.size import (
    bytes_per_token,
    encoder_tokens,
    example_inputs,
    flops_per_token,
    is_causal,
    tokens_of,
)
from tinycomp.eval.timing import Rate, Timing, interleaved, time_interleaved

__all__ = ["Rate", "Speed", "Timing", "above_limit", "speed_of", "time_interleaved"]


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one model at batch 1.

    prefill: causal models: one forward over the prompt that fills the cache; encoder-decoders: the encoder; encoders:
        one forward, patches are an image's tokens.
    decode: greedy steps behind the prompt; None for encoders.
    flags: rates above the machine's limit: something other than the model was measured, or its weights were cached.
    """

    prefill: Rate
    decode: Rate | None
    prefill_tokens: int
    decode_tokens: int
    threads: int
    load_average: float
    flags: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def speed_of(
    models: Mapping[str, nn.Module],
    prefill_tokens: int = 128,
    decode_tokens: int = 16,
    repeats: int = 5,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Prefill and decode tokens per second of several models, interleaved in this process, one warm-up round first.

    Args:
        models: name -> model; put the dense one in the same call, rates of two calls do not compare.
        prefill_tokens: length of the prompt.
        decode_tokens: timed greedy steps per repeat.
        repeats: rounds.
        on_progress: called with (runs done, runs in all).

    Raises:
        ValueError: no models, a size below 1.
    """
    if not models or min(prefill_tokens, decode_tokens, repeats) < 1:
        raise ValueError(
            f"speed: got {len(models)} models, prefill_tokens={prefill_tokens}, decode_tokens={decode_tokens}, "
            f"repeats={repeats}; needs at least 1 of each"
        )
    training = {name: model.training for name, model in models.items()}
    runs = {name: _Run(model.eval(), prefill_tokens, decode_tokens) for name, model in models.items()}
    try:
        done, total = 0, len(runs) * (repeats + 1)
        for rounds, timed in ((1, False), (repeats, True)):
            for name in interleaved(list(runs), rounds):
                runs[name].once(timed)
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
        return {name: run.result() for name, run in runs.items()}
    finally:
        for name, model in models.items():
            model.train(training[name])


class _Run:
    """One model under measurement."""

    def __init__(self, model: nn.Module, prefill_tokens: int, decode_tokens: int) -> None:
        self.model = model
        self.encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.generates = self.encoder_decoder or is_causal(model)
        length = prefill_tokens if self.generates else min(prefill_tokens, encoder_tokens(model))
        self.inputs = example_inputs(model, length)
        if self.generates and not self.encoder_decoder:
            self.inputs |= {"use_cache": True, **_last_logits_only(model)}  # type: ignore[dict-item]
        self.decode_tokens = decode_tokens
        self.tokens = 0
        self.prefill_seconds: list[float] = []
        self.decode_seconds: list[float] = []

    @torch.no_grad()
    def once(self, timed: bool) -> None:
        start = time.perf_counter()
        output: Any
        if self.encoder_decoder:
            encoder: Any = self.model.get_encoder()  # type: ignore[operator]
            output = encoder(input_ids=self.inputs["input_ids"])
        else:
            output = self.model(**self.inputs)
        prefill = time.perf_counter() - start
        self.tokens = tokens_of(self.inputs, output)
        decode = self._decode(output, self.decode_tokens if timed else 1) if self.generates else 0.0
        if timed:
            self.prefill_seconds.append(prefill)
            self.decode_seconds.append(decode)

    def _decode(self, output: Any, steps: int) -> float:
        """Seconds of so many greedy steps; the cache is the one that the prompt filled."""
        device = self.inputs["input_ids"].device
        if self.encoder_decoder:
            step = {"encoder_outputs": output, "use_cache": True}
            name, past = "decoder_input_ids", None
            token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        else:
            step = {"use_cache": True}
            name, past = "input_ids", output.past_key_values
            token = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(steps):
            result = self.model(**{name: token}, past_key_values=past, **step)
            past, token = result.past_key_values, result.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    def result(self) -> Speed:
        prefill = Timing(tuple(self.prefill_seconds)).rate(self.tokens)
        decode = Timing(tuple(self.decode_seconds)).rate(self.decode_tokens) if self.generates else None
        return Speed(
            prefill=prefill,
            decode=decode,
            prefill_tokens=self.tokens,
            decode_tokens=self.decode_tokens if self.generates else 0,
            threads=torch.get_num_threads(),
            load_average=load_average(),
            flags=self._flags(prefill, decode),
        )

    def _flags(self, prefill: Rate, decode: Rate | None) -> tuple[str, ...]:
        first = next(self.model.parameters())
        if first.device.type != "cpu" or self.encoder_decoder:
            return ()
        top = ceilings(first.dtype)
        flops = flops_per_token(self.model, self.inputs)
        flags = above_limit("prefill", prefill.median, top.gemm_gf_s * 1e9 / max(flops, 1))
        if decode is not None:
            flags += above_limit("decode", decode.median, top.stream_gb_s * 1e9 / bytes_per_token(self.model))
        return flags


def above_limit(phase: str, rate: float, limit: float) -> tuple[str, ...]:
    """One sentence when `rate` is above `limit`, both in tokens/s."""
    if rate <= limit:
        return ()
    return (
        f"{phase} {rate:.1f} tokens/s is above this machine's limit of {limit:.1f}: cached weights or a busy machine",
    )


def _last_logits_only(model: nn.Module) -> dict[str, int]:
    """As in generation: the head runs on the prompt's last token only, where the model can do that."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
