"""One row of figures for a model: what `tinycomp eval` prints, what the demo's table is made of."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from tinycomp.eval.quality import DEFAULT, Protocol, perplexity
from tinycomp.eval.size import is_causal, size_of
from tinycomp.eval.speed import Speed, speed_of


def protocol_of(name: str) -> Protocol:
    """The protocol that `name` spells: `ppl/<text>/<context>/<stride>/token` and, at will, `/first-<tokens>`.

    Raises:
        ValueError: `name` is no protocol.
    """
    kind, *parts = name.split("/")
    if kind != "ppl" or len(parts) not in (4, 5) or not (parts[1] + parts[2]).isdigit():
        raise ValueError(
            f"protocol: got {name!r}, allowed: ppl/TEXT/CONTEXT/STRIDE/token or that and /first-TOKENS; the default is "
            f"{DEFAULT.name}"
        )
    protocol = Protocol(parts[0], int(parts[1]), int(parts[2]), parts[3])
    if len(parts) == 5:
        tokens = parts[4].removeprefix("first-")
        if not tokens.isdigit():
            raise ValueError(f"protocol: got {parts[4]!r}, allowed: first-TOKENS")
        protocol = protocol.shortened(int(tokens))
    return protocol


def speed_fields(speed: Speed) -> dict[str, float | None]:
    """Median tokens per second under the report's names."""
    return {
        "prefill_tokens_s": speed.prefill.median,
        "decode_tokens_s": None if speed.decode is None else speed.decode.median,
    }


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    protocol: Protocol = DEFAULT,
    *,
    text: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    speed: bool = False,
) -> dict[str, Any]:
    """Size, perplexity and, at will, speed of a model.

    Args:
        model: dense or compressed.
        tokenizer: of a causal language model; None, or another kind of model, leaves the perplexity out.
        protocol: of the perplexity.
        text: the text, where the protocol names none that is bundled.
        folder: where the model is saved; adds `bytes_disk`.
        speed: also time the model; figures of two calls do not compare.

    Returns:
        JSON: the fields of `Size`, those of `PerplexityResult`, `prefill_tokens_s` and `decode_tokens_s`.
    """
    row: dict[str, Any] = dict(size_of(model, os.fspath(folder) if folder is not None else None).to_dict())
    if is_causal(model) and tokenizer is not None:
        row |= perplexity(model, tokenizer, protocol, text=text).to_dict()
    if speed:
        row |= speed_fields(speed_of({"model": model})["model"])
    return row
