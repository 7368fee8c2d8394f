"""What transformers computes in many small calls for one token on a CPU, in one each: attention and RMSNorm.

    tc.fuse_(model)

Nothing that is saved changes. Each stands aside, and leaves the work to what was there before, for other devices, while
gradients are recorded, and while a compiler is at work, which fuses by itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tinycomp import ops

ATTENTION = "tinycomp"  # its name in transformers: model.set_attn_implementation(ATTENTION)


def fuse_(model: nn.Module) -> int:
    """Let a model decode with `ops.decode_attention` in the place of "sdpa", and normalise with `ops.rms_norm`.

    Args:
        model: on any device; the ops run where it is on a CPU, when it is called.

    Returns:
        How many norms were fused: those that give what the op gives, tried on random numbers.

    Source: transformers' AttentionInterface; the equations are in `tinycomp.ops`.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    found = [(module, eps) for module in model.modules() if (eps := _eps_of_norm(module)) is not None]
    for module, eps in found:
        # A partial can be copied and pickled with its module, which a closure over it cannot.
        module.forward = partial(_norm, module, eps)
    return len(found)


def _quiet(x: Tensor) -> bool:
    """Whether nobody records or traces what is computed, on a CPU."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.is_cpu and not torch.is_grad_enabled() and not traced


def _norm(module: nn.Module, eps: float, *args: Any, **more: Any) -> Any:
    """The forward pass of a fused norm; some take a gate beside their input, and norm in another way then."""
    if len(args) == 1 and not more:
        (x,), weight = args, module._parameters["weight"]
        if _quiet(x) and weight is not None and x.dtype == weight.dtype:
            return ops.rms_norm(x, weight, eps)
    return type(module).forward(module, *args, **more)


def _eps_of_norm(module: nn.Module) -> float | None:
    """The epsilon of an RMSNorm of whatever class; None for other modules, and one whose forward was replaced."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not isinstance(eps, float) or weight is None or weight.dim() != 1 or not alone or "forward" in vars(module):
        return None
    probe = torch.randn(4, weight.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        wanted = module(probe)
        got = ops.rms_norm(probe, weight, eps)
    close = 4 * torch.finfo(weight.dtype).eps
    same = wanted.dtype == got.dtype and torch.allclose(wanted, got, rtol=close, atol=close)
    return eps if same else None


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
    """(batch, queries, heads, d) of attention, and no weights, as transformers asks for them: "sdpa" with the op."""
    if _decodes(query, key, attention_mask) and not dropout and not _unusual(more):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ops.decode_attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)


def _decodes(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether the op computes what torch's attention would."""
    if query.shape[2] != 1 or query.shape[0] != key.shape[0] or not _quiet(query):
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape == (key.shape[0], 1, 1, key.shape[2]))


def _unusual(more: dict[str, Any]) -> bool:
    """Whether the model asks for what only some implementations have: torch's takes it or refuses it."""
    return any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))


def register() -> None:
    """Make the attention's name known to transformers."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
