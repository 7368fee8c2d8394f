"""A round trip of every real model at hand: compressed, saved, loaded by the stock class, equal bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import real_models
import torch
import transformers
from checkpoints import memory_bytes, stored_bytes

import tinycomp as tc
from tinycomp.models import spec_of

TOKENS = {"input_ids": torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))}
PIXELS = {"pixel_values": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(real_models.llama, TOKENS), (real_models.bert, TOKENS), (real_models.albert, TOKENS),
     (real_models.dinov2, PIXELS)],
    ids=["llama", "bert", "albert", "dinov2"],
)  # fmt: skip
@torch.no_grad()
def test_round_trip(make: Callable[[], Any], inputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = make().eval()
    spec = spec_of(model)
    assert spec.has_row
    dense = model(**inputs)[0]
    weights = {path: model.get_submodule(path).weight.detach() for path in spec.linears}
    report = tc.compress_(model, tc.SVD(ratio=0.8, weighting="none", allocation="uniform"), progress=False)
    assert {r["path"] for r in report.records} == set(spec.linears)
    stored = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, type(model).__name__.removeprefix("Tinycomp")).from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs)[0], stored)
    assert stored_bytes(tmp_path) == memory_bytes(loaded)
    for path, weight in weights.items():  # damaged, but its own in their places
        assert (loaded.get_submodule(path).dense_weight() - weight).norm() < 0.8 * weight.norm(), path
    assert not torch.equal(dense, stored)


def test_translator_with_a_decoder_of_its_own_goes_the_way_without_a_row() -> None:
    """No transformers model: every linear of its repeated blocks is fitted to real sentences; it still translates."""
    tokenizers = pytest.importorskip("tokenizers")
    model = real_models.marian()
    encode = tokenizers.Tokenizer.from_file(str(real_models.marian_folder() / "tokenizer.json")).encode
    text = " ".join(tc.data.calibration_text()[0][:20000].split())
    sentences = [encode(s).ids[:40] for s in text.split(". ")[1:25]]
    pairs = [(s, model.translate(s)) for s in sentences]
    assert sum(map(len, (t for _, t in pairs))) > 5 * len(pairs)
    data = [{"source": torch.tensor([[*s, 0]]), "target": torch.tensor([t])} for s, t in pairs[:16]]
    kept = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    report = tc.compress_(model, tc.CUR(ratio=0.9), data, progress=False)
    assert {r["path"] for r in report.records} <= set(kept)
    assert report.ratio_achieved <= 0.9
    same = total = 0
    for source, target in pairs[16:]:
        with torch.no_grad():
            found = model(torch.tensor([[*source, 0]]), torch.tensor([target]))[0, :-1].argmax(-1)
        same, total = same + int((found == torch.tensor(target)).sum()), total + len(target)
    assert same > 0.8 * total
