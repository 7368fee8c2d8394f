"""Fused attention and norms inside transformers: the same logits, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, OTHERS, VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, StaticCache

import tinycomp as tc
from tinycomp import ops
from tinycomp.fused import ATTENTION

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "mixtral")
every_decoder = pytest.mark.parametrize("family", DECODERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the queries that reach the op."""
    found: list[Any] = []
    real = ops.decode_attention

    def counted(q: Tensor, *rest: Any) -> Tensor:
        found.append(tuple(q.shape))
        return real(q, *rest)

    monkeypatch.setattr(ops, "decode_attention", counted)
    return found


def build(family: str, implementation: str = ATTENTION) -> Any:
    model: Any = (FAMILIES | OTHERS)[family].build()
    model.set_attn_implementation(implementation)
    return model


def fused(family: str) -> Any:
    model = build(family, "sdpa")
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


@every_decoder
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_are_those_of_torch(family: str, padded: bool, calls: list[Any]) -> None:
    ids, mask = prompt()
    wanted = decoded(build(family, "sdpa"), ids, mask if padded else None)
    assert calls == []
    got = decoded(fused(family), ids, mask if padded else None)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    blocks = len(calls) // 4
    assert blocks >= 2, "every block of each of the four steps"
    assert len(calls) == 4 * blocks
    assert all(shape[2] == 1 for shape in calls)


def test_a_static_cache_and_other_dtypes(calls: list[Any]) -> None:
    ids, mask = prompt()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        ours, torchs = fused("llama").to(dtype), build("llama", "sdpa").to(dtype)
        for static in (False, True):
            caches = [StaticCache(config=ours.config, max_cache_len=16) if static else None for _ in range(2)]
            got, wanted = (decoded(m, ids, mask, c).float() for m, c in zip((ours, torchs), caches, strict=True))
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    assert calls


def test_a_saved_model_generates_the_same_with_it(tmp_path: Path, calls: list[Any]) -> None:
    model = build("llama", "sdpa")
    small, _ = tc.compress(model, tc.SVD(ratio=0.6), [FAMILIES["llama"].batch(i) for i in range(2)])
    small.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    ids, mask = prompt()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    both = []
    for implementation in ("sdpa", ATTENTION):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small", attn_implementation=implementation)
        both.append(loaded.generate(ids, **options))
        both.append(loaded.generate(ids, num_beams=2, **options))
    assert torch.equal(both[0], both[2])
    assert torch.equal(both[1], both[3])
    assert calls


def test_what_is_left_to_torch(calls: list[Any]) -> None:
    """Prompts, gradients, compilers and encoders: computed, and not by the op."""
    model = fused("llama")
    one = torch.tensor([[5]])
    ids, _ = prompt()
    with torch.no_grad():
        model(input_ids=ids)
        prefilled = model(input_ids=ids[:1], use_cache=True).past_key_values
    assert calls == []
    loss = model(input_ids=one, past_key_values=prefilled).logits.square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert calls == []
    assert nn.Module.train(model).training
    model.eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(input_ids=ids[:1, :4], past_key_values=cache)
        compiled(input_ids=one, past_key_values=cache, position_ids=torch.tensor([[4]]))
        assert calls == []
        build("bert")(**FAMILIES["bert"].batch())
        build("vit")(**FAMILIES["vit"].batch())
        assert calls == []
        model(input_ids=one)
    assert len(calls) == 3


def test_wrong_arguments_say_what_is_allowed() -> None:
    q, k = torch.ones(1, 4, 1, 8), torch.ones(1, 3, 5, 8)
    with pytest.raises(ValueError, match=r"q has 4 heads and k 3, allowed a multiple of those of k"):
        ops.decode_attention(q, k, k, None, 1.0)
    k = torch.ones(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"v has shape \(1, 2, 4, 8\), allowed \(1, 2, 5, any\)"):
        ops.decode_attention(q, k, k[:, :, :4], None, 1.0)
    with pytest.raises(TypeError, match=r"mask has dtype torch.float32, allowed bool"):
        ops.decode_attention(q, k, k, torch.ones(1, 1, 1, 5), 1.0)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4, 1, 5\), allowed \(1, 1, 1, 5\)"):
        ops.decode_attention(q, k, k, torch.ones(1, 4, 1, 5, dtype=torch.bool), 1.0)
    with pytest.raises(TypeError, match=r"k has dtype torch.float16, allowed torch.float32 as the input"):
        ops.decode_attention(q, k.half(), k, None, 1.0)
    with pytest.raises(ValueError, match=r"q has shape \(4, 8\), allowed \(any, any, any, any\)"):
        ops.decode_attention(q[0, :, 0], k, k, None, 1.0)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 200, 16)
    for bad in (float("nan"), float("inf")):
        poisoned = k.clone()
        poisoned[0, 0, 150, 3] = bad
        assert ops.decode_attention(q, poisoned, k, None, 1.0).isnan().all()
        assert ops.decode_attention(q, k, poisoned, None, 1.0)[..., 3].isfinite().logical_not().all()
        seen = torch.ones(1, 1, 1, 200, dtype=torch.bool)
        seen[..., 150] = False
        assert ops.decode_attention(q, poisoned, k, seen, 1.0).isfinite().all()


# Llama has two norms a block and one at the end, Qwen3 two more in its attention; T5 has an encoder and a decoder.
NORMS = {"llama": 7, "qwen3": 13, "t5": 17, "mixtral": 5, "gpt2": 0, "bert": 0, "vit": 0}


@pytest.mark.parametrize("family", NORMS)
def test_norms_are_found_by_what_they_compute(family: str) -> None:
    model: Any = (FAMILIES | OTHERS)[family].build()
    same, batch = copy.deepcopy(model), (FAMILIES | OTHERS)[family].batch()
    assert tc.fuse_(model) == NORMS[family]
    assert tc.fuse_(model) == 0, "they are already"
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], same(**batch)[0], rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == same.state_dict().keys()


def test_a_gate_is_left_to_the_norm_itself() -> None:
    class Gated(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x) if gate is None else super().forward(x * gate)

    norm, x = Gated(8, eps=1e-6), torch.randn(2, 8)
    assert tc.fuse_(norm) == 1
    with torch.no_grad():
        assert torch.equal(norm(x, gate=2 * x), Gated.forward(norm, x, 2 * x))
        torch.testing.assert_close(norm(x), Gated.forward(norm, x))
        assert torch.equal(norm(x=x), Gated.forward(norm, x))
        traced = torch.jit.trace(norm, x)
        assert "tinycomp" not in str(traced.inlined_graph)


def test_norms_that_compute_something_else_stay() -> None:
    gemma = transformers.GemmaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model: Any = transformers.GemmaForCausalLM(gemma)  # multiplies by 1 + weight
    assert tc.fuse_(model) == 0
    assert tc.fuse_(nn.LayerNorm(8, bias=False)) == 0
    assert tc.fuse_(nn.RMSNorm(8, eps=1e-6)) == 1
    assert tc.fuse_(nn.RMSNorm(8)) == 0, "its epsilon depends on the dtype"


def test_a_fused_model_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Copies are their own, files and pickles are as before, gradients flow, another attention stays."""
    model, batch = fused("llama"), FAMILIES["llama"].batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(**batch).logits
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(model(**batch).logits, wanted)
        assert other(**batch).logits.count_nonzero() == 0
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(**batch).logits, wanted)
        model.save_pretrained(tmp_path)
        stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(stock(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    assert stock.config._attn_implementation == "sdpa"
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    small, _ = tc.compress(model, tc.SVD(ratio=0.6), [batch])
    with torch.no_grad():
        assert small(**batch).logits.isfinite().all()
    eager = build("llama", "eager")
    tc.fuse_(eager)
    assert eager.config._attn_implementation == "eager"


def test_wrong_norms_say_what_is_allowed() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), allowed \(8\)"):
        ops.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(TypeError, match=r"weight has dtype torch.float16, allowed torch.float32 as the input"):
        ops.rms_norm(x, torch.ones(8).half(), 1e-6)
    with pytest.raises(ValueError, match="x has 0 dimensions, allowed at least 1"):
        ops.rms_norm(torch.tensor(1.0), torch.ones(1), 1e-6)
    assert ops.rms_norm(torch.full((1, 8), float("nan")), torch.ones(8), 1e-6).isnan().all()
