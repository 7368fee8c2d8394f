"""What transformers computes in many small calls for one token on a CPU, in one each: attention and RMSNorm.

    tc.fuse_(model)

State dicts and saved folders stay as they are. Each op stands aside, and leaves the work to what was there before,
where it has no CPU kernel or the tensors are elsewhere, while gradients are recorded, and while a compiler is at work,
which fuses by itself.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tinycomp import ops
from tinycomp.ops import _registry

MARK = "_tinycomp_fused"  # set on attention modules whose "sdpa" may be the op


class Fused(NamedTuple):
    """How many attention modules and norms of a model were fused."""

    attentions: int
    norms: int


def fuse_(model: nn.Module) -> Fused:
    """Let a model decode with `ops.decode_attention`, and normalise with `ops.rms_norm`.

    Attention is that of modules which ask transformers' `AttentionInterface` for it, whenever it is "sdpa" there, for
    one query a sequence; transformers' entry of that name is replaced by a function that leaves all other modules to
    the one before. Norms of any class are fused that give what the op gives, tried on random numbers in the dtype they
    have now.

    Args:
        model: on any device; the ops run where it is on a CPU, when it is called.

    Returns:
        How many of each are fused now, also by earlier calls.

    Source: the equations are in `tinycomp.ops`.
    """
    attentions = norms = 0
    for module in list(model.modules()):
        if isinstance(module, _FusedNorm):
            norms += 1
        elif "Attention" in type(module).__name__ and _asks_transformers(module):
            setattr(module, MARK, True)
            attentions += 1
        elif (eps := _eps_of_norm(module)) is not None:
            setattr(module, MARK, (eps, module.weight.dtype))
            module.__class__ = _fused_class(type(module))  # type: ignore[arg-type]
            norms += 1
    if attentions:
        _replace_sdpa()
    return Fused(attentions, norms)


def _runs(op: str, x: Tensor) -> bool:
    """Whether the op has a kernel for this tensor, and nobody records or traces what is computed."""
    if not x.is_cpu or not _registry._FAST[op].cpu or torch.is_grad_enabled():
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0)


class _FusedNorm(nn.Module):
    """Before a norm's own class: its forward pass by the op, where that is the same."""

    def forward(self, *args: Any, **more: Any) -> Any:
        # Some norms take a gate beside their input, and norm in another way then.
        if len(args) == 1 and not more:
            (x,), weight, (eps, dtype) = args, self._parameters.get("weight"), getattr(self, MARK)
            if weight is not None and x.dtype == weight.dtype == dtype and _runs("rms_norm", x):
                return ops.rms_norm(x, weight, eps)
        return super().forward(*args, **more)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__bases__[1],), self.__dict__


@cache
def _fused_class(kind: Any) -> type[nn.Module]:
    return type(f"Fused{kind.__name__}", (_FusedNorm, kind), {})


def _empty(kind: type[nn.Module]) -> nn.Module:
    """What copying and pickling fill: the fused class of a norm's class has no name to be found under."""
    fused = _fused_class(kind)  # type: ignore[arg-type]
    return fused.__new__(fused)


def _eps_of_norm(module: nn.Module) -> float | None:
    """The epsilon of an RMSNorm of whatever class; None for other modules, and one whose forward was replaced."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if not isinstance(eps, float) or eps <= 0 or weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not alone or "forward" in vars(module) or weight.numel() == 0:
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(12, weight.numel(), generator=generator)
    # Rows that show where and how epsilon enters.
    probe *= torch.tensor([1.0, eps**0.5, 1e-2 * eps**0.5, 30.0]).repeat(3)[:, None]
    other = copy.deepcopy(module)
    some = nn.Parameter((torch.rand(weight.shape, generator=generator) + 0.5).to(weight))
    with torch.no_grad():
        other._parameters["weight"] = some
        x = probe.to(weight)
        try:
            wanted = type(other).forward(other, x)
        except Exception:  # it needs more than one tensor
            return None
        got = ops.rms_norm(x, some, eps)
    if not isinstance(wanted, Tensor) or wanted.dtype != got.dtype or wanted.shape != got.shape:
        return None
    if got.dtype.itemsize == 2:  # equal but for sums in another order: norms that round once differ in a quarter
        return eps if (wanted == got).float().mean() > 0.98 else None
    return eps if torch.allclose(wanted, got, rtol=1e-5, atol=0) else None


def _asks_transformers(module: nn.Module) -> bool:
    """Whether the file that defines the module takes its attention from transformers' table."""
    return hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


@cache
def _replace_sdpa() -> None:
    """Put `_attention` before transformers' "sdpa", once; the name stays, for models compare it."""
    AttentionInterface.register("sdpa", _attention(ALL_ATTENTION_FUNCTIONS["sdpa"]))


def _attention(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, or for one query of a fused module the op."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if MARK in vars(module) and not dropout and _decodes(query, key, attention_mask) and not _unusual(more):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return ops.decode_attention(query, key, value, attention_mask, scale), None
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)

    return attention


def _decodes(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether the op computes what torch's attention would."""
    if query.shape[2] != 1 or query.shape[0] != key.shape[0] or not _runs("decode_attention", query):
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape == (key.shape[0], 1, 1, key.shape[2]))


def _unusual(more: dict[str, Any]) -> bool:
    """Whether the model asks for what only some implementations have: torch's takes it or refuses it."""
    return any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
