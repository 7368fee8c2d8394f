"""Fused attention and norms inside transformers: the same logits, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, VOCAB
from fused_models import build, calls, decoded, fused, prompt
from torch import nn
from torch.autograd import forward_ad
from transformers import AutoModelForCausalLM, StaticCache

import tinycomp as tc
from tinycomp import ops
from tinycomp.fused import Fused

__all__ = ["calls"]  # the fixture
# Of models that have no rotary embedding, or other feed-forward sublayers than Llama's.
ROTARY_AND_GATED = {"gpt2": (0, 0), "opt": (0, 0), "gpt_neox": (1, 0), "mixtral": (1, 0)}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox", "mixtral")
every_decoder = pytest.mark.parametrize("family", DECODERS)


@every_decoder
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_logits_are_those_of_torch(family: str, padded: bool, calls: Callable[[], Counter[str]]) -> None:
    fields = {"sliding_window": 6} if family == "mistral" else {}
    ids, mask = prompt()
    wanted = decoded(build(family, **fields), ids, mask if padded else None)
    model = build(family, **fields)
    found = tc.fuse_(model)
    blocks = model.config.num_hidden_layers
    assert found.attentions == blocks
    calls()  # norms are tried
    got = decoded(model, ids, mask if padded else None)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (found.rotary_embeddings, found.mlps) == ROTARY_AND_GATED.get(family, (1, blocks))
    assert found.layers == (0 if family in ROTARY_AND_GATED else blocks)
    apart, norms = blocks - found.layers, found.norms - found.layers * (4 if family == "qwen3" else 2)
    wanted_calls = Counter(
        decode_attention=4 * apart,
        rms_norm=found.norms + 4 * norms,
        silu_and_mul=found.mlps + 4 * (found.mlps - found.layers),
        rotary_embedding=(blocks + 4 * apart) * found.rotary_embeddings,
        sequence=4 * found.layers * (2 if family == "mistral" else 1),  # a cache of a window is asked in between
    )
    assert +calls() == +wanted_calls


def test_a_static_cache_and_other_dtypes(calls: Callable[[], Counter[str]]) -> None:
    ids, mask = prompt()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        plain, ours = (build("llama").to(dtype) for _ in range(2))
        tc.fuse_(ours)
        calls()
        for static in (False, True):
            caches = [StaticCache(config=ours.config, max_cache_len=16) if static else None for _ in range(2)]
            got, wanted = (decoded(m, ids, mask, c).float() for m, c in zip((ours, plain), caches, strict=True))
            torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
            assert calls() == Counter(rms_norm=11, rotary_embedding=3, silu_and_mul=3, sequence=24 if static else 12)


def test_cross_attention_and_a_position_bias(calls: Callable[[], Counter[str]]) -> None:
    """Marian's decoder attends to its encoder; T5's bias is for torch, its norms are not."""
    for family, attentions in (("marian", 6), ("t5", 0)):
        model, plain = fused(family), build(family)
        ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        tokens, cache, other = torch.full((2, 1), 3), None, None
        with torch.no_grad():
            for _ in range(3):
                out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, past_key_values=cache)
                calls()
                again = plain(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, past_key_values=other)
                cache, other = out.past_key_values, again.past_key_values
                torch.testing.assert_close(out.logits, again.logits, rtol=1e-4, atol=1e-5)
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens, past_key_values=cache)
        assert calls()["decode_attention"] == attentions


def test_a_saved_model_generates_the_same_with_it(tmp_path: Path, calls: Callable[[], Counter[str]]) -> None:
    batches = [FAMILIES["llama"].batch(i) for i in range(2)]
    small, _ = tc.compress(build("llama"), tc.SVD(ratio=0.6), batches)
    small.save_pretrained(tmp_path / "small")  # type: ignore[operator]
    ids, mask = prompt()
    both = []
    for fuses in (False, True):
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        if fuses:
            assert tc.fuse_(loaded) == Fused(attentions=3, norms=7, rotary_embeddings=1, mlps=3, layers=3)
        calls()
        for beams in (1, 2):
            options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
            both.append(loaded.generate(ids, attention_mask=mask, **options))
            assert bool(calls()) == fuses
    assert torch.equal(both[0], both[2])
    assert torch.equal(both[1], both[3])


def test_models_that_ask_for_the_name_of_their_attention() -> None:
    """DeepSeek-V3.2 puts its choice of tokens into the mask only where attention is called "sdpa" or "eager"."""
    kind = getattr(transformers, "DeepseekV32ForCausalLM", None)
    if kind is None:
        pytest.skip("this transformers has no DeepSeek-V3.2")
    torch.manual_seed(0)
    config = transformers.DeepseekV32Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        index_n_heads=2, index_head_dim=16, index_topk=4, first_k_dense_replace=1,
    )  # fmt: skip
    model = kind(config).eval()
    plain = copy.deepcopy(model)
    tc.fuse_(model)
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoded(model, ids, None), decoded(plain, ids, None), rtol=1e-3, atol=1e-4)


def test_what_is_left_to_torch(calls: Callable[[], Counter[str]]) -> None:
    """Gradients, compilers, dropout, encoders, other attentions, and everything where there is no kernel."""
    model, one = fused("llama"), torch.tensor([[5]])
    ids, _ = prompt()
    calls()
    with torch.no_grad():
        cache = model(input_ids=ids[:1], use_cache=True).past_key_values
    others = Counter(rms_norm=7, rotary_embedding=3, silu_and_mul=3)
    assert calls() == others, "the prompt"
    loss = model(input_ids=one, past_key_values=cache).logits.square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        static = StaticCache(config=model.config, max_cache_len=8)
        model(input_ids=ids[:1, :4], past_key_values=static)
        calls()
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        compiled(input_ids=one, past_key_values=static, position_ids=torch.tensor([[4]]))
        with ops.use_backend("torch"):
            model(input_ids=one)
        assert not calls()
        dropping, eager = fused("llama", attention_dropout=0.5).train(), fused("llama")
        eager.set_attn_implementation("eager")
        calls()
        dropping(input_ids=one)
        eager(input_ids=one)
        fused("bert")(**FAMILIES["bert"].batch())
        fused("vit")(**FAMILIES["vit"].batch())
        build("llama")(input_ids=one)
        trained = Counter(rms_norm=7, rotary_embedding=3)  # sublayers that train may drop some of their outputs
        assert calls() == others + trained, "the two Llamas whose attention is another"
        with forward_ad.dual_level():
            norm = model.model.norm
            x = torch.randn(2, 32)
            dual = norm(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(dual).tangent is not None
    assert not calls()


def test_a_fused_model_is_a_model_like_any_other(tmp_path: Path) -> None:
    """Copies are their own, files are as before, it can be pickled, trained and compressed."""
    model, batch = fused("llama"), FAMILIES["llama"].batch()
    other, shallow = copy.deepcopy(model), copy.copy(model.model.norm)
    shallow._parameters = {"weight": nn.Parameter(torch.zeros(32))}
    with torch.no_grad():
        wanted = model(**batch).logits
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(model(**batch).logits, wanted)
        assert other(**batch).logits.count_nonzero() == 0
        assert shallow(torch.ones(1, 32)).count_nonzero() == 0
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(**batch).logits, wanted)
        model.save_pretrained(tmp_path)
        stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(stock(**batch).logits, wanted, rtol=1e-4, atol=1e-5)
    assert stock.config._attn_implementation == model.config._attn_implementation == "sdpa"
    model(**batch).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    small, _ = tc.compress(model, tc.SVD(ratio=0.6), [batch])
    with torch.no_grad():
        assert small(**batch).logits.isfinite().all()
