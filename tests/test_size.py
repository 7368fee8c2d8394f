"""Sizes, FLOPs and coverage against answers computed by hand."""

from __future__ import annotations

import pytest
import torch
from tiny_models import counted_bert, counted_llama, counted_t5
from torch import nn
from transformers import (
    ViTConfig,
    ViTModel,
)

from tinycomp import ops
from tinycomp.eval.size import bytes_in_memory, bytes_on_disk, bytes_per_token, coverage, flops_per_token, size_of
from tinycomp.layers import LowRankLinear, QuantLinear

BLOCK = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 32 * 48  # q, o; k, v; gate, up, down
EMBEDDING, NORMS = 97 * 32, 5 * 32


def test_size_of_a_tied_model_by_hand():
    model = counted_llama()
    size = size_of(model)
    assert size.linear_parameters == 2 * BLOCK
    assert size.parameters == 2 * BLOCK + EMBEDDING + NORMS  # the head is the embedding
    assert size.bytes_memory == 4 * size.parameters  # rotary tables are not persistent
    attention = 2 * 2 * 4 * 8  # scores and values of one token, per block
    assert size.flops_per_token == 2 * (2 * BLOCK + EMBEDDING) + 2 * attention
    assert bytes_per_token(model) == size.bytes_memory
    untied = counted_llama(tie_word_embeddings=False)
    assert size_of(untied).parameters == size.parameters + EMBEDDING
    assert bytes_per_token(untied) == size_of(untied).bytes_memory - 4 * EMBEDDING  # one row of the table is read


def test_size_on_meta_equals_size_on_cpu():
    with torch.device("meta"):
        model = counted_llama()
    wanted = size_of(counted_llama(), flops=False)
    assert size_of(model, flops=False) == wanted
    assert wanted.flops_per_token is None


def test_size_of_a_compressed_model_by_hand():
    model = counted_llama()
    dense = size_of(model)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.up_proj = LowRankLinear(32, 48, rank=8, bias=False, pivoted=True)
    mlp.up_proj.order.copy_(torch.randperm(48))
    attention.q_proj = QuantLinear.from_linear(attention.q_proj, bits=4, group_size=16)
    stored = 8 * (32 + 48 - 8)
    size = size_of(model)
    scales = 32 * 2
    assert dense.linear_parameters - size.linear_parameters == 32 * 48 - stored - scales
    assert dense.parameters - size.parameters == 32 * 48 - stored - scales
    saved = 4 * (32 * 48 - stored) - 4 * 48 + 4 * 32 * 32 - 32 * 16 - 4 * scales  # order int32; two codes a byte
    assert dense.bytes_memory - size.bytes_memory == saved
    assert dense.flops_per_token - size.flops_per_token == 2 * (32 * 48 - stored)
    with ops.use_backend("torch"):
        assert size_of(model).flops_per_token == size.flops_per_token


def test_views_overlaps_and_ties_count_once():
    base = torch.zeros(100)
    assert bytes_in_memory([base, base]) == 400
    assert bytes_in_memory([base[:60], base[40:]]) == 400
    assert bytes_in_memory([base[:10], base[90:]]) == 80
    assert bytes_in_memory([base.view(10, 10)[:, :4], torch.zeros(0)]) == 4 * 94
    assert bytes_in_memory([base, torch.zeros(3, dtype=torch.int8)]) == 403


def test_bytes_on_disk(tmp_path):
    model = counted_llama()
    model.save_pretrained(tmp_path)
    size = size_of(model, tmp_path, flops=False)
    assert size.bytes_disk == (tmp_path / "model.safetensors").stat().st_size
    assert size.bytes_memory < size.bytes_disk < size.bytes_memory + 8192
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        bytes_on_disk(tmp_path / "empty")


def test_flops_of_encoders_images_and_encoder_decoders():
    tokens = 128
    block = 4 * 16 * 16 + 2 * 16 * 24
    pooled = 2 * 16 * 16  # once for the whole sequence
    scores = 2 * 2 * tokens * 16
    assert flops_per_token(counted_bert()) == 2 * (2 * block + scores) + pooled // tokens
    vit = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    patches = 2 * 4 * 16 * 16  # four patches of 4 x 4 pixels
    total = patches + 5 * 2 * block + 2 * 2 * 5 * 5 * 16
    assert flops_per_token(ViTModel(vit, add_pooling_layer=False).eval()) == total // 5
    t5 = counted_t5()
    per_side = 4 * 16 * 16 + 2 * 16 * 24
    expected = 2 * (per_side + per_side + 4 * 16 * 16 + 16 * 50) + 3 * (2 * 2 * 16)
    assert flops_per_token(t5) == expected
    assert (
        flops_per_token(
            t5, {"input_ids": torch.ones(1, 1, dtype=torch.int64), "decoder_input_ids": torch.ones(1, 1).long()}
        )
        == expected
    )
    with pytest.raises(ValueError, match="pass batch="):
        flops_per_token(nn.Linear(2, 2))


def test_coverage_by_class():
    model = counted_llama()
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 48, rank=8, bias=False)
    found = coverage(model, touched=["model.layers.0.mlp.gate_proj"])
    rows = {(row["module"], row["touched"]): row for row in found["classes"]}
    assert rows["LowRankLinear", True] == {
        "module": "LowRankLinear",
        "touched": True,
        "modules": 1,
        "bytes": 4 * 8 * 80,
    }
    assert rows["Linear", True]["bytes"] == 4 * 32 * 48
    assert rows["Linear", False]["modules"] == 12
    assert rows["Embedding", False]["bytes"] == 4 * EMBEDDING  # and not again as the tied head
    assert found["touched_bytes"] == 4 * (8 * 80 + 32 * 48)
    assert found["touched_bytes"] + found["untouched_bytes"] == size_of(model, flops=False).bytes_memory
