"""Every architecture of the table, compressed, saved and loaded: bit-equal logits, equal files, no byte too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    check_round_trip,
    drop_one,
    is_plain,
    narrow_all,
    reload,
    replace_some,
)
from conftest import BLOCKS, FAMILIES, OTHERS, output

from tinycomp.edits import Drop
from tinycomp.hf import plan_of
from tinycomp.layers import CompressedLinear
from tinycomp.models import spec_of


@pytest.mark.parametrize("family", FAMILIES)
def test_replacements_narrow_layers_and_dropped_blocks_round_trip(
    family: str, tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    before = output(model, family)
    if family != "albert":
        drop_one(model)
    narrow_all(model, (30, 40, 30, 40, 25))
    replace_some(model)
    assert not torch.equal(output(model, family), before)
    loaded = check_round_trip(model, family, tmp_path)
    assert not is_plain(tmp_path / "first")
    plan = plan_of(loaded)
    assert plan == plan_of(model)
    assert plan is not None
    assert all(edit.in_config == isinstance(edit, Drop) for edit in plan.edits if family != "albert")
    spec = spec_of(loaded)
    assert spec.has_row
    assert len(spec.stacks[-1].blocks) == (1 if family == "albert" else BLOCKS - 1)
    assert {type(m).__name__ for m in loaded.modules() if isinstance(m, CompressedLinear)} >= {"LowRankLinear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_results_are_plain_models(family: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    before = sum(p.numel() for p in model.parameters())
    if family != "albert":
        drop_one(model)
    if family != "dinov2":  # its config has an integer mlp_ratio instead of a width
        narrow_all(model, (32,))
    assert plan_of(model) is None
    assert sum(p.numel() for p in model.parameters()) < before
    check_round_trip(model, family, tmp_path)
    assert is_plain(tmp_path / "first")
    assert "quantization_config" not in json.loads((tmp_path / "first" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit", *OTHERS])
def test_half_precision_round_trip(family: str, dtype: torch.dtype, tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny(family).to(dtype).save_pretrained(tmp_path / "start")
    model = reload(family, tmp_path / "start")  # `.to` casts rotary tables, which loading keeps in float32
    if family == "t5" and dtype == torch.float16:
        assert {p.dtype for n, p in model.named_parameters() if ".wo." in n} == {torch.float32}
    replace_some(model)
    loaded = check_round_trip(model, family, tmp_path)
    assert loaded.dtype == dtype


@pytest.mark.parametrize("family", OTHERS)
def test_architectures_without_a_row_round_trip(family: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    before = output(model, family)
    replace_some(model, step=2)
    assert not torch.equal(output(model, family), before)
    check_round_trip(model, family, tmp_path)
    assert not is_plain(tmp_path / "first")
