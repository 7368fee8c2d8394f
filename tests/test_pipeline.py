"""The pipeline end to end on tiny models: every method, planned bytes, atomicity, sequence, resume, composition."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, output
from safetensors import safe_open
from torch import nn

import tinycomp as tc
from tinycomp.errors import UsageError
from tinycomp.hf import plan_of
from tinycomp.io import Journal
from tinycomp.methods import METHODS

DATA = [{"input_ids": torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]
ONE_OF_EACH: dict[str, Any] = {
    "svd": tc.SVD(ratio=0.7),
    "svd-data-free": tc.SVD(ratio=0.7, weighting="none"),
    "svd-in-sequence": tc.SVD(ratio=0.7, sequential=True),
    "cur-rows": tc.CUR(ratio=0.7),
    "cur-in-sequence": tc.CUR(ratio=0.7, sequential=True),
    "width-in-sequence": tc.WidthPrune(ratio=0.6, sequential=True),
    "cur-folded": tc.CUR(ratio=0.7, form="cur", selection="sketch-qr"),
    "cur-paper": tc.CUR(preset="paper"),
    "cur-paper-ratio": tc.CUR(preset="paper", ratio=0.8),
    "swsc": tc.SWSC(ratio=0.7),
    "swsc-int8": tc.SWSC(ratio=0.7, factor_bits=8, scaled=True),
    "swsc-int4": tc.SWSC(ratio=0.7, factor_bits=4),
    "swsc-int8-inputs": tc.SWSC(clusters=6, rank=3, factor_bits=8, axis="input", activation_bits=8),
    "swsc-paper": tc.SWSC(preset="paper"),
    "width": tc.WidthPrune(ratio=0.6),
    "width-int8": tc.WidthPrune(ratio=0.6, bits=8),
    "width-int4-rounded-inputs": tc.WidthPrune(ratio=0.6, bits=4, activation_bits=8, sequential=True),
    "wanda": tc.Wanda(ratio=0.6),
    "wanda-masked": tc.Wanda(ratio=0.6, structured=False, guard_speed=False),
    "magnitude": tc.Magnitude(ratio=0.5),
    "random": tc.Random(ratio=0.5),
    "svd-int8": tc.SVD(ratio=0.7, bits=8),
    "svd-int4-rounded-inputs": tc.SVD(ratio=0.7, bits=4, activation_bits=8, pivoted=False),
    "cur-int8": tc.CUR(ratio=0.7, bits=8),
    "cur-folded-int4": tc.CUR(ratio=0.7, bits=4, form="cur", selection="sketch-qr"),
    "int8": tc.Rounding(bits=8),
    "int4": tc.Rounding(bits=4),
    "auto": tc.Auto(ratio=0.7, guard_speed=False, families=("svd", "cur", "widthprune")),
    "auto-bytes": tc.Auto(ratio=0.2, budget="bytes", guard_speed=False, families=("svd", "widthprune", "rounding")),
    "auto-bytes-int8": tc.Auto(ratio=0.35, budget="bytes", guard_speed=False),
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def stored_bytes(model: Any, folder: Path) -> int:
    """Bytes of all tensors after saving."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (not a mapping)


@pytest.mark.parametrize("name", sorted(ONE_OF_EACH))
def test_every_method_gives_the_planned_bytes_and_reloads(name: str, tmp_path: Path) -> None:
    model, config = FAMILIES["llama"].build(), ONE_OF_EACH[name]
    before = sum(p.numel() for p in model.parameters())
    planned = tc.plan(model, config, DATA, progress=False)
    report = tc.compress_(model, config, DATA, progress=False)
    assert report.parameters_before == before
    assert stored_bytes(model, tmp_path) == planned["bytes_after"] < planned["bytes_before"]
    if config.ratio is not None:
        assert report.ratio_achieved <= config.ratio + 1e-9 or "bytes" in report.allocation
    assert {r["path"] for r in report.records} | {s["path"] for s in report.skipped} >= {
        p for p, m in FAMILIES["llama"].build().named_modules() if isinstance(m, nn.Linear)
    }
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(reloaded, "llama"), output(model, "llama"))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_architecture_and_dtype(family: str, dtype: torch.dtype) -> None:
    model = FAMILIES[family].build().to(dtype)
    batch = FAMILIES[family].batch()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    report = tc.compress_(model, tc.SVD(ratio=0.6, sequential=True), [batch], progress=False)
    assert 0.3 < report.ratio_achieved <= 0.6
    with torch.no_grad():
        found = model(**batch)
    assert torch.isfinite(found[0].float()).all()
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"albert"}))
def test_width_pruning_of_every_architecture(family: str) -> None:
    model = FAMILIES[family].build()
    report = tc.compress_(model, tc.WidthPrune(ratio=0.5), [FAMILIES[family].batch()], progress=False)
    assert 0.2 < report.ratio_achieved <= 0.5
    assert torch.isfinite(output(model, family)).all()


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build()
    before, names = state(model), [n for n, _ in model.named_modules()]
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise RuntimeError("stop here")
        return build(*args)

    method = METHODS["SVD"]
    build = method.build
    monkeypatch.setattr("tinycomp.pipeline.method_of", lambda _: replace(method, build=failing))
    with pytest.raises(RuntimeError, match="stop here"):
        tc.compress_(model, tc.SVD(ratio=0.7), DATA, progress=False)
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_fitting_in_sequence_lowers_the_output_error() -> None:
    errors = {}
    for sequential in (True, False):
        total = 0.0
        for seed in range(3):
            model = FAMILIES["llama"].build(seed)
            dense = output(model, "llama")
            config = tc.SVD(ratio=0.5, sequential=sequential, weighting="inputs")
            tc.compress_(model, config, [FAMILIES["llama"].batch(s) for s in range(8)], progress=False)
            total += float((output(model, "llama") - dense).norm() / dense.norm())
        errors[sequential] = total
    assert errors[True] < errors[False]


def test_a_global_budget_predicts_less_loss_than_equal_shares() -> None:
    losses = {}
    for allocation in ("global", "uniform"):
        model = FAMILIES["llama"].build()
        report = tc.compress_(model, tc.SVD(ratio=0.6, allocation=allocation), DATA, progress=False)
        losses[allocation] = sum(r["predicted_loss"] for r in report.records)
    assert losses["global"] < losses["uniform"]


def test_rounded_factors_make_small_byte_budgets_cheaper() -> None:
    """Below a quarter of float32's bytes dense int8 no longer fits everywhere."""
    lost = {}
    for name, families, bits in (
        ("auto", ("svd", "cur", "rounding"), (8,)),
        ("wide", ("svd", "cur"), ()),
    ):
        model = FAMILIES["llama"].build()
        config = tc.Auto(ratio=0.2, budget="bytes", families=families, bits=bits, guard_speed=False, screen=0)
        report = tc.compress_(model, config, DATA, progress=False)
        assert sum(r["bits_after"] for r in report.records) <= 0.2 * sum(32 * r["size_before"] for r in report.records)
        lost[name] = sum(r["predicted_loss"] for r in report.records)
        rounded = [r for r in report.records if r["method"] in ("SVD", "CUR") and r.get("bits") == 8]
        assert bool(rounded) == (name == "auto")
    assert lost["auto"] < 0.5 * lost["wide"]


def test_no_target_stays_wide_beside_rounded_factors() -> None:
    model = FAMILIES["llama"].build()
    tc.compress_(model, tc.SVD(ratio=0.8, bits=8), DATA, progress=False)
    kinds = {type(m).__name__ for name, m in model.named_modules() if re.search("_proj$", name)}
    assert kinds <= {"QuantLowRankLinear", "QuantLinear"}


def test_rounded_factors_generate_compile_and_pass_gradients() -> None:
    model = FAMILIES["llama"].build()
    tc.compress_(model, tc.CUR(ratio=0.7, bits=8), DATA, progress=False)
    tokens = DATA[0]["input_ids"][:2]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 15)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(tokens).logits, model(tokens).logits, atol=1e-5)
    model.train()
    model(tokens, labels=tokens).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_same_seed_same_result() -> None:
    states = []
    for _ in range(2):
        model = FAMILIES["llama"].build()
        tc.compress_(model, tc.CUR(ratio=0.6, seed=3), DATA, progress=False)
        states.append(state(model))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_methods_compose_in_one_call_and_in_two(tmp_path: Path) -> None:
    together, apart = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    configs = [tc.WidthPrune(ratio=0.7), tc.SVD(ratio=0.8)]
    tc.compress_(together, configs, DATA, progress=False)
    for config in configs:
        tc.compress_(apart, config, DATA, progress=False)
    assert torch.equal(output(together, "llama"), output(apart, "llama"))
    plan = plan_of(together)
    assert plan is not None
    assert [m["method"] for m in plan.methods] == ["WidthPrune", "SVD"]
    together.save_pretrained(tmp_path)
    reloaded = type(together).from_pretrained(tmp_path)
    assert torch.equal(output(reloaded, "llama"), output(together, "llama"))
    report = tc.compress_(reloaded, tc.Rounding(bits=8, targets=("Linear",)), DATA, progress=False)
    assert report.methods[0]["method"] == "Rounding"
    again = plan_of(reloaded)
    assert again is not None
    assert [m["method"] for m in again.methods] == ["WidthPrune", "SVD", "Rounding"]


def test_copying_form_leaves_the_model_alone() -> None:
    model = FAMILIES["llama"].build()
    before = state(model)
    new, report = tc.compress(model, tc.SVD(ratio=0.6), DATA, progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert report.parameters_after == sum(p.numel() for p in new.parameters()) < report.parameters_before


def test_an_interrupted_run_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tc.SVD(ratio=0.6, sequential=True)
    whole = FAMILIES["llama"].build()
    tc.compress_(whole, config, DATA, progress=False)
    model = FAMILIES["llama"].build()
    put, count = Journal.put, []

    def stops(self: Journal, key: str, *rest: Any) -> None:
        put(self, key, *rest)
        count.append(key)
        if len(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put", stops)
    with pytest.raises(KeyboardInterrupt):
        tc.compress_(model, config, DATA, journal=Journal(tmp_path / "j", "x"), progress=False)
    monkeypatch.setattr(Journal, "put", put)
    tc.compress_(model, config, DATA, journal=Journal(tmp_path / "j", "x"), progress=False)
    assert torch.equal(output(model, "llama"), output(whole, "llama"))


def test_a_model_without_a_row_takes_per_matrix_methods() -> None:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.FalconForCausalLM(copy.deepcopy(config)).eval()
    report = tc.compress_(model, tc.SVD(ratio=0.7), DATA, progress=False)
    assert report.ratio_achieved <= 0.7
    fresh = transformers.FalconForCausalLM(config).eval()
    with pytest.raises(UsageError, match="no feed-forward sublayer"):
        tc.compress_(fresh, tc.WidthPrune(ratio=0.7), DATA, progress=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tc.SVD(ratio=0.7, targets=("nothing",)), "match no linear"),
        (tc.SVD(ratio=0.7, targets=("re:(",)), "no regular expression"),
        (tc.SVD(), "ratio: got none"),
        (tc.SVD(rank=1000), "got rank 1000, allowed 1 to"),
        (tc.SVD(ratio=0.0001), "budget: got"),
        (tc.SWSC(clusters=10_000, rank=0), "clusters"),
    ],
    ids=str,
)
def test_bad_requests_say_what_is_allowed(config: Any, message: str) -> None:
    model = FAMILIES["llama"].build()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        tc.compress_(model, config, DATA, progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bad_weights_data_and_kinds() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(TypeError, match="allowed a config among"):
        tc.compress_(model, "svd", DATA)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no method"):
        tc.compress_(model, [], DATA)
    with pytest.raises(ValueError, match=r"empty|no text"):
        tc.compress_(model, tc.SVD(ratio=0.5), [""], tokenizer=object(), progress=False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: got NaN"):
        tc.compress_(model, tc.SVD(ratio=0.5), DATA, progress=False)


def test_plan_of_llama_3_1_8b_from_its_config_alone() -> None:
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    found = tc.plan(config, tc.CUR(preset="paper"))
    assert found["parameters_before"] / 1e9 == pytest.approx(8.030, abs=1e-3)
    assert found["parameters_after"] / 1e9 == pytest.approx(7.317, abs=1e-3)
    sizes = {(row["path"].rsplit(".", 1)[-1], row["size_after"]) for row in found["modules"]}
    assert sizes == {("q_proj", 2_162_688), ("k_proj", 1_376_256), ("gate_proj", 4_784_128)}
    assert len(found["modules"]) == 30


@pytest.mark.parametrize(
    "config",
    [tc.SVD(ratio=0.6, allocation="uniform"), tc.CUR(ratio=0.6, allocation="uniform"), tc.Rounding(bits=8),
     tc.SVD(ratio=0.6, allocation="uniform", bits=4), tc.CUR(rank=8, bits=8),
     tc.SWSC(clusters=6, rank=2, factor_bits=8), tc.SWSC(clusters=6, rank=2, factor_bits=4),
     tc.Wanda(ratio=0.6, allocation="uniform", structured=False, guard_speed=False, value_bits=4),
     tc.Rounding(bits=4), tc.CUR(preset="paper"), tc.SVD(rank=8)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plan_without_weights_gives_the_bytes_of_the_run(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = FAMILIES["llama"].build().to(dtype)
    dense = stored_bytes(model, tmp_path / "dense")
    planned = tc.plan(tmp_path / "dense" / "config.json", config)
    assert planned["bytes_before"] == dense
    tc.compress_(model, config, DATA, progress=False)
    assert stored_bytes(model, tmp_path / "out") == planned["bytes_after"]


def test_auto_is_dense_int8_where_that_fits_and_mixes_where_it_does_not(tiny: Callable[..., Any]) -> None:
    rounded = tiny("llama")
    int8 = tc.compress_(rounded, tc.Rounding(bits=8), DATA, progress=False)
    share = sum(r["bits_after"] for r in int8.records) / sum(32 * r["size_before"] for r in int8.records)
    model = tiny("llama")
    config = tc.Auto(ratio=share, budget="bytes", guard_speed=False)
    report = tc.compress_(model, config, DATA, progress=False)
    assert any("every target in 8 bits" in note for note in report.notes)
    assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(rounded).values(), strict=True))
    mixed = tc.compress_(
        tiny("llama"), tc.Auto(ratio=0.9 * share, budget="bytes", guard_speed=False), DATA, progress=False
    )
    assert {r["method"] for r in mixed.records} != {"Rounding"}
