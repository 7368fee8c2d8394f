"""Weights on large pages: the same model at other addresses."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn

import tinycomp as tc
from tinycomp import pages

IDS = torch.arange(12)[None]


def addresses(model: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()]


@pytest.fixture
def offered() -> None:
    if not pages._offered():
        pytest.skip("this system has no transparent large pages")


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("fuse", [False, True])
def test_a_moved_model_gives_the_same_bits(tmp_path, fuse):
    model = tiny_llama(tie_word_embeddings=True).eval()
    tc.compress_(model, tc.SVD(ratio=0.6), [{"input_ids": IDS}], progress=False)
    if fuse:
        tc.fuse_(model)
    before, size = addresses(model), sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        expected = model(IDS).logits
        moved = tc.huge_pages_(model)
        assert torch.equal(model(IDS).logits, expected)
    after = addresses(model)
    assert not set(before) & set(after)
    assert max(after) - min(after) < 2 * size + (1 << 21)  # one mapping
    assert 0 <= moved <= 2 * size
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if not fuse:
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(type(model).from_pretrained(tmp_path)(IDS).logits, expected)


@pytest.mark.usefixtures("offered")
def test_views_of_one_storage_stay_views_and_odd_tensors_survive():
    model, storage = nn.Module(), torch.arange(24.0)
    model.a = nn.Parameter(storage[:12].view(3, 4).t())
    model.b = nn.Parameter(storage[6:18])
    model.register_buffer("none", torch.empty(0, 3))
    model.register_buffer("flags", torch.tensor([True, False, True]))
    model.register_buffer("far", torch.empty(3, device="meta"))
    expected = {name: value.clone() for name, value in model.state_dict().items() if name != "far"}
    strides = model.a.stride()
    tc.huge_pages_(model)
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.a.stride() == strides
    assert model.far.device.type == "meta"
    with torch.no_grad():
        model.b[0] = -1  # number 6 of the storage
    assert model.a[2, 1] == -1


@pytest.mark.usefixtures("offered")
def test_training_goes_on_and_copies_are_independent():
    layer = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    other = copy.deepcopy(layer)
    tc.huge_pages_(layer)
    for model, steps in ((layer, optimizer), (other, torch.optim.SGD(other.parameters(), lr=1.0))):
        model(torch.ones(1, 8)).sum().backward()
        steps.step()
    assert torch.equal(layer.weight, other.weight)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert twin.weight.abs().sum() > 0


@pytest.mark.usefixtures("offered")
def test_many_weights_are_on_large_pages_or_the_count_says_not():
    layer = nn.Linear(2048, 2048)
    size = layer.weight.nbytes + layer.bias.nbytes
    moved = tc.huge_pages_(layer)
    begin = layer.weight.data_ptr()
    assert begin % (2 << 20) == 0
    assert moved <= size + 64
    assert pages._on_large_pages(begin, begin + size) >= moved - 64


def test_nothing_is_moved_where_the_system_has_none(monkeypatch):
    monkeypatch.setattr(pages, "_offered", lambda: False)
    layer = nn.Linear(4, 4)
    before = addresses(layer)
    assert tc.huge_pages_(layer) == 0
    assert addresses(layer) == before


def test_a_module_without_weights():
    assert tc.huge_pages_(nn.ReLU()) == 0
