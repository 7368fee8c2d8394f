"""Loading, saving, the journal and fingerprints, on tiny random models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from tiny_models import logits, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tinycomp.edits import Replace
from tinycomp.io import (
    Entry,
    Journal,
    check_output_dir,
    fingerprint,
    load_model,
    model_fingerprint,
    save_model,
)

# ---------------------------------------------------------------------------------------------------------------- load


def _vision(**_):
    return ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))


BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


@pytest.mark.parametrize(
    "build",
    [
        tiny_llama,
        lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
        lambda: BertModel(BertConfig(**BERT)),
        lambda: T5ForConditionalGeneration(T5Config(**T5)),
        _vision,
    ],
    ids=["causal", "classification", "base", "seq2seq", "vision"],
)
def test_folder_loads_as_the_class_its_config_names(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert tokenizer is None
    assert not loaded.training
    assert model_fingerprint(loaded) == model_fingerprint(model)


def test_stored_dtype_is_kept_and_can_be_changed(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


def test_model_object_is_passed_through():
    model = tiny_llama()
    assert load_model(model) == (model, None)


def test_weights_missing_from_the_checkpoint_are_an_error(tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lack 2 tensors.*classifier"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", ValueError, "empty model path"),
        ("nowhere/at/all", ValueError, "does not exist; allowed: a Hugging Face model folder, a .gguf file"),
        ("nowhere.gguf", ValueError, "there is no file nowhere.gguf"),
        (3, TypeError, "got int, allowed: a path"),
    ],
)
def test_bad_sources_say_what_is_allowed(source, error, message):
    with pytest.raises(error, match=message):
        load_model(source)


def test_folder_without_weights_or_config_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"reading its config\.json failed"):
        load_model(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path)


def test_unknown_class_in_the_config_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["NobodyForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="NobodyForCausalLM"):
        load_model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- save

REPORT = {"parameters_before": 1000, "parameters_after": 800, "ratio_requested": 0.8, "ratio_achieved": 0.8}
RECIPE = {"model": "org/name", "method_names": ["SVD"], "command": "tinycomp compress org/name --method svd"}


def test_output_is_a_model_folder_with_recipe_report_and_card(tmp_path):
    model = tiny_llama()
    path = save_model(model, None, tmp_path / "a" / "out", REPORT, RECIPE)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))
    assert yaml.safe_load((path / "tinycomp_recipe.yaml").read_text()) == RECIPE
    assert json.loads((path / "tinycomp_report.json").read_text()) == REPORT
    card = (path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/name"
    assert front["tags"] == ["tinycomp", "svd"]
    assert "| parameters after | 800 |" in card
    assert RECIPE["command"] in card
    assert os.listdir(tmp_path / "a") == ["out"]


def test_tokenizer_files_of_the_source_are_copied_unchanged(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "unrelated.bin"):
        (source / name).write_text('{"odd":   "spacing"}')
    out = save_model(tiny_llama(), None, tmp_path / "out", {}, {}, source=source)
    for name in ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json"):
        assert (out / name).read_text() == '{"odd":   "spacing"}'
    assert not (out / "unrelated.bin").exists()


def test_empty_folder_is_used_and_a_full_one_needs_force(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_model(tiny_llama(), None, out, {}, {})
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        save_model(tiny_llama(), None, out, {}, {})
    assert (out / "mine.txt").read_text() == "keep"
    save_model(tiny_llama(1), None, out, {}, {}, force=True)
    assert not (out / "mine.txt").exists()
    assert model_fingerprint(load_model(out)[0]) == model_fingerprint(tiny_llama(1))


def test_unwritable_output_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        check_output_dir(tmp_path / "file")
    with pytest.raises(RuntimeError, match="cannot write in"):
        check_output_dir(tmp_path / "file" / "below")
    with pytest.raises(RuntimeError, match="cannot write in /proc"):
        check_output_dir("/proc/tinycomp-output")


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr("tinycomp.io.save.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, None, tmp_path / "out", {}, {})
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- journal


def test_journal_returns_what_was_put(tmp_path):
    journal = Journal(tmp_path / "j", "abc")
    base = torch.arange(6.0)
    tensors = {"x": base.view(2, 3).T, "shared": base[2:], "empty": torch.zeros(0, dtype=torch.bfloat16)}
    edits = [Replace("model.layers.0", layer="LowRankLinear", kwargs={"rank": 3})]
    journal.put("block/0", Entry(edits, tensors, [{"path": "x", "relative_error": 0.5}], {"why": [1.5, None]}))
    assert journal.get("block/1") is None
    entry = Journal(tmp_path / "j", "abc").get("block/0")
    assert entry.edits == edits
    assert entry.records == [{"path": "x", "relative_error": 0.5}]
    assert entry.details == {"why": [1.5, None]}
    assert all(torch.equal(entry.tensors[name], tensors[name]) for name in tensors)
    assert journal.count() == 1


def test_journal_of_another_job_is_refused(tmp_path):
    Journal(tmp_path / "j", "abc")
    with pytest.raises(ValueError, match=r"another job \(fingerprint abc, this job is def"):
        Journal(tmp_path / "j", "def")


def test_keys_that_differ_only_in_punctuation_do_not_collide(tmp_path):
    journal = Journal(tmp_path / "j", "abc")
    journal.put("a/b", Entry(tensors={"x": torch.zeros(1)}))
    journal.put("a_b", Entry(tensors={"x": torch.ones(1)}))
    assert journal.get("a/b").tensors["x"].item() == 0
    assert journal.get("a_b").tensors["x"].item() == 1


WRITER = """
import sys, torch
from tinycomp.io.journal import Entry, Journal
journal = Journal(sys.argv[1], "job")
start = journal.count()
print("ready", start, flush=True)
for i in range(start, 100000):
    journal.put(str(i), Entry(tensors={"x": torch.full((200_000,), float(i))}, records=[{"i": i}]))
    print(i, flush=True)
"""


def test_killed_writer_leaves_only_whole_entries(tmp_path):
    """kill -9 at arbitrary instants, twice; the second start continues where the first one was killed."""
    committed = 0
    for round_ in range(2):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "j")], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline().split() == ["ready", str(committed)]
        for _ in range(5 + round_):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        journal = Journal(tmp_path / "j", "job")
        assert journal.count() >= committed + 5
        assert not list((tmp_path / "j").glob("*.tmp"))
        committed = journal.count()
        for i in range(committed):
            entry = journal.get(str(i))
            assert torch.equal(entry.tensors["x"], torch.full((200_000,), float(i)))
            assert entry.records == [{"i": i}]
    journal.delete()
    assert not (tmp_path / "j").exists()


# ---------------------------------------------------------------------------------------------------------- provenance


def test_fingerprint_sees_values_names_dtypes_and_shapes_but_not_key_order():
    x = torch.arange(6.0)
    same = fingerprint({"a": x, "b": 1})
    assert same == fingerprint({"b": 1, "a": x.clone()})
    others = [{"a": x + 1, "b": 1}, {"a": x.view(2, 3), "b": 1}, {"a": x.double(), "b": 1}, {"a": x, "c": 1}]
    prints = {same, *(fingerprint(other) for other in others)}
    assert len(prints) == 5
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(x.bfloat16()) != fingerprint(x.half())


def test_model_fingerprint_changes_with_one_weight():
    model = tiny_llama()
    before = model_fingerprint(model)
    assert before == model_fingerprint(tiny_llama())
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert model_fingerprint(model) != before
