"""Statistics against brute force, and the replay of blocks against the whole model."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from torch import nn

from tinycomp.calib import Replay, chainable, collect
from tinycomp.calib.loss import fisher_loss
from tinycomp.data import for_model
from tinycomp.models import spec_of


def text_batches(count: int = 2, rows: int = 3, length: int = 7) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 60, (rows, length), generator=g)} for _ in range(count)]


def recorded_inputs(model: nn.Module, path: str, batches: list[dict[str, Any]]) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: rows.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(rows).double()


def test_grams_are_means_over_tokens_and_shared_inputs_are_stored_once() -> None:
    model = FAMILIES["llama"].build()
    spec, batches = spec_of(model), text_batches()
    store = collect(model, spec, batches, frozenset({"gram"}))
    block = spec.blocks[1]
    q, k = block.linears[:2]
    assert store.shares_input(k) == q
    for path in block.linears:
        x = recorded_inputs(model, path, batches)
        gram = store.get([path])[path].gram
        assert gram is not None
        assert torch.allclose(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    store.close()


def test_padding_is_left_out() -> None:
    model = FAMILIES["llama"].build()
    spec = spec_of(model)
    ids = text_batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    path = spec.blocks[0].linears[0]
    store = collect(model, spec, [{"input_ids": ids, "attention_mask": mask}], frozenset({"gram"}))
    x = recorded_inputs(model, path, [{"input_ids": ids, "attention_mask": mask}])[mask.flatten().bool()]
    gram = store.get([path])[path].gram
    assert gram is not None
    assert torch.allclose(gram.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_output_grams_predict_the_divergence_that_an_error_causes() -> None:
    """tr(G E S Eᵀ)/2 is the expected KL divergence for a small error, up to the Kronecker factorisation."""
    model = FAMILIES["llama"].build()
    spec, batches = spec_of(model), text_batches(12, 8, 12)
    path = spec.blocks[2].linears[-1]
    store = collect(model, spec, batches, frozenset({"gram", "output_gram"}))
    stats = store.get([path])[path]
    assert stats.gram is not None
    assert stats.output_gram is not None
    module = model.get_submodule(path)
    error = 0.02 * torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(5))
    predicted = 0.5 * float(((stats.output_gram @ error) * (error @ stats.gram)).sum())
    measured, tokens = 0.0, 0
    with torch.no_grad():
        before = [model(**b).logits.log_softmax(-1) for b in batches]
        module.weight += error
        for batch, old in zip(batches, before, strict=True):
            new = model(**batch).logits.log_softmax(-1)
            measured += float((old.exp() * (old - new)).sum())
            tokens += batch["input_ids"].numel()
    assert 0.4 < predicted / (measured / tokens) < 2.5


def test_statistics_in_parts_equal_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build()
    spec, batches = spec_of(model), text_batches()
    whole = collect(model, spec, batches, frozenset({"gram", "output_gram"}), seed=3)
    monkeypatch.setattr(sys.modules["tinycomp.calib.collect"], "STATS_BYTES", 1)
    parts = collect(model, spec, batches, frozenset({"gram", "output_gram"}), seed=3)
    for path in spec.linears:
        a, b = whole.get([path])[path], parts.get([path])[path]
        assert torch.equal(a.gram, b.gram)  # type: ignore[arg-type]
        assert torch.allclose(a.output_gram, b.output_gram, rtol=1e-5)  # type: ignore[arg-type]


def test_parameters_and_hooks_are_as_before() -> None:
    model = FAMILIES["llama"].build()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    collect(model, spec_of(model), text_batches(1), frozenset({"gram", "output_gram"}))
    assert not frozen.requires_grad
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_batches_and_not_finite_are_refused() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="got no batches"):
        collect(model, spec_of(model), [], frozenset({"gram"}))
    with torch.no_grad():
        model.get_submodule(spec_of(model).blocks[0].linears[-1]).weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinite"):
        collect(model, spec_of(model), text_batches(1), frozenset({"gram"}))


@pytest.mark.parametrize("classes", [2, 13, 48])
def test_labels_come_from_the_models_own_distribution(classes: int) -> None:
    """The gradient of the loss is softmax less one at the label; labels are as frequent as they are probable."""
    tokens = 20000
    row = torch.randn(classes, generator=torch.Generator().manual_seed(0)).mul_(2)
    row[-1] = -1e9  # never drawn
    logits = row.expand(1, tokens, classes).clone().requires_grad_(True)
    loss = fisher_loss(SimpleNamespace(logits=logits), None, 3)
    loss.backward()
    assert logits.grad is not None
    label = (logits.detach().softmax(-1) - logits.grad)[0]
    assert torch.allclose(label, torch.nn.functional.one_hot(label.argmax(-1), classes).float(), atol=1e-5)
    drawn = torch.nn.functional.cross_entropy(logits.detach()[0], label.argmax(-1), reduction="sum")
    assert torch.allclose(loss.detach(), drawn, rtol=1e-4)
    probabilities = row.softmax(-1)
    off = (label.mean(0) - probabilities) / (probabilities * (1 - probabilities) / tokens).sqrt().clamp(min=1e-6)
    assert off.abs().max() < 4.5
    assert label[:, -1].sum() == pytest.approx(0, abs=1e-3)


def test_loss_of_a_model_without_logits_has_a_gradient_per_output() -> None:
    class Output:
        last_hidden_state = torch.randn(2, 3, 4, requires_grad=True)

    fisher_loss(Output(), None, 0).backward()
    grad = Output.last_hidden_state.grad
    assert grad is not None
    assert bool((grad != 0).all())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_replay_gives_what_the_model_gives(name: str) -> None:
    """Advancing block by block ends at the stack's own output, for every architecture whose blocks form a chain."""
    family = FAMILIES[name]
    model = family.build()
    batch = for_model(family.batch(), model)
    for number, stack in enumerate(spec_of(model).stacks):
        reason = chainable(model, stack, batch)
        if stack.shared:
            assert reason
            continue
        assert reason is None, reason
        replay = Replay(model, model, stack, [batch], decoder=number > 0)
        seen: list[torch.Tensor] = []
        last = model.get_submodule(stack.blocks[-1].path)
        hook = last.register_forward_hook(lambda _, __, out: seen.append(out if torch.is_tensor(out) else out[0]))  # noqa: B023
        with torch.no_grad():
            model(**batch)
        hook.remove()
        for _block in stack.blocks:
            replay.advance()
        assert torch.allclose(replay.hidden["working"][0], seen[0], atol=1e-5)


def test_last_hidden_states_are_those_of_the_last_real_tokens() -> None:
    model = FAMILIES["llama"].build()
    spec = spec_of(model)
    ids = text_batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = collect(model, spec, [batch], frozenset({"gram", "last_hidden"})).last_hidden[spec.blocks[0].path]
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(found, torch.stack([hidden[0, -1], hidden[1, 3], hidden[2, -1]]), atol=1e-6)
