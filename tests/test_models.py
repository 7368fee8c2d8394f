"""Specs: table rows against the stock classes with any head, the generic way for others, coverage of every weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import BLOCKS, FAMILIES, HIDDEN, VOCAB, WIDTH
from torch import nn

from tinycomp.edits import Plan, Replace
from tinycomp.layers import LowRankLinear
from tinycomp.models import TABLE, config_after_drop, is_linear, spec_of
from tinycomp.surgery import apply_


def linears_in(model: nn.Module, prefix: str) -> set[str]:
    return {name for name, m in model.named_modules() if is_linear(m) and name.startswith(prefix + ".")}


def test_every_row_has_a_tiny_model() -> None:
    assert {family.removesuffix("-gated") for family in FAMILIES} == set(TABLE)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_finds_every_linear_of_every_block(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    spec = spec_of(model)
    assert spec.has_row, spec.note
    assert not spec.note
    blocks = 1 if family == "albert" else BLOCKS
    pair = family.startswith(("t5", "marian"))
    assert len(spec.stacks) == (2 if pair else 1)
    for stack in spec.stacks:
        assert len(stack.blocks) == blocks
        assert stack.shared == (family == "albert")
        for block in stack.blocks:
            assert len(set(block.linears)) == len(block.linears)
            assert set(block.linears) == linears_in(model, block.path)
            assert block.ffn is not None
            named = [p for a in block.attention for p in (a.q, a.k, a.v, a.o)] + [*block.ffn.inputs, block.ffn.down]
            assert list(dict.fromkeys(named)) == list(block.linears)  # in the order they are called
            cross = pair and stack is spec.stacks[1]
            assert [a.kind for a in block.attention] == (["self", "cross"] if cross else ["self"])
    assert spec.linears == tuple(p for block in spec.blocks for p in block.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_that_of_the_config(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    spec = spec_of(model)
    for block in spec.blocks:
        attention, ffn = block.attention[0], block.ffn
        assert ffn is not None
        head_dim = 16 if family == "qwen3" else HIDDEN // 4
        kv_heads = 2 if family in ("llama", "mistral", "qwen2", "qwen3") else 4
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, kv_heads, head_dim)
        assert ffn.width == (4 * HIDDEN if family == "dinov2" else WIDTH)
        assert ffn.gated == (family in ("llama", "mistral", "qwen2", "qwen3", "t5-gated"))
        if family == "dinov2":
            assert ffn.config_field is None  # the config has mlp_ratio, an integer
        else:
            assert getattr(model.config, str(ffn.config_field)) == ffn.width


@pytest.mark.parametrize(
    ("family", "classes"),
    [
        ("llama", ["LlamaModel", "LlamaForSequenceClassification"]),
        ("qwen3", ["Qwen3Model"]),
        ("gpt2", ["GPT2Model"]),
        ("opt", ["OPTModel"]),
        ("bert", ["BertModel", "BertForMaskedLM"]),
        ("distilbert", ["DistilBertModel", "DistilBertForSequenceClassification"]),
        ("albert", ["AlbertModel"]),
        ("vit", ["ViTModel"]),
        ("deit", ["DeiTModel"]),
        ("dinov2", ["Dinov2ForImageClassification"]),
        ("t5", ["T5Model", "T5EncoderModel"]),
        ("marian", ["MarianModel", "MarianForCausalLM"]),
    ],
)
def test_any_head_and_the_bare_model_on_meta(family: str, classes: list[str], tiny: Callable[..., Any]) -> None:
    config = tiny(family).config
    for name in classes:
        if name == "MarianForCausalLM":
            config.is_decoder, config.is_encoder_decoder = True, False
        with torch.device("meta"):
            model = getattr(transformers, name)(config)
        spec = spec_of(model)
        assert spec.has_row, f"{name}: {spec.note}"
        assert all(is_linear(model.get_submodule(path)) for path in spec.linears)
        assert all(block.ffn is not None for block in spec.blocks)
        one_stack = name in ("T5EncoderModel", "MarianForCausalLM") or not family.startswith(("t5", "marian"))
        assert len(spec.stacks) == (1 if one_stack else 2)


def test_gpt2_cross_attention_and_fused_projection() -> None:
    fields: dict[str, Any] = {
        "n_embd": HIDDEN,
        "n_layer": 1,
        "n_head": 4,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.device("meta"):
        model = transformers.GPT2Model(transformers.GPT2Config(**fields, add_cross_attention=True))
    self_attention, cross = spec_of(model).blocks[0].attention
    assert self_attention.q == self_attention.k == self_attention.v == "h.0.attn.c_attn"
    assert (cross.kind, cross.q, cross.k) == ("cross", "h.0.crossattention.q_attn", "h.0.crossattention.c_attn")


def test_dinov2_gated(tiny: Callable[..., Any]) -> None:
    ffn = spec_of(tiny("dinov2", use_swiglu_ffn=True)).blocks[0].ffn
    assert ffn is not None
    assert ffn.gated
    assert ffn.width == 88  # two thirds of 4 * 32, rounded up to a multiple of 8


def test_a_replaced_linear_leaves_the_list_and_keeps_its_place(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").to("meta")
    before = spec_of(model)
    ffn = before.blocks[1].ffn
    assert ffn is not None
    kwargs = {"in_features": WIDTH, "out_features": HIDDEN, "rank": 4, "bias": False}
    apply_(model, Plan([Replace(ffn.down, layer="LowRankLinear", kwargs=kwargs)]))
    after = spec_of(model)
    assert isinstance(model.get_submodule(ffn.down), LowRankLinear)
    assert [p for p in before.linears if p not in after.linears] == [ffn.down]
    assert after.blocks[1].ffn == ffn
    assert after.blocks[1].attention == before.blocks[1].attention


def test_shared_modules_are_listed_once(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    spec = spec_of(model)
    assert not [p for p in spec.linears if p.startswith("model.layers.2.mlp")]
    assert spec.blocks[2].ffn is not None


@pytest.mark.parametrize(
    ("family", "stacks"),
    [
        ("gpt_neox", {"gpt_neox.layers": 2}),
        ("falcon", {"transformer.h": 2}),
        ("bart", {"model.encoder.layers": BLOCKS, "model.decoder.layers": BLOCKS}),
        ("swin", {"encoder.layers.0.blocks": 2, "encoder.layers.1.blocks": 2}),
        ("mixtral", {"model.layers": 2}),
    ],
)
def test_architecture_without_a_row(family: str, stacks: dict[str, int], tiny: Callable[..., Any]) -> None:
    model = tiny(family).to("meta")
    spec = spec_of(model)
    assert not spec.has_row
    assert family in spec.note
    assert "tinycomp/models/table.py" in spec.note
    assert {stack.path: len(stack.blocks) for stack in spec.stacks} == stacks
    assert set(spec.linears) == {p for stack in stacks for p in linears_in(model, stack)}
    assert all(block.ffn is None and block.attention == () for block in spec.blocks)
    with pytest.raises(ValueError, match="no row"):
        config_after_drop(model.config, spec, spec.stacks[0], 0)


def test_fused_experts_are_accounted_for(tiny: Callable[..., Any]) -> None:
    model = tiny("mixtral").to("meta")
    spec = spec_of(model)
    sizes = {path: (numel, reason) for path, numel, reason in spec.uncovered}
    assert sizes["model.layers.0.mlp.experts.gate_up_proj"] == (3 * 2 * 48 * 32, "fused 3-D expert parameter")
    assert sizes["model.layers.1.mlp.experts.down_proj"] == (3 * 48 * 32, "fused 3-D expert parameter")
    assert "no linear layer" in sizes["model.layers.0.mlp.gate.weight"][1]
    covered = sum(model.get_submodule(p).weight.numel() for p in spec.linears)
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("model.layers") and p.ndim >= 2)
    assert covered + sum(numel for _, numel, _ in spec.uncovered) == matrices  # no weight of a block is unexplained


def test_routers_and_fused_attention_are_not_linears() -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    class OwnLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.router = Router(8, 2)
            self.dense = OwnLinear(8, 8)

    model = nn.Module()
    model.blocks = nn.Sequential(Block(), Block())
    spec = spec_of(model)
    assert spec.linears == ("blocks.0.dense", "blocks.1.dense")
    reasons = {path: reason for path, _, reason in spec.uncovered}
    assert "without calling its linears" in reasons["blocks.0.attention.out_proj.weight"]
    assert "Router" in reasons["blocks.1.router.weight"]
    assert spec_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).stacks == ()


def test_a_row_that_does_not_fit_says_what_it_looked_for(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.query = block.self_attn.q_proj
        del block.self_attn.q_proj
    spec = spec_of(model)
    assert not spec.has_row
    assert "self_attn.q_proj" in spec.note
    assert len(spec.linears) == 7 * BLOCKS  # still compressible one by one


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "albert"])
def test_config_after_drop_builds_a_shallower_model(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    spec = spec_of(model)
    for stack in spec.stacks:
        fields = config_after_drop(model.config, spec, stack, 1)
        config = type(model.config).from_dict({**model.config.to_dict(), **fields})
        with torch.device("meta"):
            rebuilt = type(model)(config)
        depths = {s.path: len(s.blocks) for s in spec_of(rebuilt).stacks}
        assert depths == {s.path: BLOCKS - (s is stack) for s in spec.stacks}


def test_per_layer_fields_lose_the_right_entry(tiny: Callable[..., Any]) -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny("qwen3", layer_types=types, use_sliding_window=True, sliding_window=4)
    spec = spec_of(model)
    assert spec.per_layer_fields == ("layer_types",)
    after = config_after_drop(model.config, spec, spec.stacks[0], 1)
    assert after == {"num_hidden_layers": 2, "layer_types": ["full_attention", "full_attention"]}


def test_albert_cannot_lose_its_only_block(tiny: Callable[..., Any]) -> None:
    spec = spec_of(tiny("albert"))
    with pytest.raises(ValueError, match="cannot lose one"):
        config_after_drop(None, spec, spec.stacks[0], 0)


def test_block_diagonal_linear_is_no_linear() -> None:
    class GroupedLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., 2, in) -> (..., 2, out / 2)
            return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features))

    class OtherLinear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    assert not is_linear(GroupedLinear(4, 6))
    assert is_linear(OtherLinear(4, 6))
    assert is_linear(OtherLinear(4, 6, device="meta"))
