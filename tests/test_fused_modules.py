"""Modules that `tc.fuse_` finds by what they compute: norms, rotary embeddings, gated feed-forward sublayers."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, OTHERS, VOCAB
from fused_models import build, calls, fused
from torch import Tensor, nn
from torch.nn.utils import prune

import tinycomp as tc

__all__ = ["calls"]  # the fixture


# Llama has two norms a block and one at the end, Qwen3 two more in its attention; T5 has an encoder and a decoder.
NORMS = {"llama": 7, "qwen3": 13, "t5": 17, "mixtral": 5, "gpt2": 0, "bert": 0, "vit": 0}


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_found_by_what_they_compute(family: str, calls: Callable[[], Counter[str]]) -> None:
    model, batch = build(family), (FAMILIES | OTHERS)[family].batch()
    same = copy.deepcopy(model)
    found = tc.fuse_(model)
    assert found.norms == NORMS[family]
    assert tc.fuse_(model) == found, "they are already"
    calls()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], same(**batch)[0], rtol=1e-4, atol=1e-5)
    assert calls()["rms_norm"] == NORMS[family]
    assert model.state_dict().keys() == same.state_dict().keys()


class Weighted(nn.Module):
    """A norm of a weight alone."""

    def __init__(self, dtype: torch.dtype = torch.float32, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(16, dtype=dtype)), eps


class Outside(Weighted):
    """Epsilon beside the root."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Length(Weighted):
    """A length of at least epsilon."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, eps=self.eps, dim=-1) * 4 * self.weight


class Centred(Weighted):
    """LayerNorm, its weight zero as some begin."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (16,), self.weight, None, self.eps)


class Pair(Weighted):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Two(Weighted):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


def test_norms_that_compute_something_else_stay() -> None:
    gemma = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    assert tc.fuse_(transformers.GemmaForCausalLM(gemma)).norms == 0, "it multiplies by 1 + weight"
    bf16 = torch.bfloat16
    for norm in (Outside(eps=1e-7), Outside(bf16), Length(bf16, 1e-5), Centred(), Pair(), Two()):
        assert tc.fuse_(norm).norms == 0, type(norm)
    assert tc.fuse_(nn.RMSNorm(8, eps=1e-6)).norms == 1
    assert tc.fuse_(nn.RMSNorm(8, eps=1e-6, dtype=bf16)).norms == 0, "it rounds once"
    assert tc.fuse_(nn.RMSNorm(8)).norms == 0, "its epsilon depends on the dtype"
    assert tc.fuse_(nn.RMSNorm(8, eps=1e-6, device="meta")).norms == 0


def test_a_gate_is_left_to_the_norm_itself() -> None:
    class Gated(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x) if gate is None else super().forward(x * gate)

    norm, x = Gated(8, eps=1e-6), torch.randn(2, 8)
    assert tc.fuse_(norm).norms == 1
    with torch.no_grad():
        assert torch.equal(norm(x, gate=2 * x), Gated.forward(norm, x, 2 * x))
        torch.testing.assert_close(norm(x), Gated.forward(norm, x))
        assert torch.equal(norm(x=x), Gated.forward(norm, x))


def test_a_norm_that_changes_later_is_followed(calls: Callable[[], Counter[str]]) -> None:
    """Another dtype than it was tried in, another weight, and a weight that is no parameter any more."""
    norm, x = nn.RMSNorm(8, eps=1e-6), torch.randn(3, 8)
    tc.fuse_(norm)
    calls()
    with torch.no_grad():
        norm.weight.mul_(2)
        torch.testing.assert_close(norm(x), nn.RMSNorm.forward(norm, x))
        assert calls()
        half = copy.deepcopy(norm).bfloat16()
        assert torch.equal(half(x.bfloat16()), nn.RMSNorm.forward(half, x.bfloat16()))
        prune.random_unstructured(norm, "weight", 0.5)
        assert torch.equal(norm(x), nn.RMSNorm.forward(norm, x))
    assert not calls()


# Rotary embeddings and gated feed-forward sublayers: modules, and calls in one forward pass.
MODULES = {"llama": (1, 3, 3, 3), "qwen3": (1, 3, 3, 3), "gpt_neox": (1, 0, 2, 0), "t5": (0, 0, 0, 0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MODULES)
def test_angles_and_gates(family: str, dtype: torch.dtype, calls: Callable[[], Counter[str]]) -> None:
    model, plain = (build(family).to(dtype) for _ in range(2))
    found, batch = tc.fuse_(model), (FAMILIES | OTHERS)[family].batch()
    assert (found.rotary_embeddings, found.mlps) == MODULES[family][:2]
    calls()
    with torch.no_grad():
        plain(**batch)
        assert not calls(), "a model that is not fused"
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(model(**batch)[0], plain(**batch)[0], rtol=tolerance, atol=tolerance)
        found_calls = calls()
    assert (found_calls["rotary_embedding"], found_calls["silu_and_mul"]) == MODULES[family][2:]


def test_the_bits_of_rotary_embeddings_are_transformers_own(calls: Callable[[], Counter[str]]) -> None:
    """Also where only the first half of each head is turned, and in every layout and dtype it is taken in."""
    for family, turned in (("llama", 16), ("gpt_neox", 8)):
        model = fused(family)
        kind = next(m for m in model.modules() if "RotaryEmbedding" in type(m).__name__)
        turn: Any = vars(sys.modules[type(kind).__bases__[1].__module__])["apply_rotary_pos_emb"]
        calls()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            q, k = (torch.randn(2, 5, h, 16).to(dtype).transpose(1, 2) for h in (4, 2))
            cos, sin = (torch.randn(1, 5, turned).to(dtype) for _ in range(2))
            wanted = turn.__wrapped__(q, k, cos, sin)
            cos._tinycomp_fused = True  # type: ignore[attr-defined]
            with torch.no_grad():
                got = turn(q, k, cos, sin)
            assert all(map(torch.equal, got, wanted))
            assert calls() == Counter(rotary_embedding=int(dtype != torch.float64))
            with torch.no_grad():
                again = turn(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
            assert all(torch.equal(a.transpose(1, 2), w) for a, w in zip(again, wanted, strict=True))
        with pytest.raises(RuntimeError, match="must match the size"), torch.no_grad():
            turn(q, k, cos, sin.repeat(1, 2, 1))
        calls()
        q, k = (torch.randn(2, h, 5, 16) for h in (4, 2))
        cos, sin = (torch.randn(1, 5, turned) for _ in range(2))
        cos._tinycomp_fused = True  # type: ignore[attr-defined]
        with torch.no_grad():
            turn(q, k, cos=cos, sin=sin)
            turn(q, k[:1], cos, sin)
            if family == "llama":  # what can be broadcast is
                turn(q, k[:, :, :1], cos, sin)
            assert not calls()
            turn(q, k, cos, sin)
            assert calls()


class Gated(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=5) * self.up_proj(x))


class ClampedHigh(Gated):
    """As Step-3.7's."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=100) * self.up_proj(x).clamp(-100, 100))


class Dropping(Gated):
    """As Seed-OSS's."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Wide(Gated):
    """Rounds once."""

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj((self.act_fn(self.gate_proj(x).float()) * up.float()).to(up.dtype))


class Routed(Gated):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x) * weights


def test_sublayers_that_compute_something_else_stay(calls: Callable[[], Counter[str]]) -> None:
    for other in (Gated(nn.GELU()), Clamped(), ClampedHigh(), Wide(), Routed()):
        assert tc.fuse_(other).mlps == 0, type(other)
    sublayer, x = Gated().eval(), torch.randn(3, 8)
    assert tc.fuse_(sublayer).mlps == 1
    calls()
    with torch.no_grad():
        torch.testing.assert_close(sublayer(x), Gated.forward(sublayer, x))
        assert calls() == Counter(silu_and_mul=1)
        seen: list[Any] = []
        hook = sublayer.act_fn.register_forward_hook(lambda *args: seen.append(args))
        assert torch.equal(sublayer(x), Gated.forward(sublayer, x))
        assert len(seen) == 2, "whoever listens to the activation hears it"
        hook.remove()
        with_all = nn.modules.module.register_module_forward_hook(lambda *args: seen.append(args))
        sublayer(x)
        with_all.remove()
        assert any(args[0] is sublayer.act_fn for args in seen[2:])
        sublayer.act_fn.forward = torch.zeros_like
        assert torch.equal(sublayer(x), Gated.forward(sublayer, x))
        del sublayer.act_fn.forward
        dropping = Dropping().eval()
        assert tc.fuse_(dropping).mlps == 1
        calls()
        assert (dropping.train()(x) == 0).any(), "dropout stays"
        sublayer.up_proj = nn.Linear(8, 1)
        assert torch.equal(sublayer(x), Gated.forward(sublayer, x)), "one number for all"
        sublayer.up_proj = nn.Linear(8, 8)
        sublayer.act_fn = nn.GELU()
        assert torch.equal(sublayer(x), Gated.forward(sublayer, x))
    assert not calls()
    again = copy.deepcopy(sublayer)
    assert type(again) is type(sublayer)
