"""One checkpoint, every ratio: prefixes equal exports, files, memory, generation, the compiler, the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import check_round_trip, is_plain, reload, stored_bytes
from command_line import run
from conftest import FAMILIES, output
from unit_models import masked, random_path

import tinycomp as tc
from tinycomp.elastic import size_at
from tinycomp.eval.size import size_of
from tinycomp.hf import plan_of
from tinycomp.layers import elastic_layers

RATIOS = (0.4, 1.0)


def invoke(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def elastic(model: Any, **options: Any) -> tc.UnitPath:
    path = random_path(tc.unit_groups(model))
    tc.make_elastic_(model, path, round_to=4, **options)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_every_ratio_is_the_masked_and_the_exported_model(family: str, tiny: Callable[..., Any]) -> None:
    model = tiny(family)
    dense = output(model, family)
    groups = tc.unit_groups(model)
    path = random_path(groups)
    expected = []
    for ratio in RATIOS:
        with masked(model, groups, path.kept(groups, ratio, 4)):
            expected.append(output(model, family))
    tc.make_elastic_(model, path, round_to=4)
    for ratio, wanted in zip(RATIOS, expected, strict=True):
        tc.set_ratio_(model, ratio)
        torch.testing.assert_close(output(model, family), wanted, rtol=1e-5, atol=1e-5)
        exported = tc.export(model, ratio)
        torch.testing.assert_close(output(exported, family), output(model, family), rtol=1e-5, atol=1e-5)
        assert size_of(exported, flops=False).parameters == size_at(model, ratio)["parameters"]
    torch.testing.assert_close(output(model, family), dense, rtol=1e-5, atol=1e-5)
    assert plan_of(exported) is None  # ratio 1 is the model it was
    assert not torch.allclose(expected[0], dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "albert", "dinov2", "t5", "marian"])
def test_files_round_trip_and_the_ratio_travels(family: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    elastic(model)
    loaded = check_round_trip(model, family, tmp_path)
    assert loaded.config.ratio == 1.0
    tc.set_ratio_(model, 0.4)
    smaller = reload(family, tmp_path / "first", ratio=0.4)
    assert torch.equal(output(smaller, family), output(model, family))
    smaller.save_pretrained(tmp_path / "smaller")
    assert json.loads((tmp_path / "smaller" / "config.json").read_text())["ratio"] == 0.4
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "smaller")]
    assert weights[0] == weights[1]


def test_memory_is_that_of_the_largest_and_prefixes_are_views(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    dense = size_of(model, flops=False)
    elastic(model)
    layers = elastic_layers(model).values()
    indices = sum(b.nbytes for layer in layers for b in layer.buffers() if not b.is_floating_point())
    assert size_of(model, flops=False).bytes_memory == dense.bytes_memory + indices
    assert size_of(model, flops=False).parameters == dense.parameters
    storages = {id(layer): layer.full.weight.data_ptr() for layer in layers}
    for ratio in (0.2, 0.9):
        tc.set_ratio_(model, ratio)
        assert {id(layer): layer.full.weight.data_ptr() for layer in layers} == storages
        for layer in layers:
            rows, columns = layer.active_out, layer.active_in
            assert layer.full.weight[:rows, :columns].untyped_storage()._cdata == (
                layer.full.weight.untyped_storage()._cdata
            )
        assert any(layer.active_out < layer.out_features for layer in layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "dinov2", "t5"])
def test_uniform_feed_forward_exports_are_plain(family: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    groups = [group for group in tc.unit_groups(model) if group.kind == "ffn"]
    tc.make_elastic_(model, random_path(groups), groups=groups, uniform=True)
    tc.set_ratio_(model, 0.5)
    exported = tc.export(model)
    torch.testing.assert_close(output(exported, family), output(model, family), rtol=1e-5, atol=1e-5)
    check_round_trip(exported, family, tmp_path)
    assert is_plain(tmp_path / "first") == (family != "dinov2")  # its config has no width
    assert not hasattr(exported.config, "ratio")
    assert stored_bytes(tmp_path / "first") == size_at(model)["bytes"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "marian", "albert"])
def test_exports_of_all_kinds_round_trip_with_the_predicted_bytes(
    family: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    elastic(model)
    planned = size_at(model, 0.5)
    assert planned["ratio"] == pytest.approx(0.5, abs=0.03)
    check_round_trip(tc.export(model, 0.5), family, tmp_path)
    assert stored_bytes(tmp_path / "first") == planned["bytes"]
    assert not is_plain(tmp_path / "first")
    assert model.config.ratio == 1.0


def test_refit_export_is_closer_than_the_prefix(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    dense = output(model, "llama")
    elastic(model)
    batches = [FAMILIES["llama"].batch(seed) for seed in range(20)]
    refit = tc.export(model, 0.6, batches, refit=True, progress=False)
    errors = [float((output(m, "llama") - dense).norm()) for m in (refit, tc.export(model, 0.6))]
    assert errors[0] < 0.95 * errors[1]


def test_a_model_that_is_compressed_already_keeps_its_edits(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    tc.compress_(model, tc.SVD(ratio=0.5, targets=("re:.*0.mlp.up_proj",)), [FAMILIES["llama"].batch()], progress=False)
    elastic(model)
    loaded = check_round_trip(model, "llama", tmp_path)
    tc.set_ratio_(loaded, 0.5)
    exported = tc.export(loaded)
    assert type(exported.model.layers[0].mlp.up_proj).__name__ == "LowRankLinear"
    torch.testing.assert_close(output(exported, "llama"), output(loaded, "llama"), rtol=1e-5, atol=1e-5)
    check_round_trip(exported, "llama", tmp_path / "exported")


def test_half_precision_keeps_the_order(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    elastic(model)
    model.save_pretrained(tmp_path)
    half = reload("llama", tmp_path, dtype=torch.bfloat16, ratio=0.5)
    tc.set_ratio_(model, 0.5)
    sizes = [[(x.active_in, x.active_out) for x in elastic_layers(m).values()] for m in (half, model)]
    assert sizes[0] == sizes[1]
    torch.testing.assert_close(output(half, "llama").float(), output(model, "llama"), rtol=0.1, atol=0.1)
    assert torch.equal(output(tc.export(half), "llama"), output(half, "llama"))


def test_generation_and_gradients(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    elastic(model)
    tc.set_ratio_(model, 0.5)
    exported = tc.export(model)
    prompt = torch.arange(3, 9)[None]
    tokens = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, exported)]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (1, 12)
    model(prompt, labels=prompt).loss.backward()
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.full.weight.grad[: layer.active_out].abs().sum() > 0
    assert layer.full.weight.grad[layer.active_out :].abs().sum() == 0


def test_compiles_whole_at_a_fixed_ratio(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", num_hidden_layers=1)
    elastic(model)
    tc.set_ratio_(model, 0.5)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.fixture
def folders(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A dense model folder and an elastic one."""
    random_path(tc.unit_groups(tc.load_model(folder)[0])).save(tmp_path / "path.safetensors")
    out = tmp_path / "elastic"
    code, result = invoke("elastic", folder, "--path", tmp_path / "path.safetensors", "--output-dir", out)
    assert (code, result["plain"]) == (0, False)
    return folder, out


def test_command_writes_a_model_of_the_predicted_size(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, source = folders
    out = tmp_path / "half"
    code, result = invoke("export", source, "--ratio", "0.5", "--output-dir", out)
    assert code == 0
    assert result["bytes_predicted"] == result["bytes_tensors"] == stored_bytes(out)
    assert result["plain"] is False
    assert result["report"]["ratio_achieved"] == pytest.approx(0.5, abs=0.03)
    model, tokenizer = tc.load_model(out)
    expected, _ = tc.load_model(source)
    tc.set_ratio_(expected, 0.5)
    ids = tokenizer("the union", return_tensors="pt").input_ids
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    code, result = invoke("inspect", out)
    assert code == 0
    assert {m["layer"] for m in result["modules"] if m["op"] == "replace"} == {"ElasticLinear"}


def test_uniform_feed_forward_command_leads_to_plain_exports(folder: Path, tmp_path: Path) -> None:
    random_path(tc.unit_groups(tc.load_model(folder)[0])).save(tmp_path / "path")
    options = ("--uniform", "--ffn-only", "--round-to", "16")
    code, _ = invoke("elastic", folder, "--path", tmp_path / "path", "--output-dir", tmp_path / "elastic", *options)
    assert code == 0
    code, result = invoke("export", tmp_path / "elastic", "--ratio", "0.5", "--output-dir", tmp_path / "half")
    assert (code, result["plain"], is_plain(tmp_path / "half")) == (0, True, True)
    assert tc.load_model(tmp_path / "half")[0].config.intermediate_size == 64


def test_command_refuses_clearly(folders: tuple[Path, Path], tmp_path: Path) -> None:
    dense, source = folders
    out = tmp_path / "out"
    code, result = invoke("export", source, "--ratio", "1.5", "--output-dir", out)
    assert (code, "allowed above 0 up to 1" in result["error"]) == (2, True)
    code, result = invoke("export", dense, "--ratio", "0.5", "--output-dir", out)
    assert (code, "allowed elastic models; make one with make_elastic_" in result["error"]) == (3, True)
    code, result = invoke("export", source, "--ratio", "0.5", "--output-dir", source)
    assert (code, "is not empty" in result["error"]) == (3, True)
    code, result = invoke("elastic", dense, "--path", source / "model.safetensors", "--output-dir", out)
    assert (code, "is no path of a search" in result["error"]) == (3, True)
    assert not out.exists()


def test_refusals_leave_the_model_as_it_was(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    before = output(model, "llama")
    with pytest.raises(ValueError, match="of one size, allowed elastic models"):
        tc.set_ratio_(model, 0.5)
    for other in (tiny("llama", intermediate_size=40), tiny("bert")):
        with pytest.raises(ValueError, match="use the path of this model"):
            tc.make_elastic_(model, random_path(tc.unit_groups(other)))
    assert torch.equal(output(model, "llama"), before)
    elastic(model)
    for ratio in (0, 1.1, True, "0.5"):
        with pytest.raises(ValueError, match="allowed above 0 up to 1"):
            tc.set_ratio_(model, ratio)
