"""apply_: every edit does what it says, on meta too, and a plan that fails leaves no mark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BLOCKS, HIDDEN, WIDTH, output
from torch import Tensor, nn

from tinycomp.edits import Drop, Plan, Replace, Set, Slice, Tie
from tinycomp.layers import CURLinear, LowRankLinear, SWSCLinear
from tinycomp.surgery import apply_

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def factors(rank: int = 4, out_features: int = HIDDEN, in_features: int = HIDDEN) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "down.weight": torch.randn(rank, in_features, generator=generator) / in_features**0.5,
        "up.weight": torch.randn(out_features, rank, generator=generator) / rank**0.5,
    }


def replacement(path: str = Q, rank: int = 4, **kwargs: Any) -> Replace:
    fields = {"in_features": HIDDEN, "out_features": HIDDEN, "rank": rank, "bias": False, **kwargs}
    return Replace(path, layer="LowRankLinear", kwargs=fields)


def named(path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything an edit may change, by identity where values could be the same by accident."""
    return (
        [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(t)) for n, t in model.named_parameters(remove_duplicate=False)],
        [(n, id(t)) for n, t in model.named_buffers(remove_duplicate=False)],
        [getattr(m, a, None) for m in model.modules() for a in ("layer_idx", "in_features", "out_features", "nf")],
        model.config.to_dict(),
    )


def test_replace_computes_the_factors(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").to(torch.bfloat16).train()
    tensors = factors()
    apply_(model, Plan([replacement()]), named(Q, tensors))
    layer = model.get_submodule(Q)
    assert isinstance(layer, LowRankLinear)
    assert layer.training
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert torch.equal(layer.up.weight, tensors["up.weight"].bfloat16())
    assert layer.down.weight.data_ptr() != tensors["down.weight"].data_ptr()  # the caller keeps its tensors
    assert all(p.requires_grad for p in layer.parameters())


def test_replaced_layer_is_frozen_like_what_it_replaces(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").requires_grad_(False)
    apply_(model, Plan([replacement()]), named(Q, factors()))
    assert not any(p.requires_grad for p in model.parameters())
    model = tiny("llama")
    kwargs = {"in_features": HIDDEN, "out_features": HIDDEN, "rank": 4, "bias": False}
    tensors = {"r.weight": torch.ones(4, HIDDEN), "u.weight": torch.ones(4, 4), "c.weight": torch.ones(HIDDEN, 4)}
    apply_(model, Plan([Replace(Q, layer="CURLinear", kwargs=kwargs)]), named(Q, tensors))
    assert isinstance(model.get_submodule(Q), CURLinear)
    assert [n for n, p in model.get_submodule(Q).named_parameters() if p.requires_grad] == ["u.weight"]


def test_replace_of_conv1d_takes_a_linear_layout_and_keeps_the_bias(tiny: Callable[..., Any]) -> None:
    model = tiny("gpt2")
    path = "transformer.h.0.attn.c_attn"
    old = model.get_submodule(path)
    kwargs = {"in_features": HIDDEN, "out_features": 3 * HIDDEN, "rank": 32}
    u, s, v = torch.linalg.svd(old.weight.detach().T, full_matrices=False)
    before = output(model, "gpt2")
    tensors = {"up.weight": u * s, "down.weight": v}
    apply_(model, Plan([Replace(path, layer="LowRankLinear", kwargs=kwargs)]), named(path, tensors))
    assert model.get_submodule(path).bias is old.bias
    assert torch.allclose(output(model, "gpt2"), before, atol=1e-4)


def test_a_replaced_layer_can_be_replaced_again(tiny: Callable[..., Any]) -> None:
    model = tiny("bert")
    path = "bert.encoder.layer.0.intermediate.dense"
    sizes = {"in_features": HIDDEN, "out_features": WIDTH}
    first = Replace(path, layer="LowRankLinear", kwargs={**sizes, "rank": 4})
    second = Replace(path, layer="SWSCLinear", kwargs={**sizes, "clusters": 3, "rank": 0})
    bias = model.get_submodule(path).bias
    apply_(model, Plan([first]), named(path, factors(4, WIDTH)))
    tensors = {"centroids.weight": torch.ones(3, HIDDEN), "labels": torch.arange(WIDTH) % 3}
    apply_(model, Plan([second]), named(path, tensors))
    layer = model.get_submodule(path)
    assert isinstance(layer, SWSCLinear)
    assert layer.bias is bias
    assert layer.labels.dtype == torch.uint8
    assert torch.allclose(layer(torch.ones(1, HIDDEN)) - bias, torch.full((1, WIDTH), float(HIDDEN)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slice_keeps_the_chosen_units(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    linears = {
        "llama": ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj", DOWN),
        "gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
    }[family]
    *inputs, down = linears
    conv1d = family == "gpt2"
    keep = torch.arange(0, WIDTH, 2)
    out_axis, in_axis = (1, 0) if conv1d else (0, 1)
    reference = tiny(family)
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():  # the reference zeroes what the slice removes
        gone = torch.ones(WIDTH, dtype=torch.bool).index_fill(0, keep, False)
        reference.get_submodule(down).weight.index_fill_(in_axis, gone.nonzero()[:, 0], 0.0)
    for path in inputs:
        module = model.get_submodule(path)
        tensors[f"{path}.weight"] = module.weight.detach().index_select(out_axis, keep)
        if module.bias is not None:
            tensors[f"{path}.bias"] = module.bias.detach()[keep]
    tensors[f"{down}.weight"] = model.get_submodule(down).weight.detach().index_select(in_axis, keep)
    edits: list[Any] = [Slice(p, dim=0, keep=len(keep)) for p in inputs] + [Slice(down, dim=1, keep=len(keep))]
    apply_(model, Plan(edits), tensors)
    assert torch.allclose(output(model, family), output(reference, family), atol=1e-5)
    first, last = model.get_submodule(inputs[0]), model.get_submodule(down)
    if conv1d:
        assert (first.nf, last.nx) == (len(keep), len(keep))
    else:
        assert (first.out_features, last.in_features) == (len(keep), len(keep))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_drop_renumbers_and_updates_the_config(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    stack, field = {"llama": ("model.layers", "num_hidden_layers"), "t5": ("decoder.block", "num_decoder_layers")}[
        family
    ]
    blocks = model.get_submodule(stack)
    kept = [blocks[0], blocks[2]]
    apply_(model, Plan([Drop(f"{stack}.1", config={field: BLOCKS - 1})]))
    assert list(blocks) == kept
    assert list(blocks._modules) == ["0", "1"]
    assert getattr(model.config, field) == BLOCKS - 1
    indices = {m.layer_idx for m in kept[1].modules() if getattr(m, "layer_idx", None) is not None}
    assert indices == {1}
    if family == "t5":
        assert model.config.num_layers == BLOCKS
        assert model.decoder.config.num_layers == BLOCKS - 1
        assert model.encoder.config.num_layers == BLOCKS
    assert torch.isfinite(output(model, family)).all()


def test_paths_follow_the_numbering_of_their_moment(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    edits = [Drop("model.layers.0", config={"num_hidden_layers": 2}), replacement(Q)]
    old = model.model.layers[2].self_attn
    apply_(model, Plan(edits), named(Q, factors()))
    assert isinstance(old.q_proj, LowRankLinear)


def test_tie_shares_the_module(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    apply_(model, Plan([Tie("model.layers.2.mlp", to="model.layers.0.mlp")]))
    assert model.model.layers[2].mlp is model.model.layers[0].mlp


def test_set_changes_a_scalar(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    apply_(model, Plan([Set("model.layers.0.self_attn", attr="scaling", value=0.5)]))
    assert model.model.layers[0].self_attn.scaling == 0.5


def test_meta_models_stay_on_meta_and_take_no_tensors(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").to("meta")
    edits = [replacement(), Slice(DOWN, dim=1, keep=20), Drop("model.layers.0", config={"num_hidden_layers": 2})]
    apply_(model, Plan(edits))
    assert all(t.device.type == "meta" for t in model.state_dict().values())
    assert model.get_submodule("model.layers.0.self_attn.q_proj.down").weight.shape == (4, HIDDEN)
    assert model.get_submodule("model.layers.0.mlp.down_proj").weight.shape == (HIDDEN, 20)


def test_replay_skips_what_the_config_expresses(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").to("meta")
    edits = [Drop("model.layers.0", config={"num_hidden_layers": 2}, in_config=True), replacement()]
    apply_(model, Plan(edits), replay=True)
    assert len(model.model.layers) == BLOCKS
    assert isinstance(model.get_submodule(Q), LowRankLinear)


GOOD = named(Q, factors())
LM_HEAD = replacement("lm_head", in_features=HIDDEN, out_features=64)
BAD: dict[str, tuple[list[Any], dict[str, Tensor], str]] = {
    "path": ([replacement("model.layers.7.self_attn.q_proj")], {}, r"layers has no '7'; it has 0, 1, 2"),
    "leaf": ([replacement("model.layers.1.self_attn.query")], {}, "it has q_proj, k_proj, v_proj, o_proj"),
    "layer": ([Replace(Q, layer="TuckerLinear")], {}, "got layer 'TuckerLinear', allowed CURLinear"),
    "kwarg": ([replacement(ranks=3)], GOOD, "got ranks, LowRankLinear takes in_features"),
    "rank": ([replacement(rank=33)], GOOD, r"LowRankLinear: rank is 33, allowed 1\.\.32"),
    "missing rank": ([Replace(Q, layer="LowRankLinear", kwargs={"in_features": 32, "out_features": 32})], {}, "rank"),
    "sizes": ([replacement(in_features=31)], GOOD, r"\(31, 32\), the layer there has \(32, 32\)"),
    "not linear": ([replacement("model.layers.1.mlp")], GOOD, "got a LlamaMLP, allowed are linear layers"),
    "tied embeddings": ([LM_HEAD], {}, "tied embeddings"),
    "whole model": ([replacement("")], {}, "got the whole model"),
    "no tensors": ([replacement()], {}, f"got no tensor for {Q}.down.weight, {Q}.up.weight"),
    "slice without tensor": ([Slice(DOWN, dim=1, keep=8)], {}, f"got no tensor for {DOWN}.weight"),
    "shape": ([replacement(rank=5)], GOOD, rf"tensor {Q}.down.weight: got shape \(4, 32\), allowed \(5, 32\)"),
    "unknown tensor": (
        [replacement()],
        {**GOOD, f"{Q}.middle": torch.ones(2)},
        "has no tensor 'middle'; it has weight",
    ),
    "tensor path": ([replacement()], {**GOOD, "model.nothing.weight": torch.ones(2)}, "has no 'nothing'"),
    "nan": ([replacement()], {**GOOD, f"{Q}.down.weight": torch.full((4, HIDDEN), torch.nan)}, "got NaN"),
    "kind": ([replacement()], {**GOOD, f"{Q}.down.weight": torch.ones(4, HIDDEN).long()}, "got torch.int64"),
    "values on meta": ([replacement()], {**GOOD, f"{Q}.down.weight": torch.ones(4, HIDDEN).to("meta")}, "on meta"),
    "keep": ([Slice(DOWN, dim=1, keep=49)], {}, r"got keep 49, allowed 1\.\.48"),
    "dim": ([Slice(DOWN, dim=2, keep=8)], {}, "got dim 2"),
    "slice of a block": ([Slice("model.layers.1.mlp", dim=0, keep=8)], {}, "got a LlamaMLP, allowed nn.Linear"),
    "tie to itself": ([Tie(Q, to=Q)], {}, "allowed is a module outside it"),
    "tie of classes": ([Tie("model.layers.1.mlp", to="model.layers.0.self_attn")], {}, "allowed one class"),
    "drop": ([Drop("model.layers.1.mlp")], {}, "allowed a list of two or more"),
    "drop all": ([Drop("model.layers.0")] * 3, {}, "allowed a list of two or more"),
    "config field": ([Drop("model.layers.1", config={"depth": 2})], {}, "got config fields depth"),
    "set": ([Set(Q, attr="width", value=3)], {}, "has no plain attribute"),
    "set tensor": ([Set(Q, attr="weight", value=3)], {}, "has no plain attribute"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_failing_plan_names_the_fault_and_leaves_no_mark(name: str, tiny: Callable[..., Any]) -> None:
    edits, tensors, message = BAD[name]
    model = tiny("llama", num_hidden_layers=BLOCKS)
    before, logits = fingerprint(model), output(model, "llama")
    first = [  # edits that succeed before the one that fails
        Drop("model.layers.2", config={"num_hidden_layers": 2}),
        Set("model.layers.0.self_attn", attr="scaling", value=0.5),
        Tie("model.layers.0.post_attention_layernorm", to="model.layers.1.post_attention_layernorm"),
        Slice("model.layers.0.mlp.down_proj", dim=1, keep=WIDTH),
    ]
    if name in ("path", "drop all", "no tensors", "slice without tensor"):
        first = []
    with pytest.raises(ValueError, match=message):
        apply_(model, Plan([*first, *edits]), tensors)
    assert fingerprint(model) == before
    assert torch.equal(output(model, "llama"), logits)


def test_bias_cannot_get_lost(tiny: Callable[..., Any]) -> None:
    model = tiny("opt")
    path = "model.decoder.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match="set bias to true"):
        apply_(model, Plan([replacement(path)]), named(path, factors()))


def test_labels_that_do_not_fit_their_type_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    sizes = {"in_features": HIDDEN, "out_features": HIDDEN, "bias": False}
    edit = Replace(Q, layer="SWSCLinear", kwargs={**sizes, "clusters": 4, "rank": 0})
    tensors = {"centroids.weight": torch.ones(4, HIDDEN), "labels": torch.full((HIDDEN,), 300)}
    with pytest.raises(ValueError, match=r"torch\.uint8 cannot hold"):
        apply_(model, Plan([edit]), named(Q, tensors))


def test_modules_without_a_config_can_be_edited() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
    edit = Replace("blocks.0.0", layer="LowRankLinear", kwargs={"in_features": 8, "out_features": 8, "rank": 2})
    tensors = named("blocks.0.0", {"down.weight": torch.ones(2, 8), "up.weight": torch.ones(8, 2)})
    apply_(model, Plan([Drop("blocks.1"), edit]), tensors)
    assert len(model.blocks) == 2
    with pytest.raises(ValueError, match="the config has none"):
        apply_(model, Plan([Drop("blocks.1", config={"num_hidden_layers": 1})]))
    assert len(model.blocks) == 2
