"""`ops.decode_attention` as one of transformers' attention implementations.

    model.set_attn_implementation("tinycomp")  # or from_pretrained(..., attn_implementation="tinycomp")

It is "sdpa" in every respect but one: on a CPU, one new token per sequence, with nothing to differentiate and no
compiler at work, goes to the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tinycomp import ops

NAME = "tinycomp"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """(batch, queries, heads, d) of attention, and no weights, as transformers asks for them; see `ops`."""
    if _decodes(query, key, value, attention_mask) and not dropout and not _unusual(more):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ops.decode_attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)


def _decodes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the op computes what torch's attention would, and nobody looks inside."""
    if torch.compiler.is_compiling() or not query.is_cpu or query.shape[2] != 1 or query.shape[0] != key.shape[0]:
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape == (key.shape[0], 1, 1, key.shape[2]))


def _unusual(more: dict[str, Any]) -> bool:
    """Whether the model asks for what only some implementations have: torch's takes it or refuses it."""
    return any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))


def register() -> None:
    """Make "tinycomp" a name that transformers knows."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
