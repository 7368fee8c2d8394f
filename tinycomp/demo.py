"""The demo: every method on one real model, one table, one result saved and reloaded in a fresh process."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from tinycomp import data, pipeline
from tinycomp.eval.machine import machine
from tinycomp.eval.quality import DEFAULT
from tinycomp.eval.report import print_table, write_report
from tinycomp.eval.size import coverage, is_causal
from tinycomp.eval.speed import speed_of
from tinycomp.io import check_output_dir, default_model, load_model, save_model
from tinycomp.measure import evaluate, speed_fields
from tinycomp.methods import method_of
from tinycomp.recipe import make_configs, make_recipe

Job = tuple[str, float | None, int, str]  # method, ratio, seed, setting
PROMPT = "The state of the union is"
STAGES = 2  # of a row: compress, measure

RELOAD = """
import json, sys, time
import torch, tinycomp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, expected, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
expected = load_file(expected)
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder).eval()
seconds = time.perf_counter() - start
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(expected["ids"]).logits
    tokens = model.generate(expected["ids"], attention_mask=torch.ones_like(expected["ids"]), max_new_tokens=24,
                            do_sample=False)
print(json.dumps({"equal": torch.equal(logits, expected["logits"]), "seconds": seconds,
                  "text": tokenizer.decode(tokens[0])}))
"""


@dataclass(frozen=True)
class Demo:
    """What the demo runs.

    Args:
        methods: at every ratio and seed.
        rounding: bits of the dense rounding comparators.
        ratios: of the targeted parameters.
        seeds: calibration draw and every random choice.
        tokens: predictions of the perplexity protocol.
        num_calibration_samples: calibration windows.
        max_seq_length: tokens of a calibration window; half of the windows give gradients too.
        repeats: interleaved rounds of the speed measurement.
        decode_tokens: greedy steps in each of them.
        short: SWSC takes 32 clusters, finds them on a random projection and does not refine: a third of its time.
    """

    methods: tuple[str, ...] = ("cur", "swsc", "svd", "widthprune")
    rounding: tuple[int, ...] = (8,)
    ratios: tuple[float, ...] = (0.8, 0.5)
    seeds: tuple[int, ...] = (0,)
    tokens: int = 1024
    num_calibration_samples: int = 16
    max_seq_length: int = 256
    repeats: int = 3
    decode_tokens: int = 8
    short: bool = True

    def changed(self, **fields: Any) -> Demo:
        """The same with the fields that are not None or empty."""
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, (list, tuple)) else v for key, v in fields.items() if v}
        return replace(self, **given)

    def groups(self) -> list[list[Job]]:
        """Every row but the dense one; the rows of a list are timed together, and with the dense model."""
        groups: list[list[Job]] = [
            [(m, ratio, seed, "") for m in self.methods] for seed in self.seeds for ratio in self.ratios
        ]
        groups[0] = [("rounding", None, self.seeds[0], f"bits={bits}") for bits in self.rounding] + groups[0]
        return groups

    def jobs(self) -> list[Job]:
        """The rows of all groups."""
        return [job for group in self.groups() for job in group]


class _Run:
    """One demo under way: the dense model, what is measured against it, and the rows so far."""

    def __init__(self, model: nn.Module, tokenizer: Any, settings: Demo, progress: Progress) -> None:
        self.dense, self.tokenizer, self.settings, self.progress = model, tokenizer, settings, progress
        self.protocol = DEFAULT if settings.tokens == DEFAULT.max_tokens else DEFAULT.shortened(settings.tokens)
        self.rows: list[dict[str, Any]] = []
        self.compressions: list[dict[str, Any]] = []
        self.notes = [
            "The rows of one ratio are timed interleaved with one another and with the dense model, loaded from disk; "
            "rates are shown relative to the dense row."
        ]
        self.task = progress.add_task("", total=STAGES * len(settings.jobs()) + len(settings.groups()) + 2)
        self.folders: dict[str, tempfile.TemporaryDirectory[str]] = {}  # rows still to be timed
        self._shared: dict[int, dict[str, Any]] = {}

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        self.progress.update(self.task, description=text)
        yield
        self.progress.advance(self.task)

    def shared(self, seed: int) -> dict[str, Any]:
        """What all methods share, as arguments of `compress_`: calibration batches and the statistics of one pass."""
        if seed not in self._shared:
            self.progress.update(self.task, description="calibrate")
            start = time.perf_counter()
            windows = data.batches(
                None, self.tokenizer, num_calibration_samples=self.settings.num_calibration_samples,
                max_seq_length=self.settings.max_seq_length, seed=seed,
            )  # fmt: skip
            configs = [self.config(*job) for job in self.settings.jobs()]
            statistics = pipeline.statistics_of(
                self.dense, configs, windows, seed=seed, progress=False,
                gradient_tokens=self.settings.num_calibration_samples * self.settings.max_seq_length // 2,
            )  # fmt: skip
            self._shared = {seed: {"data": windows, "statistics": statistics}}  # of one seed at a time: they are large
            self.notes.append(
                f"Calibration statistics, seed {seed}: {time.perf_counter() - start:.0f} s once for all methods, on "
                f"{self.settings.num_calibration_samples} windows; not in the times of the rows."
            )
        return self._shared[seed]

    def config(self, method: str, ratio: float | None, seed: int, setting: str) -> Any:
        settings = [setting] if setting else []
        if self.settings.short and method == "swsc":
            settings += ["clusters=32", "iterations=0", "steps=5", "projection=32"]
        return make_configs(method, settings, ratio=ratio, seed=seed)[0]

    def measure(self, name: str, model: nn.Module, row: dict[str, Any]) -> None:
        """Add a row: sizes and perplexity. What it saves stays for `time`."""
        with self.stage(f"{name}: measure"):
            folder = self.folders[name] = tempfile.TemporaryDirectory(prefix="tinycomp-demo-")
            with _without_bars():
                model.save_pretrained(folder.name)  # type: ignore[operator]
            row |= evaluate(model, self.tokenizer, self.protocol, folder=folder.name)
        row["plain"] = getattr(model.config, "quantization_config", None) is None
        self.rows.append({"name": name} | row)

    def time(self) -> None:
        """The speed of every row measured since the last call, interleaved with one another and the dense model."""
        with self.stage("time"):
            folders, self.folders = self.folders, {}
            with _without_bars():
                others = {name: load_model(f.name, None)[0] for name, f in folders.items() if name != "dense"}
            models = {"dense": self.dense} | others
            speeds = speed_of(models, decode_tokens=self.settings.decode_tokens, repeats=self.settings.repeats)
            for row in self.rows[len(self.rows) - len(folders) :]:  # none of a group that was refused
                speed = speeds[row["name"]]
                row |= self._scaled(speed_fields(speed), speed_fields(speeds["dense"])) | {"flags": list(speed.flags)}
            for folder in folders.values():
                folder.cleanup()

    def _scaled(self, rates: dict[str, float | None], dense: dict[str, float | None]) -> dict[str, float | None]:
        """The rates times (dense rate of the first group / dense rate timed with these): drift cancels."""
        first = {key: self.rows[0].get(key, rate) for key, rate in dense.items()}
        return {key: rate and rate * (first[key] or 0.0) / (dense[key] or 1.0) for key, rate in rates.items()}

    def compress(self, method: str, ratio: float | None, seed: int, setting: str) -> tuple[nn.Module, Any] | None:
        """One compressed copy with its row; None, and a note, when the method refuses."""
        label = f"int{setting.partition('=')[2]}" if setting else method
        name = label + (f" {ratio:g}" if ratio is not None else "")
        name += f" seed {seed}" if len(self.settings.seeds) > 1 and not setting else ""
        model, config = copy.deepcopy(self.dense), self.config(method, ratio, seed, setting)
        shared = self.shared(seed) if method_of(config).needs(config) else {}  # unused statistics still cost time
        try:
            with self.stage(f"{name}: compress"):
                report = pipeline.compress_(model, config, **shared, progress=False)
        except (ValueError, RuntimeError) as error:
            self.notes.append(f"{name}: refused: {error}")
            self.progress.advance(self.task, STAGES)
            return None
        found = report.to_dict()
        touched = [record["path"] for record in found["records"]]
        self.compressions.append({"name": name} | found | {"coverage": coverage(model, touched)})
        row = {
            "method": method,
            "ratio": ratio,
            "seed": seed,
            "achieved_ratio": found["ratio_achieved"],
            "compress_seconds": found["seconds"],
            "peak_memory_bytes": found["peak_memory_bytes"],
        }
        self.measure(name, model, row)
        return model, config


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would break into the demo's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def run_demo(
    source: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str],
    settings: Demo,
    *,
    force: bool = False,
    quiet: bool = False,
    command: str = "tinycomp demo",
) -> dict[str, Any]:
    """Compress one model with every method and write report.md, report.html, results.json and one model folder.

    Args:
        source: a causal language model; None is the default model.
        output_dir: for the reports; `model/` in it holds the saved result.
        settings: what to run.
        force: replace what an earlier run left in `output_dir`.
        quiet: print nothing.
        command: recorded in the report.

    Returns:
        The report's results, with `reload`: what the fresh process found.

    Raises:
        RuntimeError: every method refused, or the fresh process did not get equal logits.
    """
    path = check_output_dir(output_dir, force)
    name = os.fspath(source if source is not None else default_model())
    console = Console(quiet=quiet)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        loading = progress.add_task(f"load {Path(name).name}", total=None)
        model, tokenizer = load_model(name)
        progress.remove_task(loading)
        if not is_causal(model) or tokenizer is None:
            raise ValueError(f"demo: got {type(model).__name__}, allowed: a causal language model with its tokenizer")
        run = _Run(model, tokenizer, settings, progress)
        reload = _rows(run, path, name, command, force)
    results = _results(run, name, command) | {"reload": reload}
    path.mkdir(parents=True, exist_ok=True)
    write_report(path, results)
    (path / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _print(console, results, path)
    if reload is None:
        raise RuntimeError("demo: no method gave a model to save:\n" + "\n".join(run.notes))
    if not reload["equal"]:
        raise RuntimeError(f"demo: {path / 'model'} gives other logits in a fresh process")
    return results


def _rows(run: _Run, path: Path, source: str, command: str, force: bool) -> dict[str, Any] | None:
    """Measure every row; save the first one that needs tinycomp to load, and return what a fresh process found."""
    run.measure("dense", run.dense, {"method": "dense", "ratio": 1.0, "achieved_ratio": 1.0})
    reload = None
    for group in run.settings.groups():
        for job in group:
            made = run.compress(*job)
            if made is not None and reload is None and job[1] is not None and not run.rows[-1]["plain"]:
                with run.stage(f"{run.rows[-1]['name']}: save, reload in a fresh process"):
                    reload = {"name": run.rows[-1]["name"]} | _save(path, made, run, source, command, force)
            del made
            gc.collect()
        run.time()
    return reload


def _save(path: Path, made: tuple[nn.Module, Any], run: _Run, source: str, command: str, force: bool) -> dict[str, Any]:
    """Save one result, then load it in a fresh process and compare logits there."""
    model, config = made
    folder = path / "model"
    recipe = make_recipe(Path(source).name, [config], command, model, seed=config.seed)
    with _without_bars():
        save_model(model, run.tokenizer, folder, run.compressions[-1], recipe, force)
    ids = torch.tensor([data.token_ids(run.tokenizer, PROMPT)])
    with torch.no_grad():
        logits = model(ids).logits
    with tempfile.TemporaryDirectory() as temporary:
        expected = os.path.join(temporary, "expected.safetensors")
        save_file({"ids": ids, "logits": logits}, expected)
        arguments = [sys.executable, "-c", RELOAD, str(folder), expected, str(torch.get_num_threads())]
        child = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"demo: {folder} does not load in a fresh process:\n{child.stderr[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def _results(run: _Run, source: str, command: str) -> dict[str, Any]:
    return {
        "title": f"{Path(source).name} compressed with tinycomp",
        "model": Path(source).name,
        "machine": machine(),
        "protocol": {"name": run.protocol.name, "hash": run.protocol.hash},
        "command": command,
        "rows": run.rows,
        "compressions": run.compressions,
        "notes": run.notes,
    }


def _print(console: Console, results: dict[str, Any], path: Path) -> None:
    print_table(results, console)
    for note in results["notes"]:
        console.print(f"note: {note}", markup=False)
    found = results["reload"]
    if found is not None:
        verdict = "equal" if found["equal"] else "NOT EQUAL"
        console.print(f"{found['name']} reloaded in a fresh process in {found['seconds']:.1f} s: logits {verdict}")
        console.print(found["text"].strip(), markup=False)
    console.print(f"wrote {path / 'report.html'}, report.md, results.json and model/", markup=False, soft_wrap=True)
