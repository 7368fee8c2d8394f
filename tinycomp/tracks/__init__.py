"""The full report: every method on three pretrained models, over several seeds, on two tracks.

Parameters track: 16-bit factors, no rounding, no masks; every method at the same fraction of all linear parameters.
Bytes track: everything allowed; `Auto` at exactly the bytes of dense int8, of int8 behind masks, and of dense int4.
Finished rows are kept in a journal, so that a killed run continues.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tinycomp import data, pipeline
from tinycomp.calib import StatsStore
from tinycomp.errors import UsageError
from tinycomp.eval.machine import machine
from tinycomp.eval.probes import PROBES
from tinycomp.eval.quality import DEFAULT
from tinycomp.eval.size import size_of
from tinycomp.eval.speed import speed_of
from tinycomp.eval.tracks_page import write_tracks
from tinycomp.io import check_output_dir, fingerprint
from tinycomp.measure import speed_fields
from tinycomp.methods import method_of
from tinycomp.models import spec_of
from tinycomp.progress import Bars
from tinycomp.recipe import make_configs
from tinycomp.targets import find_targets, shapes, unit_specs
from tinycomp.tracks.rows import Entry, Task, causal_task, entries, probe_task

JOURNAL = "tracks.journal.jsonl"
OF_A_TASK = ("name", "qualities", "examples", "protocol", "hash", "ratios")  # in the results


class _Run:
    """One task under way: its rows, the journal, and the statistics of the seed at hand."""

    def __init__(self, task: Task, seeds: Sequence[int], journal: Path, bars: Bars) -> None:
        self.task, self.seeds, self.journal, self.bars = task, tuple(seeds), journal, bars
        self.half = copy.deepcopy(task.model).half()  # type: ignore[attr-defined]
        self.rows: list[dict[str, Any]] = []
        self.kept: dict[tuple[str, float | None, int], dict[str, float]] = {}
        self._statistics: tuple[int, StatsStore] | None = None
        text = journal.read_text() if journal.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed run may have cut the last line
        journal.write_text(whole)
        self.finished = {row["key"]: row for row in map(json.loads, whole.splitlines())}

    def run(self) -> list[dict[str, Any]]:
        jobs = list(self._jobs())
        for number, (entry, seed) in enumerate(jobs):
            self.bars.update(self.task.name, number, len(jobs))
            key = fingerprint(self.task.name, self.task.protocol, self.task.hash, vars(entry), seed)
            row = self.finished.get(key)
            if row is None:
                row = {"key": key} | self._row(entry, seed)
                with self.journal.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            self.rows.append(row)
            self.kept[entry.name, entry.ratio, seed] = row.get("kept") or {}
        self.bars.update(self.task.name, len(jobs), len(jobs))
        return self.rows

    def _jobs(self) -> Iterator[tuple[Entry, int]]:
        """Seed by seed, because the statistics of a seed are large."""
        yield Entry("dense", "parameters", "dense", seeded=False), self.seeds[0]
        for seed in self.seeds:
            for entry in entries(self.task):
                if entry.seeded or seed == self.seeds[0]:
                    yield entry, seed

    def _row(self, entry: Entry, seed: int) -> dict[str, Any]:
        task = self.task
        row: dict[str, Any] = {
            "task": task.name, "name": entry.name, "track": entry.track, "method": entry.method, "ratio": entry.ratio,
            "seed": seed,
        }  # fmt: skip
        model = copy.deepcopy(self.half)
        if entry.method != "dense":
            try:
                config = self._config(entry, seed)
                statistics = self._statistics_of(seed) if method_of(config).needs(config) else None
                report = pipeline.compress_(model, config, statistics=statistics, progress=False).to_dict()
            except ValueError as error:  # out of reach for this method on this model: the table says so
                return row | {"refused": str(error)}
            records = report["records"]
            touched = sum(r["size_before"] for r in records)
            dense = {r["path"] for r in records}
            rest = sum(s["parameters"] for s in report["skipped"] if s["path"] not in dense and _targeted(s))
            row["kept"] = {
                "parameters": report["ratio_achieved"],
                "bytes": (sum(r["bits_after"] for r in records) / 16 + rest) / (touched + rest),
            }
            row |= {key: report[key] for key in ("peak_memory_bytes", "parameters_after")}
            row["compress_seconds"] = report["seconds"]
            row["chosen"] = dict(Counter(r["method"] for r in records))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            row |= size_of(model, folder, flops=False).to_dict()
        model = model.float()  # the factors keep their 16 bits; arithmetic in fp16 is slow on a CPU
        row["flops_per_token"] = size_of(model).flops_per_token
        row |= task.measure(model)
        if task.timed and seed == self.seeds[0]:
            row |= self._speed(model)
        gc.collect()
        return row

    def _speed(self, model: nn.Module) -> dict[str, float]:
        """Rates over those of the dense model, timed interleaved, both in fp32."""
        speeds = speed_of({"dense": self.task.model, "row": model})
        dense, mine = speed_fields(speeds["dense"]), speed_fields(speeds["row"])
        return {f"{key}_relative": (mine[key] or 0.0) / base for key, base in dense.items() if base}

    def _config(self, entry: Entry, seed: int) -> Any:
        """The entry's config; its ratio counts all linears, the config's only those that the method targets."""
        fields = dict(entry.fields)
        if entry.method == "auto":
            fields["guard_speed"] = False  # the choice must not depend on the machine's load
        (config,) = make_configs(entry.method, seed=seed, **fields)
        ratio = entry.ratio
        if entry.like is not None:
            own = next(e for e in entries(self.task) if e.name == entry.like)
            kept = self.kept[entry.like, own.ratio, seed if own.seeded else self.seeds[0]]
            if not kept:
                raise UsageError(f"{entry.name}: the row {entry.like!r} was refused")
            ratio = kept[entry.track]
        elif ratio is not None:
            share = self._share(config)
            ratio = 1 - (1 - ratio) / share
            if ratio <= 0:
                raise UsageError(f"the linears that it takes hold only {share:.2f} of the parameters")
        return config if ratio is None else make_configs(entry.method, seed=seed, ratio=ratio, **fields)[0]

    def _share(self, config: Any) -> float:
        """Parameters that the config targets over those of all linears in the blocks."""
        model, spec, method = self.half, spec_of(self.half), method_of(config)
        kinds: set[str] = {"linear"} if method.families else {method.unit_kind}
        units = unit_specs(spec, find_targets(model, spec, config).paths, kinds, method.name)
        return _numbers(model, {p for u in units for p in u.paths}) / _numbers(model, spec.linears)

    def _statistics_of(self, seed: int) -> StatsStore:
        """One calibration pass of the float32 model, for every method."""
        if self._statistics is None or self._statistics[0] != seed:
            configs = [make_configs(e.method, seed=seed, **e.fields)[0] for e in entries(self.task)]
            if self._statistics is not None:
                self._statistics[1].close()
            batches = [data.for_model(batch, self.task.model) for batch in self.task.batches(seed)]
            found = pipeline.statistics_of(self.task.model, configs, batches, seed=seed, progress=False)
            self._statistics = (seed, found)
        return self._statistics[1]


def _targeted(skipped: dict[str, Any]) -> bool:
    return str(skipped["reason"]).startswith("kept dense")


def _numbers(model: nn.Module, paths: Any) -> int:
    return sum(m * n for m, n in shapes(model, paths).values())


def _folder(output_dir: str | os.PathLike[str], force: bool) -> Path:
    """The folder, made; one that is not empty is taken only with a journal to continue or with `force`."""
    folder = Path(output_dir).expanduser().absolute()
    journal = folder / JOURNAL
    if not journal.exists() or force:
        check_output_dir(folder, force)
        journal.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _makers(
    model: str | None, ratios: Sequence[float], tokens: int, samples: int | None
) -> dict[str, Callable[[], Task]]:
    """What loads each model, by name."""
    makers: dict[str, Callable[[], Task]] = {
        "causal": lambda: causal_task(model, ratios or (0.9, 0.8, 0.6), tokens, samples or 48, 512)
    }
    if model is None:
        for name, make in PROBES.items():
            makers[name] = lambda make=make: probe_task(make(), ratios or (0.6, 0.4), samples or 256)  # type: ignore[misc]
    return makers


def run_tracks(
    output_dir: str | os.PathLike[str],
    model: str | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    ratios: Sequence[float] = (),
    tokens: int = DEFAULT.max_tokens,
    num_calibration_samples: int | None = None,
    only: Sequence[str] = (),
    force: bool = False,
    quiet: bool = False,
    command: str = "tinycomp demo --full",
) -> dict[str, Any]:
    """Run both tracks and write report.md, report.html and results.json; a killed run continues where it was.

    Args:
        output_dir: for the reports; an unfinished run's journal in it is continued.
        model: a causal language model instead of the default three models.
        seeds: draws of the calibration data and every random choice.
        ratios: fractions of the linear parameters; default 0.9, 0.8, 0.6 for language models, 0.6, 0.4 for encoders.
        tokens: predictions of the perplexity protocol.
        num_calibration_samples: default 48 windows of 512 tokens, or 256 texts or images.
        only: of "causal", "minilm", "dinov2"; default all.
        force: replace what is in `output_dir`.
        quiet: no progress bars.
        command: recorded in the report.

    Raises:
        ValueError: `output_dir` is not empty, or `model` is no causal language model.
        RuntimeError: none of the models is installed.
    """
    folder = _folder(output_dir, force)
    makers = _makers(model, ratios, tokens, num_calibration_samples)
    tasks, rows, notes = [], [], []
    for name in only or makers:
        with Bars(not quiet) as bars:
            bars.update(f"load {name}", 0, 1)
            try:
                task = makers[name]()
            except RuntimeError as error:
                notes.append(f"{name} was left out: {error}")
                continue
            bars.update(f"load {name}", 1, 1)
            rows += _Run(task, seeds, folder / JOURNAL, bars).run()
        tasks.append({key: getattr(task, key) for key in OF_A_TASK})
    if not tasks:
        raise RuntimeError("tracks: no model to run:\n" + "\n".join(notes))
    results = {
        "title": "What compression costs, measured",
        "machine": machine(limits=False),
        "command": command,
        "seeds": list(seeds),
        "tasks": tasks,
        "rows": rows,
        "notes": notes,
    }
    write_tracks(folder, results)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / JOURNAL).unlink()
    return results
