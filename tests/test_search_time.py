"""The time of a search before it runs: trials of the shapes it will have."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES

import tinycomp as tc
from tinycomp.eval.timing import Timing
from tinycomp.models import spec_of
from tinycomp.train import search_time
from tinycomp.train.path_search import PathSearch
from tinycomp.train.search_time import step_seconds

KINDS = {"ffn", "qk", "v"}
BLOCKS, HEAD = 0.25, 2.0  # seconds per sample on the machine of these tests


@pytest.fixture
def trials(monkeypatch):
    """A machine on which a step takes HEAD and BLOCKS seconds per block; returns what ran on it."""
    ran = []

    def time_interleaved(steps, repeats):
        for step in steps.values():
            step()
        return {name: Timing((HEAD + BLOCKS * int(name),) * repeats) for name in steps}

    made = search_time._step

    def step(model, config, samples, *rest):
        ran.append((len(spec_of(model).blocks), samples))
        return made(model, config, samples, *rest)

    monkeypatch.setattr(search_time, "time_interleaved", time_interleaved)
    monkeypatch.setattr(search_time, "_step", step)
    return ran


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bert", "distilbert"])
def test_a_step_is_a_line_through_two_depths(family, trials):
    model = FAMILIES[family].build(**{spec_of(FAMILIES[family].build()).stacks[0].depth_field: 9})
    state = torch.get_rng_state()
    for config in (PathSearch(samples=3, length=8), PathSearch(samples=3, length=8, compensate=True, loss="distill")):
        seconds = step_seconds(model, config, KINDS)
        count = 1 if config.compensate else 3
        assert seconds == pytest.approx(count * (HEAD + 9 * BLOCKS))
    assert sorted(trials) == [(1, 1), (1, 3), (5, 1), (5, 3)]
    assert torch.equal(torch.get_rng_state(), state)


def test_shallow_and_shared_models(trials):
    assert step_seconds(FAMILIES["llama"].build(num_hidden_layers=1), PathSearch(samples=1, length=8), KINDS) == 2.25
    albert = FAMILIES["albert"].build(num_hidden_layers=12)
    assert step_seconds(albert, PathSearch(samples=1, length=8), KINDS) == HEAD + 12 * BLOCKS
    assert all(step_seconds(FAMILIES[f].build(), PathSearch(), KINDS) is None for f in ("t5", "marian", "vit"))


def test_lengths_and_losses_that_the_model_cannot_have_do_not_stop_a_plan(trials):
    model = FAMILIES["gpt2"].build()  # 64 positions
    for source, config in ((model.config, {}), (FAMILIES["bert"].build(), {"loss": "labels"})):
        notes = tc.plan(source, tc.SPP(ratio=0.5, length=500, **config), progress=False)["notes"]
        assert any("s by steps on a few of its blocks" in note for note in notes)


def test_a_large_model_is_not_tried(trials, monkeypatch):
    monkeypatch.setattr(search_time, "MOST_PARAMETERS", 1000)
    notes = tc.plan(FAMILIES["llama"].build().config, tc.SPP(ratio=0.5), progress=False)["notes"]
    assert any("at this machine's matrix rate" in note for note in notes)
    assert not trials
