"""Every architecture through the whole of it: compress, save, load in the auto class, equal outputs, generate.

Methods and dtypes rotate, so that each architecture meets some and each method meets all kinds of architecture.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import reload
from conftest import FAMILIES, OTHERS

import tinycomp as tc
from tinycomp.errors import UsageError

METHODS = {
    "svd": tc.SVD(ratio=0.7),
    "int8": tc.Rounding(bits=8),
    "cur": tc.CUR(ratio=0.7),
    "width": tc.WidthPrune(ratio=0.6),
    "swsc": tc.SWSC(ratio=0.7, iterations=2),
}
DTYPES = cycle([torch.float32, torch.bfloat16, torch.float16])
CASES = [
    (family, method, dtype)
    for family, method, dtype in zip(FAMILIES | OTHERS, cycle(METHODS), DTYPES, strict=False)
    if method != "width" or family in FAMILIES
]
WITHOUT_A_ROW = [
    (family, method, dtype) for family in OTHERS for method, dtype in (("svd", next(DTYPES)), ("int8", next(DTYPES)))
]


@pytest.mark.parametrize(("family", "method", "dtype"), [*CASES, *WITHOUT_A_ROW], ids=str)
def test_compressed_saved_and_loaded(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind = (FAMILIES | OTHERS)[family]
    kind.build().to(dtype).save_pretrained(tmp_path / "dense")
    model = reload(family, tmp_path / "dense").eval()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in kind.batch().items()}
    before = run(model, batch)
    report = tc.compress_(model, METHODS[method], [batch], progress=False)
    assert report.records
    model.save_pretrained(tmp_path / "small")
    loaded = reload(family, tmp_path / "small").eval()
    assert torch.equal(run(loaded, batch), run(model, batch))
    assert not torch.equal(run(model, batch), before)
    if model.can_generate():
        prompt = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
        tokens = [m.generate(**prompt, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
        assert torch.equal(*tokens)


def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[0]


@pytest.mark.parametrize("family", OTHERS)
def test_structural_methods_say_how_to_add_a_row(family: str) -> None:
    kind = OTHERS[family]
    with pytest.raises(UsageError, match=r"has no row .* add one to tinycomp/models/table\.py"):
        tc.compress_(kind.build(), METHODS["width"], [kind.batch()], progress=False)
