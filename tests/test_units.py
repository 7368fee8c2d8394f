"""Units of every architecture: a mask at the named places is the sliced network; ranking, rounding, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, OTHERS, output
from unit_models import linears_of, masked, random_path

from tinycomp.edits import Plan, Replace, Slice
from tinycomp.hf import edit_
from tinycomp.methods._slicing import slice_edits, slice_units, without_dead_heads
from tinycomp.models import UnitPath, unit_groups
from tinycomp.planning import after_edits
from tinycomp.surgery import apply_

EMPTY = {
    "qk": ("qk",), "v": ("v",), "ffn": ("ffn",), "attention": ("qk", "v"), "all": ("qk", "v", "ffn"),
}  # fmt: skip


def sliced(model: Any, groups: Any, kept: Any, **options: Any) -> Any:
    result = slice_units(linears_of(model, groups), groups, kept, **options)
    assert result.edits == slice_edits(groups, kept)
    edit_(model, [(Plan(result.edits), result.tensors)])
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_network_is_the_sliced_network(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    dense = output(model, family)
    groups = unit_groups(model)
    assert {g.kind for g in groups} == ({"v", "ffn"} if family == "qwen3" else {"qk", "v", "ffn"})
    kept = random_path(groups).kept(groups, 0.5, round_to=4)
    with masked(model, groups, kept):
        expected = output(model, family)
    planned = after_edits(model, slice_edits(groups, kept))
    before = sum(p.numel() for p in model.parameters())
    removed = sum((g.count - len(kept[g.name])) * g.parameters_per_unit for g in groups)
    sliced(model, groups, kept)
    torch.testing.assert_close(output(model, family), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, dense, rtol=1e-3, atol=1e-3)
    assert sum(p.numel() for p in model.parameters()) == before - removed
    stored = {t.data_ptr(): t for n, t in model.state_dict().items() if n not in model._keys_to_ignore_on_save}
    assert planned["bytes"] == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_empty_groups(family: str, empty: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    groups = unit_groups(model)
    kept = random_path(groups).kept(groups, 0.7, round_to=1)
    kept |= {g.name: torch.zeros(0, dtype=torch.int64) for g in groups if g.kind in EMPTY[empty] and ".1." in g.name}
    with masked(model, groups, kept):
        expected = output(model, family)
    sliced(model, groups, kept)
    torch.testing.assert_close(output(model, family), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["head", "layer"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert", "vit", "marian", "t5"])
def test_heads_without_values_lose_their_queries_and_keys(family: str, whole: bool, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    groups = unit_groups(model)
    kept = random_path(groups).kept(groups, 0.7, round_to=1)
    heads = {}
    for group in (g for g in groups if g.kind == "v"):
        heads[group.name] = group.heads if whole else 1
        kept[group.name] = kept[group.name][kept[group.name] >= heads[group.name] * group.count // group.heads]
    left = without_dead_heads(groups, kept)
    with masked(model, groups, kept):
        expected = output(model, family)
    planned = after_edits(model, slice_edits(groups, left))
    result = sliced(model, groups, left)
    torch.testing.assert_close(output(model, family), expected, rtol=1e-5, atol=1e-5)
    for group in (g for g in groups if g.kind == "qk"):
        of_head, dead = group.count // group.heads, heads[group.name.removesuffix("qk") + "v"]
        assert left[group.name].tolist() == [u for u in kept[group.name].tolist() if u >= dead * of_head]
        (rows,) = {r["rows"] for r in result.records if r["path"] == group.members[1].path} or {None}
        if group.members[0].path != group.members[1].path:  # the keys of one head, none of a query head that is gone
            assert rows == len(left[group.name]) * group.members[1].features.shape[1]
    stored = {t.data_ptr(): t for n, t in model.state_dict().items() if n not in model._keys_to_ignore_on_save}
    assert planned["bytes"] == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "vit", "marian"])
def test_mask_gradient_is_exact(family: str, tiny: Callable[..., Any]) -> None:
    """Every place of `mask_at` exists, so a mask of ones changes nothing, and only the sliced sizes are left."""
    model = tiny(family)
    groups = unit_groups(model)
    everything = {g.name: torch.arange(g.count) for g in groups}
    dense = output(model, family)
    with masked(model, groups, everything):
        assert torch.equal(output(model, family), dense)
    assert slice_edits(groups, everything) == []


def test_only_feed_forward_cuts_are_plain_slices(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    groups = [g for g in unit_groups(model) if g.kind == "ffn"]
    kept = {g.name: torch.arange(16) for g in groups}
    result = sliced(model, groups, kept)
    assert {type(edit) for edit in result.edits} == {Slice}
    assert model.config.intermediate_size == 16
    assert not hasattr(model.config, "quantization_config")


def test_refit_lowers_the_error_that_the_record_states(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    groups = unit_groups(model)
    kept = random_path(groups).kept(groups, 0.6)
    down = {g.members[-1].path for g in groups if g.members[-1].dim == 1}
    x = torch.randn(500, 48) @ torch.randn(48, 48)
    grams = {path: x[:, :n].T @ x[:, :n] / 500 for path in down for n in [model.get_submodule(path).weight.shape[1]]}
    linears = linears_of(model, groups, grams)
    refit, plain = (slice_units(linears, groups, kept, refit=on).records for on in (True, False))
    pairs = [(a, b) for a, b in zip(refit, plain, strict=True) if b["relative_error"] > 0]
    assert {a["path"] for a, _ in pairs} <= down
    assert len(pairs) > 3
    assert all(a["relative_error"] < 0.99 * b["relative_error"] for a, b in pairs)
    assert all(a["size_after"] == a["rows"] * a["columns"] for a in refit)


def test_released_scale_divides_by_the_root_of_the_kept_width(tiny: Callable[..., Any]) -> None:
    model = tiny("bert")
    groups = [g for g in unit_groups(model) if g.name.endswith("layer.0.qk")]
    kept = {groups[0].name: torch.tensor([0, 1, 8, 16, 17, 18, 19, 24])}  # 2, 1, 4, 1 of 8 in each head
    linears = linears_of(model, groups)
    path = groups[0].members[0].path
    scaled, plain = (
        slice_units(linears, groups, kept, released_scale=on).tensors[f"{path}.full.weight"] for on in (True, False)
    )
    factors = torch.tensor([4.0, 4, 8, 2, 2, 2, 2, 8]).sqrt()
    torch.testing.assert_close(scaled, plain * factors[:, None])


def test_partial_rotary_pairs_cover_every_feature_once() -> None:
    from tinycomp.models.units import _head_features, _together

    together = _together(16, 8)
    assert together[:4].tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert sorted(together.flatten().tolist()) == list(range(16))
    queries = _head_features(together, kv_heads=2, repeats=3, head_dim=16)
    assert sorted(queries.flatten().tolist()) == list(range(96))
    assert queries[8].tolist() == [48, 52, 64, 68, 80, 84]  # first unit of the second key/value head


def test_ranking_prefers_early_entry_then_larger_tie_per_parameter(tiny: Callable[..., Any]) -> None:
    groups = unit_groups(tiny("llama"))[:3]
    qk, v, ffn = groups
    path = UnitPath.from_scores({g.name: torch.zeros(g.count) for g in groups})
    path.entry[qk.name][2], path.entry[v.name][5], path.entry[v.name][6] = 3, 3, 3
    path.tie[v.name][6] = 1.0
    path.tie[ffn.name][7] = 9.0
    by_step = path.ranking(groups, cost=None)
    assert by_step[:4] == [(v.name, 6), (qk.name, 2), (v.name, 5), (ffn.name, 7)]
    assert len(set(by_step)) == qk.count + v.count + ffn.count
    assert path.ranking(groups)[:4] == [(v.name, 6), (v.name, 5), (qk.name, 2), (ffn.name, 7)]  # 96, 96, 192 weights
    assert path.ranking(groups, {"qk": 1.0, "v": 5.0, "ffn": 1.0})[:2] == [(qk.name, 2), (v.name, 6)]
    path = UnitPath.from_scores({g.name: torch.full((g.count,), -1.0) for g in groups})
    names = dict.fromkeys(name for name, _ in path.ranking(groups, {"qk": 3.0, "v": 2.0, "ffn": 1.0}))
    assert list(names) == [ffn.name, v.name, qk.name]  # the cheaper first, where ties are below zero too


@pytest.mark.parametrize("uniform", [False, True])
def test_kept_sets_grow_with_the_ratio_and_meet_it(uniform: bool, tiny: Callable[..., Any]) -> None:
    groups = unit_groups(tiny("llama"))
    path = random_path(groups, seed=3)
    total = sum(g.count * g.parameters_per_unit for g in groups)
    before: dict[str, set[int]] = {g.name: set() for g in groups}
    for ratio in (0.05, 0.3, 0.5, 0.7, 0.95, 1.0):
        kept = path.kept(groups, ratio, 8, uniform)
        size = sum(len(kept[g.name]) * g.parameters_per_unit for g in groups)
        step = 3 if uniform else 1  # a step of all three blocks at once
        assert abs(size / total - ratio) <= step * 8 * 96 / total / 2 + 1e-9
        for group in groups:
            units = kept[group.name].tolist()
            assert units == sorted(units)
            assert before[group.name] <= set(units)
            assert len(units) % group.step(8) == 0
            before[group.name] = set(units)
        if uniform:
            assert all(len({len(kept[g.name]) for g in groups if g.kind == k}) == 1 for k in ("qk", "v", "ffn"))


@pytest.mark.parametrize(("ratio", "millions"), [(0.75, 16.73), (0.70, 15.67)])
def test_deit_small_sizes(ratio: float, millions: float) -> None:
    from transformers import DeiTConfig, DeiTForImageClassification

    config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    with torch.device("meta"):
        model = DeiTForImageClassification(config)
    groups = unit_groups(model)
    assert sum(g.count for g in groups) == 12 * (6 * 2 * 64 + 1536)
    distilled = 384 + 384  # DeiT's distillation token and its position, which the classifier without it does not need
    for uniform in (False, True):
        kept = random_path(groups).kept(groups, ratio, 1, uniform)
        found = after_edits(model, slice_edits(groups, kept))["parameters"]
        assert round((found - distilled) / 1e6, 2) == millions


def test_file_round_trip(tiny: Callable[..., Any], tmp_path: Path) -> None:
    groups = unit_groups(tiny("gpt2"))
    path = random_path(groups)
    path.curve, path.config = [{"step": 1, "loss": 2.5}], {"nu": 10}
    path.save(tmp_path / "path.safetensors")
    again = UnitPath.load(tmp_path / "path.safetensors")
    assert (again.curve, again.config) == (path.curve, path.config)
    assert again.ranking(groups) == path.ranking(groups)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no path of a search"):
        UnitPath.load(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "path.safetensors").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"other\.safetensors, which cannot be read"):
        UnitPath.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="got absent, which cannot be read"):
        UnitPath.load("absent")


def test_refusals(tiny: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="has no row"):
        unit_groups(OTHERS["falcon"].build())
    groups = unit_groups(tiny("llama"))
    path = random_path(groups)
    with pytest.raises(ValueError, match="got ratio 0, allowed above 0 up to 1"):
        path.kept(groups, 0)
    del path.tie[groups[1].name]
    with pytest.raises(ValueError, match=r"has \[16, None\] entries and ties for model.layers.0.v, allowed 16"):
        path.kept(groups, 0.5)
    with pytest.raises(ValueError, match=r"got no linear for model\.layers\.0\.self_attn\.q_proj"):
        slice_units({}, groups, {groups[0].name: torch.arange(2)})


def test_linears_that_are_compressed_already_have_no_units(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    kwargs = {"in_features": 32, "out_features": 48, "bias": False, "rank": 4}
    up = "model.layers.0.mlp.up_proj"
    tensors = {f"{up}.down.weight": torch.zeros(4, 32), f"{up}.up.weight": torch.zeros(48, 4)}
    apply_(model, Plan([Replace(up, layer="LowRankLinear", kwargs=kwargs)]), tensors)
    assert [g.name for g in unit_groups(model)][:3] == ["model.layers.0.qk", "model.layers.0.v", "model.layers.1.qk"]
