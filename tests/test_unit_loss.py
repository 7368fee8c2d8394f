"""Predicted losses of units: the quadratic form, and what follows from it."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES
from test_path_search import data

from tinycomp.calib import collect
from tinycomp.models import spec_of, unit_groups
from tinycomp.train.path_search import PathSearch, search_path
from tinycomp.train.unit_loss import unit_losses


def test_predicted_losses_are_those_of_the_quadratic_form():
    """Removing one unit alone costs tr(G E S Eᵀ)/2, the others refit, or its rows zeroed where no linear reads it."""
    model = FAMILIES["llama"].build().eval()
    groups, batches = unit_groups(model), data("llama")
    found = unit_losses(model, groups, batches)
    paths = [m.path for g in groups for m in g.members]
    store = collect(model, spec_of(model), batches, frozenset({"gram", "output_gram"}), paths=paths)
    for group in (groups[0], next(g for g in groups if g.kind == "qk")):
        expected = []
        for member in group.members if group.kind == "qk" else group.members[-1:]:
            stats = store.get([member.path])[member.path]
            weight, s, g = model.get_submodule(member.path).weight.detach(), stats.gram, stats.output_gram
            s = s + 1e-4 * s.diagonal().mean() * torch.eye(len(s)) if group.kind != "qk" else s
            losses = []
            for features in member.features:
                error = torch.zeros_like(weight)
                if group.kind == "qk":
                    error[features] = weight[features]
                else:
                    kept = torch.tensor([i for i in range(weight.shape[1]) if i not in features])
                    error = weight.clone()
                    error[:, kept] -= torch.linalg.solve(s[kept][:, kept], (weight @ s[:, kept]).T).T
                losses.append(float((g @ error @ s * error).sum()) / 2)
            expected.append(torch.tensor(losses))
        wanted = torch.stack(expected).mean(0)
        if group.kind == "qk":
            assert torch.allclose(found[group.name], wanted, rtol=1e-3)
        else:  # the first to go costs exactly that; what goes later has lost neighbours that could stand in for it
            first = int(wanted.argmin())
            assert float(found[group.name][first]) == pytest.approx(float(wanted[first]), rel=1e-2)
            assert (found[group.name] >= wanted * 0.99).float().mean() > 0.9


def test_a_unit_that_does_nothing_goes_first():
    model = FAMILIES["llama"].build().eval()
    group = next(g for g in unit_groups(model) if g.kind == "ffn")
    with torch.no_grad():
        model.get_submodule(group.members[-1].path).weight[:, 3] = 0
    path = search_path(model, [group], data("llama"), PathSearch(steps=0))
    assert path.ranking([group])[-1] == (group.name, 3)
