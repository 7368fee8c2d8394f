"""A decoder layer in one call for one token a sequence, or two where its cache has to be asked in between.

Between two calls from Python a model that decodes waits for memory: the weights of a token have driven modules, tensors
and code out of the caches. Of the 14.5 ms that a token of SmolLM2 in int8 took, 9 were spent so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.fused._base import MARK, FusedModule, Shift, is_heard, runs
from tinycomp.fused._cache import keep, one_more
from tinycomp.fused._modules import GATED, FusedMLP, FusedNorm

_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_HEAD_NORMS = ("q_norm", "k_norm")  # of some models, before positions
# Arguments of a layer; what those say that are not used is in the cache and the angles.
_USED = ("attention_mask", "past_key_values", "position_embeddings")
_KNOWN = {*_USED, "position_ids", "use_cache", "cache_position"}


class FusedLayer(FusedModule):
    counted_as = "layers"

    def forward(self, *args: Any, **more: Any) -> Any:
        others = [more[name] for name in more.keys() - _KNOWN]
        if len(args) == 1 and not self.training and all(other is None or other is False for other in others):
            mask, cache, angles = (more.get(name) for name in _USED)
            if _one_token(args[0], mask, angles) and (modules := _modules(self, args[0].dtype, angles)) is not None:
                return _computed(modules, args[0], mask, cache, angles)
        return super().forward(*args, **more)


def _one_token(x: Any, mask: Any, angles: Any) -> bool:
    """Whether the ops compute what the layer would for these inputs."""
    # A program has no implementation for other kinds of tensors, and casts nothing.
    if type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
        return False
    if x.dim() != 3 or x.shape[1] != 1 or not runs("decode_attention", x):
        return False
    if not (isinstance(angles, tuple) and len(angles) == 2 and getattr(angles[0], MARK, False)):
        return False
    cos, sin = angles
    if not (cos.dtype == sin.dtype == x.dtype and cos.dim() == 3 and cos.shape[1] == 1 and cos.shape == sin.shape):
        return False
    if cos.shape[0] not in (1, x.shape[0]):
        return False
    if mask is None:
        return True
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (x.shape[0], 1, 1, mask.shape[-1])


class _Modules(NamedTuple):
    """What a layer's modules give to programs: tensors, and what their text depends on."""

    attention: Any
    before: list[Tensor | None]  # weights of the norm and of those of heads, tensors of q, k, v
    before_text: tuple[Any, ...]
    behind: list[Tensor | None]  # weight of the norm, tensors of o, gate, up, down
    behind_text: tuple[Any, ...]


def _modules(layer: Any, dtype: torch.dtype, angles: Any) -> _Modules | None:
    """None while something is attached to one of the modules, or has taken the place of one.

    Each look at an object is a look at memory that no cache holds any more: there are no more than needed.
    """
    children = layer._modules
    before, attention, after, mlp = map(children.__getitem__, _CHILDREN)
    same = type(attention) is getattr(layer, MARK) and isinstance(mlp, FusedMLP)
    # The model's configuration, where that asks for torch's attention.
    if not same or attention.config is not getattr(angles[0], MARK):
        return None
    projections, gated = attention._modules, mlp._modules
    act = gated["act_fn"]
    linears = [*map(projections.__getitem__, _PROJECTIONS), *map(gated.__getitem__, GATED)]
    norms = [projections[name] for name in _HEAD_NORMS if name in projections]
    if type(act) is not getattr(mlp, MARK) or is_heard(before, attention, after, mlp, act, *linears, *norms):
        return None
    first, second = _held([before, *norms], linears[:3], dtype), _held([after], linears[3:], dtype)
    if first is None or second is None:
        return None
    return _Modules(attention, *first, *second)


def _held(norms: list[Any], linears: list[Any], dtype: torch.dtype) -> tuple[list[Any], tuple[Any, ...]] | None:
    """The weights of norms and the tensors of linear layers, and what a program says of each."""
    found: list[Any] = []
    text: list[Any] = []
    for norm in norms:
        if not isinstance(norm, FusedNorm):
            return None
        weight, (eps, tried) = norm._parameters.get("weight"), getattr(norm, MARK)
        if weight is None or not weight.dtype == tried == dtype:
            return None
        found.append(weight)
        text.append(eps)
    for linear in linears:
        call = _call(linear)
        if call is None:
            return None
        op, tensors, numbers = call
        found += tensors
        text.append((op, len(tensors), numbers))
    return found, tuple(text)


def _call(linear: Any) -> tuple[str, Sequence[Any], tuple[int | str, ...]] | None:
    """Op, tensors and numbers that give a layer's output; None for layers that take more than one op."""
    if type(linear) is nn.Linear:
        held = linear._parameters
        if held.keys() != {"weight", "bias"}:  # somebody has made something else of one
            return None
        return "sliced_linear", (held["weight"], held["bias"]), (linear.in_features, linear.out_features)
    as_call = getattr(linear, "as_call", None)
    return None if as_call is None else as_call()


def _computed(modules: _Modules, x: Tensor, mask: Tensor | None, cache: Any, angles: Any) -> Tensor:
    attention, before, before_text, behind, behind_text = modules
    head_dim, scale, layer_idx = attention.head_dim, attention.scaling, attention.layer_idx
    both = None if cache is None else one_more(cache, layer_idx)
    if both is not None:
        text = _whole(head_dim, scale, before_text, behind_text)
        (y,) = ops.sequence([x, *angles, mask, *both, *before, *behind], text)
        keep(cache, layer_idx, *both)
        return y
    q, k, v = ops.sequence([x, *angles, *before], _before_cache(head_dim, before_text))
    if cache is not None:
        k, v = cache.update(k, v, layer_idx)
    (y,) = ops.sequence([x, q, k, v, mask, *behind], _behind_cache(scale, behind_text))
    return y


class _Program:
    """Lines for `ops.sequence`, of modules whose tensors follow `inputs` others: norms, then linear layers."""

    def __init__(self, inputs: int, *texts: Any) -> None:
        self.next = inputs  # number of the next module's first tensor
        self.results = inputs + sum(1 if isinstance(part, float) else part[1] for text in texts for part in text)
        self.lines: list[str] = []

    def line(self, op: str, *args: str | float) -> str:
        """The result, or the first of several, which `more` counts."""
        self.lines.append(" ".join([op, *map(str, args)]))
        return self.more()

    def more(self) -> str:
        self.results += 1
        return f"%{self.results - 1}"

    def held(self, count: int) -> list[str]:
        self.next += count
        return [f"%{i}" for i in range(self.next - count, self.next)]

    def linear(self, x: str, text: tuple[str, int, tuple[int | str, ...]]) -> str:
        op, count, numbers = text
        return self.line(op, x, *self.held(count), *numbers)

    def turned(self, x: str, cos: str, sin: str, head_dim: int, text: Any) -> tuple[str, str, str]:
        """Queries and keys with their positions, and values."""
        *epsilons, q, k, v = text
        weight, *more = self.held(len(epsilons))
        x = self.line("rms_norm", x, weight, epsilons[0])
        heads = [self.line("heads", self.linear(x, linear), head_dim) for linear in (q, k, v)]
        for i, (of_heads, eps) in enumerate(zip(more, epsilons[1:], strict=True)):
            heads[i] = self.line("rms_norm", heads[i], of_heads, eps)
        return self.line("rotary_embedding", *heads[:2], cos, sin), self.more(), heads[2]

    def output(self, x: str, attention: tuple[str, str, str, str], scale: float, text: Any) -> str:
        """The layer's output from its input, queries, keys, values and mask."""
        eps, o, gate, up, down = text
        weight = self.held(1)
        heads = self.line("flat", self.line("decode_attention", *attention, scale))
        h = self.line("add", x, self.linear(heads, o))
        x = self.line("rms_norm", h, *weight, eps)
        gated = self.line("silu_and_mul", self.linear(x, gate), self.linear(x, up))
        return self.line("add", h, self.linear(gated, down))

    def returning(self, *values: str) -> str:
        return "\n".join([*self.lines, " ".join(["return", *values])])


@lru_cache(4096)
def _before_cache(head_dim: int, before: Any) -> str:
    program = _Program(3, before)
    return program.returning(*program.turned("%0", "%1", "%2", head_dim, before))


@lru_cache(4096)
def _behind_cache(scale: float, behind: Any) -> str:
    program = _Program(5, behind)
    return program.returning(program.output("%0", ("%1", "%2", "%3", "%4"), scale, behind))


@lru_cache(4096)
def _whole(head_dim: int, scale: float, before: Any, behind: Any) -> str:
    program = _Program(6, before, behind)
    q, k, v = program.turned("%0", "%1", "%2", head_dim, before)
    program.lines += [f"place {k} %4", f"place {v} %5"]
    return program.returning(program.output("%0", (q, "%4", "%5", "%3"), scale, behind))


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether a layer is x + attention(norm(x)), and that plus mlp(norm) of itself, as this file computes it.

    Its modules are fused already. The layer is tried with others in place of its children, and its attention with
    others in place of its linear layers.
    """
    modules, attention = layer._modules, layer._modules.get("self_attn")
    if set(modules) != set(_CHILDREN) or attention is None or "forward" in vars(layer):
        return False
    more = set(attention._modules) - set(_PROJECTIONS)
    norms = [modules[_CHILDREN[0]], modules[_CHILDREN[2]], *[attention._modules[name] for name in more]]
    known = more in (set(), set(_HEAD_NORMS)) and set(_PROJECTIONS) <= set(attention._modules)
    fused = all(isinstance(norm, FusedNorm) for norm in norms) and isinstance(modules["mlp"], FusedMLP)
    if not (known and fused and MARK in vars(attention)):
        return False
    with torch.no_grad():
        try:
            return _adds_up(layer) and _attends(attention)
        except Exception:  # it takes or gives something else
            return False


class _Attention(Shift):
    def forward(self, hidden_states: Tensor, **more: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(hidden_states), None


def _adds_up(layer: nn.Module) -> bool:
    other = copy.copy(layer)
    other._modules = dict(zip(_CHILDREN, (Shift(1), _Attention(2), Shift(4), Shift(8)), strict=True))
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    h = x + x.roll(3, -1)
    nothing = dict.fromkeys(_KNOWN)
    return torch.equal(type(other).forward(other, x, **nothing), h + h.roll(12, -1))


class _Columns(nn.Module):
    """Stands for a linear layer with so many outputs."""

    def __init__(self, outputs: int, step: int) -> None:
        super().__init__()
        self.outputs, self.step = outputs, step

    def forward(self, x: Tensor) -> Tensor:
        return x[..., torch.arange(self.outputs) * self.step % x.shape[-1]]


class _Cache:
    """Tokens that were there before."""

    def __init__(self, keys: Tensor, values: Tensor, layer_idx: int) -> None:
        self.keys, self.values, self.layer_idx = keys, values, layer_idx

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        if layer_idx != self.layer_idx:
            raise ValueError("_Cache.update: the layer has another number; leave it as it is")
        return torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)


def _attends(attention: Any) -> bool:
    generator, d = torch.Generator().manual_seed(0), attention.head_dim
    random: Callable[..., Tensor] = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    outputs = [attention._modules[name].out_features for name in _PROJECTIONS]
    other = copy.copy(attention).eval()
    columns = {name: _Columns(n, s) for name, n, s in zip(_PROJECTIONS, outputs, (1, 3, 5, 1), strict=True)}
    other._modules = attention._modules | columns
    x, heads = random(2, 1, attention.q_proj.in_features), outputs[1] // d
    angles = random(2, 1, d), random(2, 1, d)
    cache = _Cache(random(2, heads, 5, d), random(2, heads, 5, d), attention.layer_idx)
    wanted, _ = type(other).forward(other, x, position_embeddings=angles, attention_mask=None, past_key_values=cache)
    q, k, v = (other._modules[name](x).view(2, -1, 1, d) for name in _PROJECTIONS[:3])
    if "q_norm" in other._modules:
        q, k = other.q_norm(q), other.k_norm(k)
    q, k = ops.rotary_embedding(q, k, *angles)
    k, v = cache.update(k, v, attention.layer_idx)
    heads_together = ops.decode_attention(q, k, v, None, attention.scaling).flatten(2)
    return torch.allclose(wanted, other._modules["o_proj"](heads_together), rtol=1e-4, atol=1e-5)
