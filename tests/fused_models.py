"""What the tests of `tc.fuse_` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, OTHERS, VOCAB
from torch import Tensor

import tinycomp as tc
from tinycomp import ops

OPS = ("decode_attention", "rms_norm", "rotary_embedding", "silu_and_mul", "sequence")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """How often each op was called since the last time this was asked."""
    found: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(ops, name)

        def call(x: Any, *rest: Any) -> Any:
            found[name] += 1
            assert name != "decode_attention" or x.shape[2] == 1, "prompts are for torch"
            return real(x, *rest)

        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, counted(name))

    def taken() -> Counter[str]:
        now = found.copy()
        found.clear()
        return now

    return taken


def build(family: str, **fields: Any) -> Any:
    return (FAMILIES | OTHERS)[family].build(**fields)


def fused(family: str, **fields: Any) -> Any:
    model = build(family, **fields)
    tc.fuse_(model)
    return model


@torch.no_grad()
def decoded(model: Any, ids: Tensor, mask: Tensor | None, cache: Any = None) -> Tensor:
    """Logits of the prompt's last token and of four more, one by one."""
    found, tokens = [], ids
    for step in range(5):
        out = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[:, -1])
        tokens = torch.full((ids.shape[0], 1), 3 + step)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    return torch.stack(found)


def prompt() -> tuple[Tensor, Tensor]:
    """Three prompts, two of them padded on the left."""
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :5] = 0
    return ids, mask
