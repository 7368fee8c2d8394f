"""Attention, norms, rotary embeddings and gated feed-forward sublayers of a model by one op each."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tinycomp import ops
from tinycomp.fused._base import MARK, FusedModule, Shift, is_heard, runs


def replacement(module: nn.Module) -> tuple[type[FusedModule], Any] | None:
    """The class to put before the module's own and what it has to remember; None for modules that stay."""
    if "forward" in vars(module):
        return None
    if (eps := _eps_of_norm(module)) is not None:
        return FusedNorm, (eps, module.weight.dtype)
    if "RotaryEmbedding" in type(module).__name__ and _replace_rotary(type(module).__module__):
        return _FusedRotaryEmbedding, True
    return (FusedMLP, type(module.act_fn)) if _gates(module) else None


class FusedNorm(FusedModule):
    counted_as = "norms"

    def forward(self, *args: Any, **more: Any) -> Any:
        # Some norms take a gate beside their input, and norm in another way then.
        if len(args) == 1 and not more:
            (x,), weight, (eps, dtype) = args, self._parameters.get("weight"), getattr(self, MARK)
            if weight is not None and x.dtype == weight.dtype == dtype and runs("rms_norm", x):
                return ops.rms_norm(x, weight, eps)
        return super().forward(*args, **more)


class FusedMLP(FusedModule):
    counted_as = "mlps"

    def forward(self, *args: Any, **more: Any) -> Any:
        if len(args) == 1 and not (more or self.training) and runs("silu_and_mul", args[0]):
            modules = self._modules
            act: Any = modules.get("act_fn")
            if type(act) is getattr(self, MARK) and not is_heard(act):
                gate, up = (modules[name](args[0]) for name in GATED[:2])  # type: ignore[misc]
                same = gate.dtype == up.dtype and gate.shape == up.shape
                return modules["down_proj"](ops.silu_and_mul(gate, up) if same else act(gate) * up)  # type: ignore[misc]
        return super().forward(*args, **more)


class _FusedRotaryEmbedding(FusedModule):
    """Marks its angles for those that turn queries and keys by them and do not know the module.

    The mark is the model's configuration where that asks for torch's attention, which saves each layer the question.
    """

    counted_as = "rotary_embeddings"

    def forward(self, *args: Any, **more: Any) -> Any:
        angles = super().forward(*args, **more)
        if isinstance(angles, tuple) and len(angles) == 2 and runs("rotary_embedding", angles[0]):
            config = getattr(self, "config", None)
            plain = getattr(config, "_attn_implementation", None) == "sdpa"
            setattr(angles[0], MARK, config if plain else True)
        return angles


def _eps_of_norm(module: nn.Module) -> float | None:
    """The epsilon of an RMSNorm of whatever class; None for other modules."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module._parameters.get("weight")
    if not isinstance(eps, float) or eps <= 0 or weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules
    if not alone or weight.numel() == 0:
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
    return eps if _same(wanted, got) else None


def _same(wanted: Tensor, got: Tensor) -> bool:
    if got.dtype.itemsize == 2:  # but for sums in another order: norms that round once differ in a quarter
        return bool((wanted == got).float().mean() > 0.98)
    return torch.allclose(wanted, got, rtol=1e-5, atol=0)


GATED = ("gate_proj", "up_proj", "down_proj")


def _gates(module: nn.Module) -> bool:
    """Whether a module is down(silu(gate(x)) up(x)), whatever its linear layers are."""
    if set(module._modules) != {*GATED, "act_fn"}:
        return False
    other = copy.copy(module)
    other._modules = {name: Shift(by) for by, name in enumerate(GATED, 1)} | {"act_fn": module._modules["act_fn"]}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
        # Some clamp what is large.
        x = (x * torch.tensor([3.0, 30.0, 1e3, 1e4]).repeat(3)[:, None]).to(dtype)
        with torch.no_grad():
            try:
                wanted = type(other).forward(other, x)
            except Exception:  # it needs more than one tensor, or weights
                return False
            got = ops.silu_and_mul(x.roll(1, -1), x.roll(2, -1)).roll(3, -1)
        if not isinstance(wanted, Tensor) or wanted.dtype != dtype or not _same(wanted, got):
            return False
    return True


@cache
def _replace_rotary(file: str) -> bool:
    """Put `_rotary` before a file's `apply_rotary_pos_emb`, once, if there is a dtype in which they do the same."""
    name = "apply_rotary_pos_emb"
    plain = getattr(sys.modules.get(file), name, None)
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4, 5, 16), (2, 2, 5, 16), (2, 5, 16), (2, 5, 16)

    def same(dtype: torch.dtype, turned: int) -> bool:
        q, k, cos, sin = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
        cos, sin = cos[..., :turned], sin[..., :turned]
        try:
            wanted = plain(q, k, cos, sin)  # type: ignore[misc]
            return all(map(torch.equal, wanted, ops.rotary_embedding(q, k, cos, sin)))
        except Exception:  # it takes or gives something else
            return False

    with torch.no_grad():
        dtypes = {d for d in (torch.float32, torch.bfloat16, torch.float16) if same(d, 16)}
        parts = all(same(d, 8) for d in dtypes)
    if dtypes:
        setattr(sys.modules[file], name, _rotary(plain, dtypes, parts))  # type: ignore[arg-type]
    return bool(dtypes)


def _rotary(plain: Callable[..., Any], dtypes: Collection[torch.dtype], parts: bool) -> Callable[..., Any]:
    """`plain`, or for marked angles the op; `parts` says that `plain` can turn the first numbers of a head alone."""

    @wraps(plain)
    def rotary(*args: Any, **more: Any) -> Any:
        # Called with anything else, or with shapes that are broadcast, it is for `plain`.
        if len(args) == 4 and not more and getattr(args[2], MARK, False) and _turns(*args, dtypes, parts):
            return ops.rotary_embedding(*args)
        return plain(*args, **more)

    return rotary


def _turns(q: Any, k: Any, cos: Any, sin: Any, dtypes: Collection[torch.dtype], parts: bool) -> bool:
    """Whether the op takes these four."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and runs("rotary_embedding", q)):
        return False
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and q.dtype == k.dtype == cos.dtype == sin.dtype in dtypes):
        return False
    batch, _, tokens, d = q.shape
    rows, angles, turned = cos.shape
    fits = k.shape[0] == batch and k.shape[2:] == q.shape[2:] and sin.shape == cos.shape
    whole = turned == d or (parts and turned < d and turned % 2 == 0)
    return fits and angles == tokens and rows in (1, batch) and whole


def asks_transformers(module: nn.Module) -> bool:
    """Whether the file that defines the module takes its attention from transformers' table."""
    return hasattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS")


@cache
def replace_sdpa() -> None:
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
    if query.shape[2] != 1 or query.shape[0] != key.shape[0] or not runs("decode_attention", query):
        return False
    return mask is None or (mask.dtype == torch.bool and mask.shape == (key.shape[0], 1, 1, key.shape[2]))


def _unusual(more: dict[str, Any]) -> bool:
    """Whether the model asks for what only some implementations have: torch's takes it or refuses it."""
    return any(more.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
