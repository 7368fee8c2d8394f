"""Masks that act as removals, and searches that continue where they were killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, WIDTH, output

from tinycomp.edits import Plan
from tinycomp.methods import Linear
from tinycomp.methods._slicing import slice_units
from tinycomp.models import spec_of, unit_groups
from tinycomp.surgery import apply_
from tinycomp.train import path_search
from tinycomp.train.masks import Masks, Refit, search_loss
from tinycomp.train.path_search import PathSearch, search_path
from tinycomp.train.unit_loss import places

QUICK = {"steps": 6, "samples": 2, "length": 9}


def data(family, count=4):
    return [FAMILIES[family].batch(seed) for seed in range(count)]


def linears(model, groups):
    found = {}
    for member in (m for g in groups for m in g.members):
        module = model.get_submodule(member.path)
        transposed = hasattr(module, "nf")
        weight, bias = module.weight.detach(), module.bias
        found[member.path] = Linear(
            member.path, weight.T if transposed else weight, None if bias is None else bias.detach(),
            transposed=transposed,
        )  # fmt: skip
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_zero_of_a_mask_is_the_removal_of_the_unit(family):
    model = FAMILIES[family].build()
    groups = unit_groups(model)
    generator = torch.Generator().manual_seed(0)
    kept = {}
    with Masks(model, groups) as masks:
        for value, group in zip(masks.values, groups, strict=True):
            keep = torch.rand(group.count, generator=generator) < 0.6
            value.data[~keep] = 0.0
            kept[group.name] = keep.nonzero().flatten()
        masked = output(model, family)
        with masks.off():
            dense = output(model, family)
    assert torch.equal(output(model, family), dense)
    result = slice_units(linears(model, groups), groups, kept, refit=False)
    apply_(model, Plan(result.edits), result.tensors)
    assert not torch.allclose(masked, dense, atol=1e-4)
    torch.testing.assert_close(output(model, family), masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "t5"])
def test_only_activations_get_gradients_and_the_model_comes_back(family):
    model = FAMILIES[family].build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    asking = []

    def watch(*_):
        asking.append([n for n, p in model.named_parameters() if p.requires_grad or p.grad is not None])

    path = search_path(model, unit_groups(model), data(family), PathSearch(**QUICK), progress=watch)
    assert asking == [[]] * QUICK["steps"]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [point["step"] for point in path.curve] == [1, 2, 3, 4, 5, 6]


def test_mask_gradients_are_those_of_the_loss():
    """Against central differences, in the model's own loss and in the distance to the dense model."""
    model = FAMILIES["llama"].build()
    batch = FAMILIES["llama"].batch()
    with Masks(model, unit_groups(model)) as masks:
        for kind in ("labels", "distill"):
            loss = search_loss(model, masks, batch, kind)
            masks.values[0].data.fill_(0.7)
            (grad,) = torch.autograd.grad(loss(batch), masks.values[:1])
            values = []
            for sign in (1, -1):
                masks.values[0].data[3] = 0.7 + sign * 1e-2
                values.append(float(loss(batch).detach()))
            masks.values[0].data.fill_(1.0)
            assert float(grad[3]) == pytest.approx((values[0] - values[1]) / 2e-2, rel=0.02, abs=1e-5)
        (at_one,) = torch.autograd.grad(loss(batch), masks.values[:1])
        assert float(loss(batch).detach()) == pytest.approx(0.0, abs=1e-6)
        assert float(at_one.abs().max()) < 1e-6


def test_refit_is_the_dense_weight_at_one_and_least_squares_at_zeros():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)).double()
    gram, weight = x.T @ x / 200, torch.randn(5, 12, generator=generator)
    refit = Refit(weight, gram, damping=1e-6)
    torch.testing.assert_close(refit(torch.ones(12)), weight)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0])
    kept = mask.bool()
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T.float()
    torch.testing.assert_close(refit(mask)[:, kept], expected, rtol=1e-3, atol=1e-3)
    assert not refit(mask)[:, ~kept].any()
    soft = torch.rand(12, generator=generator).double().requires_grad_()
    refit.diagonal, refit.others, refit.cross, refit.rms = (
        t.double() for t in (refit.diagonal, refit.others, refit.cross, refit.rms)
    )
    assert torch.autograd.gradcheck(refit, (soft,))
    assert torch.isfinite(refit(torch.full((12,), 1.5, dtype=torch.float64))).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "dinov2"])
def test_a_compensated_search_sees_what_slicing_and_refitting_give(family):
    model = FAMILIES[family].build()
    groups = unit_groups(model)
    readers = [g.members[-1].path for g in groups if g.members[-1].dim == 1]
    widths = {p: linears(model, groups)[p].in_features for p in readers}
    drawn = {p: torch.randn(300, n) @ torch.randn(n, n) for p, n in widths.items()}
    grams = {p: x.T @ x / 300 for p, x in drawn.items()}
    dense = output(model, family)
    with Masks(model, groups, grams=grams) as masks:
        torch.testing.assert_close(output(model, family), dense, rtol=1e-3, atol=1e-3)
        for value in masks.values:
            value.data[::3] = 0.0
        masked = output(model, family)
    assert torch.equal(output(model, family), dense)
    kept = {g.name: torch.tensor([i for i in range(g.count) if i % 3]) for g in groups}
    own = {p: replace(x, gram=grams.get(p)) for p, x in linears(model, groups).items()}
    result = slice_units(own, groups, kept, damping=1e-3)
    apply_(model, Plan(result.edits), result.tensors)
    plain = (masked - dense).norm()
    assert (output(model, family) - masked).norm() < 0.05 * plain  # the damping differs
    path = search_path(FAMILIES[family].build(), groups, data(family), PathSearch(**QUICK, compensate=True))
    assert all(bool(torch.isfinite(t).all()) for t in path.tie.values())


def test_a_warm_start_gives_the_order_of_the_predicted_losses_where_nothing_else_speaks():
    model = FAMILIES["gpt2"].build().eval()
    groups = unit_groups(model)
    config = PathSearch(**QUICK, warm=1.0, lr=1e-6)
    searched = search_path(model, groups, data("gpt2"), config)
    at_once = search_path(model, groups, data("gpt2"), PathSearch(steps=0))
    place = places(at_once.tie)
    assert sorted(torch.cat(list(place.values())).tolist())[-1] == 1.0
    for group in groups:
        kept = [[unit for name, unit in p.ranking(groups) if name == group.name] for p in (searched, at_once)]
        assert len(set(kept[0][:8]) & set(kept[1][:8])) >= 6  # kappa M pulls a little, too


def dead_units(model):
    """Neurons 0, 2, 4, ... of every feed-forward sublayer, made useless."""
    with torch.no_grad():
        for block in spec_of(model).blocks:
            model.get_submodule(block.ffn.down).weight[:, ::2] = 0.0
    return [g for g in unit_groups(model) if g.kind == "ffn"]


def test_coupled_search_finds_dead_units_and_the_released_form_does_not():
    """Where the loss is stationary at M = 1, the released form lets all units enter at the same step."""
    model = FAMILIES["llama"].build()
    groups = dead_units(model)
    options = {"steps": 40, "samples": 4, "length": 9, "rise": 0.02, "loss": "distill"}
    path = search_path(model, groups, data("llama"), PathSearch(**options, warm=0.0))
    kept = path.kept(groups, 0.5, round_to=1)
    assert all(units.tolist() == list(range(1, WIDTH, 2)) for units in kept.values())
    assert bool(torch.cat([path.entry[g.name][::2] for g in groups]).eq(-1).all())
    released = search_path(model, groups, data("llama"), PathSearch(**options, coupled=False, warm=0.0))
    assert len(torch.cat(list(released.entry.values())).unique()) == 1


def test_shared_masks_and_head_prox():
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    shared = search_path(model, groups, data("llama"), PathSearch(**QUICK, per_head=False))
    together = search_path(
        model, groups, data("llama"), PathSearch(steps=30, samples=2, length=9, prox="head", threshold=0.3, rise=0.1)
    )
    for group in groups:
        if group.kind != "ffn":
            first, second = shared.tie[group.name].chunk(2)
            assert torch.equal(first, second)
        for head in together.entry[group.name].chunk(group.heads):
            assert len(set(head.tolist())) == 1
    assert any(bool((entry >= 0).any()) for entry in together.entry.values())


def test_sgd_takes_its_step_from_the_lipschitz_constant_and_the_objective_decreases():
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    config = PathSearch(steps=25, samples=4, length=9, direction="sgd", beta=0.0)
    path = search_path(model, groups, [FAMILIES["llama"].batch(0)], config)
    objectives = [point["objective"] for point in path.curve]
    assert path.config["lr"] < 1.0
    assert all(after <= before + 1e-5 for before, after in itertools.pairwise(objectives))


JOB = """
import sys, json
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from conftest import FAMILIES
from tinycomp.models import unit_groups
from tinycomp.train.path_search import PathSearch, search_path
from tinycomp.train.unit_loss import places
folder, wait = Path(sys.argv[1]), float(sys.argv[2])
def progress(_, done, total, note):
    print(done, flush=True)
    if done == 13 and wait:
        import time; time.sleep(wait)
model = FAMILIES["llama"].build()
config = PathSearch(steps=24, samples=2, length=9, checkpoint_every=5, **json.loads(sys.argv[3]))
data = [FAMILIES["llama"].batch(s) for s in range(4)]
path = search_path(model, unit_groups(model), data, config, folder=folder, progress=progress)
path.save(folder / "path.safetensors")
"""


SEARCHES = [
    {"dual": "nesterov"},
    {"dual": "adam", "prox": "head"},
    {"warm": 0.8, "compensate": True},
    {"preset": "paper"},
]


@pytest.mark.parametrize("fields", SEARCHES, ids=lambda f: "-".join(map(str, f)))
def test_a_killed_search_continues_to_the_identical_path(fields, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}

    def start(folder, wait):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(script), str(folder), str(wait), json.dumps(fields)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process, other = start(killed, 300), start(whole, 0)
    deadline = time.time() + 300
    for line in process.stdout:
        if int(line) == 13 or time.time() > deadline:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "path.safetensors").exists()
    again = start(killed, 0)
    steps = again.communicate(timeout=300)[0].split()
    assert steps[0] == "11"  # after the checkpoint of step 10
    assert (again.returncode, other.wait(timeout=300)) == (0, 0)
    other.stdout.close()
    process.stdout.close()
    assert (killed / "path.safetensors").read_bytes() == (whole / "path.safetensors").read_bytes()


def test_a_continued_search_predicts_no_losses_again(tmp_path, monkeypatch):
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    whole = search_path(model, groups, data("llama"), PathSearch(**QUICK), folder=tmp_path)
    monkeypatch.setattr("tinycomp.train.path_search.unit_losses", None)  # a call would fail
    again = search_path(model, groups, data("llama"), PathSearch(**QUICK), folder=tmp_path)
    assert all(torch.equal(again.entry[name], whole.entry[name]) for name in whole.entry)
    assert all(torch.equal(again.tie[name], whole.tie[name]) for name in whole.tie)


def test_a_released_search_too_short_for_its_threshold_warns():
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    with pytest.warns(UserWarning, match=r"4 steps of lr=0\.001 .* no unit enters.* needs about 3000 steps"):
        path = search_path(model, groups, data("llama"), PathSearch(preset="paper", steps=4, samples=2, length=9))
    assert all(int(entry.max()) == -1 for entry in path.entry.values())
    assert len({float(v) for tie in path.tie.values() for v in tie}) > 1


def test_checkpoint_of_another_search_is_refused(tmp_path):
    model = FAMILIES["llama"].build()
    groups = unit_groups(model)
    search_path(model, groups, data("llama"), PathSearch(**QUICK), folder=tmp_path)
    with pytest.raises(ValueError, match="belongs to another search"):
        search_path(model, groups, data("llama"), PathSearch(**QUICK, rise=2.0), folder=tmp_path)


def test_nan_names_step_layer_and_remedy():
    model = FAMILIES["llama"].build()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"at step 1, first in model.layers.1; .*Lower lr \(0.\d+\)"):
        search_path(model, unit_groups(model), data("llama"), PathSearch(**QUICK, warm=0.0))
    with pytest.raises(ValueError, match=r"before the first step, first in model.layers.1; .*that layer's weights"):
        search_path(model, unit_groups(model), data("llama"), PathSearch(**QUICK))


def test_an_interrupted_search_leaves_the_model_as_it_was():
    model = FAMILIES["llama"].build()
    before = output(model, "llama")

    def stop(_, done, *__):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_path(model, unit_groups(model), data("llama"), PathSearch(**QUICK), progress=stop)
    assert torch.equal(output(model, "llama"), before)
    assert all(p.requires_grad for p in model.parameters())


def test_long_samples_are_cut_and_every_sample_is_drawn_once_an_epoch():
    ids = torch.arange(40).view(2, 20)
    rows = path_search._rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 8)
    assert [r["input_ids"].tolist() for r in rows] == [list(range(s, s + 8)) for s in (0, 8, 20, 28)]
    padded = path_search._rows(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids).index_fill(1, torch.tensor([19]), 0)}, 8
    )
    assert [len(r["input_ids"]) for r in padded] == [20, 20]
