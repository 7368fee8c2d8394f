"""Whole layers for one token in one call: the same bits as their modules one by one, and nobody is passed over."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from fused_models import build, calls, decoded, fused, prompt
from torch import Tensor, nn
from transformers import DynamicCache

import tinycomp as tc
from tinycomp import ops
from tinycomp.layers import DenseLinear, ElasticLinear

__all__ = ["calls"]  # the fixture
METHODS = {
    "lowrank_linear": tc.SVD(ratio=0.6),
    "cur_linear": tc.CUR(ratio=0.6, form="cur", selection="sketch-qr", trainable=True),
    "swsc_linear": tc.SWSC(ratio=0.6),
    "masked_linear": tc.Wanda(ratio=0.5, structured=False, guard_speed=False),
    "quant_linear": tc.Rounding(bits=8),
    "quant_lowrank_linear": tc.SVD(ratio=0.6, bits=4),
    "quant_swsc_linear": tc.SWSC(ratio=0.6, factor_bits=8, activation_bits=8),
}


def replaced(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for block in model.model.layers:  # type: ignore[union-attr, attr-defined]
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, change(linear))
    return model


def elastic(linear: nn.Linear, scatter: bool = False) -> ElasticLinear:
    n, m = linear.weight.shape
    layer = ElasticLinear(m, n, linear.bias is not None, scatter=scatter)
    layer.full.weight, layer.bias = linear.weight, linear.bias
    return layer


def apart(model: nn.Module) -> nn.Module:
    """A copy whose layers are computed module by module, for somebody listens to each."""
    other = copy.deepcopy(model)
    for block in other.model.layers:  # type: ignore[union-attr, attr-defined]
        block.post_attention_layernorm.register_forward_hook(lambda *args: None)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*METHODS, "sliced_linear", "elastic", "scattered"])
def test_every_compressed_layer_gives_the_bits_of_its_modules(
    kind: str, dtype: torch.dtype, calls: Callable[[], Counter[str]]
) -> None:
    model = build("qwen2")
    if kind in METHODS:
        model, _ = tc.compress(model, METHODS[kind], [FAMILIES["qwen2"].batch(i) for i in range(2)])
        replaced(model, DenseLinear.from_linear)  # what the method left
    else:
        new = {"sliced_linear": DenseLinear.from_linear, "elastic": elastic, "scattered": lambda x: elastic(x, True)}
        replaced(model, new[kind])  # type: ignore[arg-type]
    model = model.to(dtype)
    assert tc.fuse_(model).layers == 3
    ids, mask = prompt()
    for padding in (None, mask):
        wanted = decoded(apart(model), ids, padding)
        assert calls()["sequence"] == 0
        got = decoded(model, ids, padding)
        assert calls()["sequence"] == 12
        assert torch.equal(got, wanted)


def test_linear_layers_of_torch_take_part(calls: Callable[[], Counter[str]]) -> None:
    for family in ("llama", "qwen2", "qwen3"):
        model = build(family).bfloat16()
        ids, mask = prompt()
        wanted = decoded(model, ids, mask).float()
        tc.fuse_(model)
        calls()
        torch.testing.assert_close(decoded(model, ids, mask).float(), wanted, rtol=0.05, atol=0.05)
        assert calls()["sequence"] == 12


@torch.no_grad()
def test_who_listens_is_heard(calls: Callable[[], Counter[str]]) -> None:
    """Hooks on any module inside, replaced forwards, other classes in their place, and hooks on all modules."""
    ids, _ = prompt()
    plain = build("qwen3")
    model = fused("qwen3")
    wanted = decoded(model, ids, None)
    block = model.model.layers[1]
    heard: list[str] = []
    inside = [name for name, _ in block.named_modules() if name]
    assert len(inside) == 14
    for name in inside:
        handle = block.get_submodule(name).register_forward_hook(lambda *args, n=name: heard.append(n))
        before = block.get_submodule(name).register_forward_pre_hook(lambda *args, n=name: heard.append(n))
        torch.testing.assert_close(decoded(model, ids, None), wanted)
        handle.remove(), before.remove()
    assert all(count == 10 for count in Counter(heard).values())
    assert len(Counter(heard)) == 14
    calls()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    decoded(model, ids, None)
    handle.remove()
    assert calls()["sequence"] == 0

    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    for one in (model, plain):
        q = one.model.layers[0].self_attn.q_proj
        q.__class__ = Half
        up = one.model.layers[2].mlp.up_proj
        up.forward = lambda x, w=up.weight: x @ w.T * 0.5
        one.model.layers[1].mlp.act_fn = nn.GELU()
    torch.testing.assert_close(decoded(model, ids, None), decoded(plain, ids, None), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(decoded(model, ids, None), wanted)


@torch.no_grad()
def test_what_is_left_to_the_modules(calls: Callable[[], Counter[str]]) -> None:
    """Training, other attention, outputs that are asked for, another dtype than norms were tried in, other angles."""
    ids, _ = prompt()
    model = fused("llama")
    out = model(input_ids=ids, use_cache=True)
    step: dict[str, Any] = {"input_ids": ids[:, :1], "output_attentions": False}

    def asked(model: nn.Module, **more: Any) -> int:
        calls()
        cache = copy.deepcopy(out.past_key_values)
        model(**step | more, past_key_values=cache)
        return calls()["sequence"]

    assert asked(model) == 3
    assert asked(pickle.loads(pickle.dumps(model))) == 3
    assert asked(model, output_hidden_states=True) == 0
    assert model.model.layers[0].self_attn._forward_hooks, "they stay"
    assert asked(model) == 3
    assert asked(model.train()) == 0
    model.eval().set_attn_implementation("eager")
    assert asked(model, output_attentions=True) == 0
    model.set_attn_implementation("sdpa")
    assert asked(model) == 3
    assert asked(copy.deepcopy(model)) == 3
    assert asked(model, something=torch.arange(3)) == 0
    assert asked(model, something=None, other=False) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert asked(model) == 0
    with ops.use_backend("torch"):
        assert asked(model) == 0
    with torch.enable_grad():
        assert asked(model) == 0
    for name in ("input_layernorm", "mlp.up_proj"):
        other = copy.deepcopy(model)
        part = other.model.layers[0].get_submodule(name)
        weight = part._parameters.pop("weight").detach()
        part.weight = weight
        assert asked(other) == 2, "it is no parameter any more"
    out.past_key_values = None
    assert asked(model.bfloat16()) == 0, "norms were tried in float32"
    tc.fuse_(model)
    assert asked(fused("llama").bfloat16()) == 0


def test_layers_that_compute_something_else_stay() -> None:
    def changed(change: Callable[[Any], object]) -> int:
        model = build("llama")
        change(model.model.layers[1])
        return tc.fuse_(model).layers

    class Scaled(type(build("llama").model.layers[0])):  # type: ignore[misc]
        def forward(self, *args: Any, **more: Any) -> Any:
            return super().forward(*args, **more) * 2

    class Other(type(build("llama").model.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **more: Any) -> Any:
            out, weights = super().forward(*args, **more)
            return out + 1, weights

    def of(kind: type[nn.Module]) -> Callable[[nn.Module], None]:
        return lambda module: setattr(module, "__class__", kind)

    assert changed(lambda block: None) == 3
    assert changed(of(Scaled)) == 2
    assert changed(lambda block: of(Other)(block.self_attn)) == 2
    assert changed(lambda block: block.add_module("more", nn.Identity())) == 2
    assert changed(lambda block: setattr(block.self_attn, "scaling", 1.0)) == 3, "it is read in every call"
    assert changed(lambda block: setattr(block, "forward", block.forward)) == 2
    assert changed(lambda block: setattr(block, "input_layernorm", nn.LayerNorm(32))) == 2
    gemma_like = build("gpt_neox")
    assert tc.fuse_(gemma_like).layers == 0


@torch.no_grad()
def test_the_cache_has_room_and_stays_what_it_was() -> None:
    """Tokens are placed behind those that are there; what others hold of a cache does not change."""
    model, plain = fused("llama"), build("llama")
    ids, _ = prompt()
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    for one, cache in zip((model, plain), caches, strict=True):
        one(input_ids=ids, past_key_values=cache)
    held: list[tuple[Tensor, Tensor]] = []

    def step(i: int) -> None:
        token = torch.full((3, 1), 3 + i % 30)
        logits = [one(input_ids=token, past_key_values=c).logits for one, c in zip((model, plain), caches, strict=True)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)

    for i in range(150):  # room for 64 is made twice
        step(i)
        if i % 50 == 20:
            keys = caches[0].layers[1].keys
            assert keys is not None
            held.append((keys, keys.clone()))
    assert caches[0].get_seq_length() == 157
    storage = caches[0].layers[0].keys.untyped_storage().data_ptr()  # type: ignore[union-attr]
    branch = copy.deepcopy(caches)
    step(1)
    assert caches[0].layers[0].keys.untyped_storage().data_ptr() == storage, "nothing is copied"  # type: ignore[union-attr]
    for cache in caches:
        cache.crop(-5)
    for i in range(8):
        step(i + 7)
    for cache in caches:
        cache.reorder_cache(torch.tensor([2, 0, 0]))
    step(3)
    step(4)
    caches = branch
    step(11)
    for keys, was in held:
        assert torch.equal(keys, was)
    first, second = copy.copy(caches[0].layers[0]), caches[0].layers[0]
    assert first.keys is second.keys


def test_caches_of_a_prompt_with_gradients_and_of_inference_mode() -> None:
    model, plain = fused("llama"), build("llama")
    ids, token = prompt()[0], torch.full((3, 1), 5)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode():
            cache, other = (one(input_ids=ids, use_cache=True).past_key_values for one in (model, plain))
        with torch.no_grad():
            for _ in range(2):
                got, wanted = (
                    m(input_ids=token, past_key_values=c).logits for m, c in ((model, cache), (plain, other))
                )
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_programs_that_cannot_be_read_or_run() -> None:
    x, w, keys = torch.randn(2, 1, 8), torch.ones(8), torch.zeros(2, 2, 3, 4)
    y, heads = ops.sequence([x, w, None], "rms_norm %0 %1 1e-05\nadd %0 %3\nheads %4 4\nreturn %4 %5")
    assert torch.equal(y, x + ops.rms_norm(x, w, 1e-5))
    assert torch.equal(heads, y.view(2, 1, 2, 4).transpose(1, 2))
    (flat,) = ops.sequence([heads.transpose(1, 2)], "flat %0\nreturn %1")
    assert torch.equal(flat, y)
    assert ops.sequence([heads, keys], "place %0 %1\nreturn %0")[0].shape == heads.shape
    assert torch.equal(keys[:, :, 2:], heads)
    assert keys[:, :, :2].count_nonzero() == 0
    for program, why in {
        "nothing %0": "there is no such op",
        "rms_norm %0 %1": "takes 3 arguments",
        "rms_norm %0 %3 1.0": "is not there yet",
        "rms_norm %0 %x 1.0": "is no number",
        "rms_norm %0 - 1.0": "names no tensor",
        "rms_norm %0 %1 a": "is no number",
        "rms_norm %0 %2 1.0": "got None",
        "return %2": "is None",
        "return %9": "is not there yet",
        "heads %0 3": "heads do not fit",
        "flat %0": "flat does not fit",
        "add %0 %1": "add does not fit",
        "place %0 %0": "place does not fit",
        "rms_norm %0 %0 1.0": "weight",
    }.items():
        with pytest.raises(RuntimeError, match=why):
            ops.sequence([x, w, None], program)
    with pytest.raises(RuntimeError, match="add does not fit"):
        ops.sequence([x, w.double()], "add %0 %1")
