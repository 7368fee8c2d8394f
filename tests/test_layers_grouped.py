"""Layers of one input computed together: the same numbers, whoever calls, and nothing left behind.

The groups run on GPUs alone; here they are led to the CPU's kernel. tests/test_gpu_cuda.py runs them in the emulation.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama

import tinycomp as tc
from tinycomp import ops
from tinycomp.layers import LowRankLinear, group_, grouped
from tinycomp.models import spec_of
from tinycomp.ops import _registry
from tinycomp.ops._group import gpu_backends

IDS = torch.arange(7)[None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of layers in each call of the op for groups."""
    found: list[int] = []
    call = ops.lowrank_linears

    def counted(x: torch.Tensor, *layers: torch.Tensor | None) -> torch.Tensor:
        found.append(3 if layers[-4] is not None else 2)
        return call(x, *layers)

    monkeypatch.setattr(grouped, "gpu_backends", lambda x: ("torch",))
    monkeypatch.setattr(_registry, "_forced", "torch")
    monkeypatch.setattr(ops, "lowrank_linears", counted)
    return found


def compressed(**changes):
    model = tiny_llama(**changes).eval()
    tc.compress_(model, tc.SVD(ratio=0.6, weighting="none"), progress=False)
    return model


@torch.no_grad()
def test_one_call_for_qkv_and_one_for_gate_and_up(calls: list[int], tmp_path) -> None:
    model = compressed()
    together = model(IDS).logits
    assert calls == [3, 2] * model.config.num_hidden_layers
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, together)
    assert calls == [3, 2] * model.config.num_hidden_layers * 2
    group_(model, ())
    torch.testing.assert_close(model(IDS).logits, together)
    assert len(calls) == 4 * model.config.num_hidden_layers


@torch.no_grad()
def test_many_inputs_are_computed_apart(calls: list[int]) -> None:
    model = compressed()
    model(torch.zeros(1, grouped.MOST_INPUTS + 1, dtype=torch.long))
    assert calls == []


@torch.no_grad()
def test_on_the_cpu_layers_compute_their_own(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed()
    together = model(IDS).logits
    assert calls
    calls.clear()
    monkeypatch.setattr(grouped, "gpu_backends", gpu_backends)
    torch.testing.assert_close(model(IDS).logits, together)
    assert calls == []


def test_gradients(calls: list[int]) -> None:
    model = compressed()
    model(IDS, labels=IDS).loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert calls
    model.zero_grad()
    group_(model, ())
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, together[name], msg=name)


@torch.no_grad()
def test_compiles_whole_and_generates(calls: list[int]) -> None:
    model = compressed()
    wanted = model(IDS).logits
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits
    torch.testing.assert_close(found, wanted)
    groups = [m.group for m in model.modules() if isinstance(m, LowRankLinear) and m.group]
    assert len(groups) == 5 * model.config.num_hidden_layers
    assert all(group._kept is None for group in groups)
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    group_(model, ())
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), tokens)


@torch.no_grad()
def test_copies_adapters_and_changed_layers(calls: list[int]) -> None:
    model = compressed()
    twin = copy.deepcopy(model)
    attention = twin.model.layers[0].self_attn
    assert attention.q_proj.group.members == [attention.q_proj, attention.k_proj, attention.v_proj]
    attention.k_proj.down.register_forward_hook(lambda module, inputs, output: 2 * output)
    out = twin(IDS).logits
    assert calls == [2] + [3, 2] * (model.config.num_hidden_layers - 1)
    model.model.layers[0].self_attn.k_proj.down.weight.mul_(2)
    torch.testing.assert_close(model(IDS).logits, out)


@torch.no_grad()
def test_a_model_that_calls_otherwise_gets_the_same_and_stops_grouping(calls: list[int]) -> None:
    layers = [LowRankLinear(8, n, 3, bias=False) for n in (8, 4)]
    group_(torch.nn.ModuleList(layers), [("0", "1")])
    wanted = layers[1](torch.ones(1, 8))
    for _ in range(10):
        x = torch.ones(1, 8)
        layers[0](x)
        torch.testing.assert_close(layers[1](x.clone()), wanted)
    assert len(calls) == grouped.MOST_MISSES
    assert layers[0].group._kept is None


def test_no_group_of_unlike_layers() -> None:
    layers = torch.nn.ModuleList([LowRankLinear(8, 8, 3), torch.nn.Linear(8, 8), LowRankLinear(4, 8, 3)])
    group_(layers, [("0", "1"), ("0", "2"), ("0",), ("0", "gone")])
    assert layers[0].group is None
    spec = spec_of(tiny_llama())
    assert spec.shared_inputs[0] == tuple(f"model.layers.0.self_attn.{c}_proj" for c in "qkv")
    assert spec.shared_inputs[-1][0].endswith("mlp.gate_proj")


def test_a_third_layer_in_part_is_refused() -> None:
    """By the kernel itself, which reads its arguments before they are checked in Python."""
    x, layer = torch.ones(3, 8), [*ops.quantize(torch.randn(4, 8)), None]
    for lost in range(2):
        third = list(layer)
        third[lost] = None
        with pytest.raises((TypeError, ValueError, RuntimeError)), torch.no_grad():
            ops.quant_linears(x, *layer, *layer, *third, 8, 0, 0)
    with torch.no_grad():
        assert ops.quant_linears(x, *layer, *layer, *layer, 8, 0, 0).shape == (3, 12)
        assert ops.quant_linears(x, *layer, *layer, None, None, None, None, 8, 0, 0).shape == (3, 8)
