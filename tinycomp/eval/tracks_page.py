"""The page of the two tracks: rows of several seeds as mean and spread, what they say in words, a plot per model."""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tinycomp.eval import plots
from tinycomp.eval.report import NO_PLOTS, facts_of, standalone, template
from tinycomp.eval.table import Row, fixed, number, significant

PAPER_SIZE = ("cur paper, own size", "cur, same matrices")
LABELS = {"perplexity": "perplexity", "accuracy": "accuracy", "feature_error": "feature error"}
TITLES = {"auto": "Auto", "cur": "CUR", "svd": "SVD", "swsc": "SWSC", "widthprune": "WidthPrune"}
SIZES = ("parameters", "bytes_disk", "flops_per_token", "compress_seconds", "peak_memory_bytes")
RATES = ("prefill_tokens_s_relative", "decode_tokens_s_relative")


@dataclass(frozen=True)
class Summary:
    """All seeds of one row: mean and sample standard deviation of its quality, means of the rest.

    chosen: method -> matrices, of the first seed; refused: why the row does not exist.
    """

    name: str
    track: str
    method: str
    ratio: float | None
    seeds: int = 0
    mean: float = math.nan
    spread: float = 0.0
    sizes: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, int] = field(default_factory=dict)
    refused: str = ""


def summaries(rows: Sequence[Row], quality: str) -> list[Summary]:
    """One summary for each name and ratio, in the order of the rows."""
    groups: dict[tuple[str, float | None], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["name"], row["ratio"]].append(row)
    out = []
    for (name, ratio), members in groups.items():
        first, kept = members[0], [row for row in members if quality in row]
        if not kept:
            out.append(Summary(name, first["track"], first["method"], ratio, refused=str(first["refused"])))
            continue
        values = [float(row[quality]) for row in kept]
        measured = {k: [v for row in kept if (v := number(row, k)) is not None] for k in (*SIZES, *RATES)}
        out.append(
            Summary(
                name,
                first["track"],
                first["method"],
                ratio,
                len(kept),
                statistics.fmean(values),
                statistics.stdev(values) if len(values) > 1 else 0.0,
                {k: statistics.fmean(v) for k, v in measured.items() if v},
                kept[0].get("chosen") or {},
            )
        )
    return out


def title(name: str, ratio: float | None = None) -> str:
    """A row's name as people read it: "cur paper" at 0.6 is "CUR paper 0.6"."""
    first = re.split(r"[ ,]", name)[0]
    return TITLES.get(first, first) + name[len(first) :] + ("" if ratio is None else f" {ratio:g}")


class Judge:
    """Compares two summaries of one task; a difference within the noise is none.

    The noise is the larger spread over the seeds and, for accuracies, the half width of the 95 % interval of the
    difference of two independent ones, 1.96 sqrt(2 p (1 - p) / examples): within one standard error, every third pair
    of equally good models would be called different.

    Args:
        quality: "perplexity", "accuracy" or "feature_error".
        examples: in the test part, of an accuracy.
    """

    def __init__(self, quality: str, examples: int = 0) -> None:
        self.quality, self.examples = quality, examples if quality == "accuracy" else 0
        self.sign = 1.0 if quality == "accuracy" else -1.0
        self.write = significant if quality == "perplexity" else lambda v: f"{100 * v:.1f} %"
        self.spread = (lambda v: f"{float(f'{v:.2g}'):,g}") if quality == "perplexity" else lambda v: f"{100 * v:.1f}"

    def gain(self, a: Summary, b: Summary) -> float:
        """How much better a is than b, in the quality's unit."""
        return self.sign * (a.mean - b.mean)

    def best(self, found: Sequence[Summary]) -> Summary:
        return max(found, key=lambda s: self.sign * s.mean)

    def noise(self, *found: Summary) -> float:
        p = found[-1].mean
        error = 1.96 * math.sqrt(2 * p * (1 - p) / self.examples) if self.examples else 0.0
        return max(error, *(s.spread for s in found))

    def word(self, a: Summary, b: Summary) -> str:
        gain = self.gain(a, b)
        if abs(gain) <= self.noise(a, b):
            return "equal within the noise"
        return "better" if gain > 0 else "worse"

    def text(self, s: Summary) -> str:
        if s.refused:
            return "–"
        return self.write(s.mean) + (f" ± {self.spread(s.spread)}" if s.seeds > 1 else "")


def findings(found: Sequence[Summary], ratios: Sequence[float], judge: Judge) -> list[str]:
    """What the rows say about the claims: Auto against single methods, CUR against its paper, SWSC against SVD."""
    at = {(s.name, s.ratio): s for s in found if not s.refused}
    out = []
    for ratio in ratios:
        singles = [s for s in found if s.ratio == ratio and s.track == "parameters" and s.method != "auto"]
        singles = [s for s in singles if not s.refused]
        auto = at.get(("auto", ratio))
        if auto is not None and singles:
            top = judge.best(singles)
            out.append(
                f"{ratio:g} of the parameters: Auto {judge.text(auto)}, best single method {title(top.name)} "
                f"{judge.text(top)}: Auto is {judge.word(auto, top)}."
            )
    pair = [at.get((name, None)) for name in PAPER_SIZE]
    if pair[0] is not None and pair[1] is not None:
        out.append(
            f"CUR as published, at its own size: {judge.text(pair[0])}; default CUR on the same matrices at the same "
            f"size: {judge.text(pair[1])}, {judge.word(pair[1], pair[0])}."
        )
    out += _against_svd(at, ratios, judge)
    out += _bytes(found, judge)
    return out


def _against_svd(at: Mapping[Any, Summary], ratios: Sequence[float], judge: Judge) -> list[str]:
    """Whether the two papers' forms hold against a truncated SVD of the same size."""
    out = []
    for name, paper in (("swsc", "Shared Weight for Similar Channel"), ("cur", "CURing")):
        pairs = [(r, at["svd", r], at[name, r]) for r in ratios if ("svd", r) in at and (name, r) in at]
        if not pairs:
            continue
        lost = [r for r, svd, other in pairs if judge.word(other, svd) == "worse"]
        won = [r for r, svd, other in pairs if judge.word(other, svd) == "better"]
        figures = "; ".join(
            f"{r:g}: SVD {judge.text(svd)}, {title(name)} {judge.text(other)}" for r, svd, other in pairs
        )
        if len(lost) == len(pairs):
            verdict = f"{paper} does not hold against SVD on this model: SVD is better at every ratio"
        elif len(won) == len(pairs):
            verdict = f"{paper} holds against SVD on this model at every ratio"
        else:
            verdict = f"{paper} against SVD on this model: better at {_list(won)}, worse at {_list(lost)}"
        out.append(f"{verdict} ({figures}).")
    return out


def _list(ratios: Sequence[float]) -> str:
    return ", ".join(f"{r:g}" for r in ratios) or "no ratio"


def _bytes(found: Sequence[Summary], judge: Judge) -> list[str]:
    """Each Auto row of the bytes track against the best single method that is no larger, dense int8 included."""
    out = []
    for auto in (s for s in found if s.track == "bytes" and s.method == "auto" and not s.refused):
        like = next((s for s in found if f"auto as {s.name}" == auto.name and not s.refused), auto)
        size = max(auto.sizes["bytes_disk"], like.sizes["bytes_disk"])
        singles = [
            s for s in found
            if not s.refused and s.method not in ("auto", "dense") and s.sizes["bytes_disk"] <= 1.002 * size
        ]  # fmt: skip
        if singles:
            top = judge.best(singles)
            name = title(top.name, top.ratio)
            out.append(
                f"{size / 1e6:.1f} MB: Auto {judge.text(auto)}, best single method that is no larger {name} "
                f"{judge.text(top)}: Auto is {judge.word(auto, top)}."
            )
    return out


def write_tracks(folder: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write report.md and report.html, and with matplotlib one SVG a model beside them.

    Args:
        folder: exists; files of these names are replaced.
        results: `title, machine, command, seeds, notes`, tasks `[{name, qualities, examples, protocol, hash, ratios}]`
            and the rows of `tinycomp.tracks`.
    """
    written = [folder / "report.md", folder / "report.html"]
    sections = []
    for number_, task in enumerate(results["tasks"]):
        section = _section([row for row in results["rows"] if row["task"] == task["name"]], task)
        if importlib.util.find_spec("matplotlib") is not None:
            section["file"] = f"report-{number_}.svg"
            section["svg"] = plots.tracks_plot(
                section["found"], task, {s.name: title(s.name) for s in section["found"]}
            )
            written.append(folder / section["file"])
            written[-1].write_text(standalone(section["svg"]), encoding="utf-8")
        sections.append(section)
    context = {
        "title": results["title"],
        "facts": facts_of(results),
        "seeds": results["seeds"],
        "command": results["command"],
        "notes": results["notes"],
        "sections": sections,
        "no_plots": NO_PLOTS if importlib.util.find_spec("matplotlib") is None else "",
    }
    written[0].write_text(template("tracks.md.j2").render(context), encoding="utf-8")
    written[1].write_text(template("tracks.html.j2").render(context), encoding="utf-8")
    return written


def _section(rows: Sequence[Row], task: Mapping[str, Any]) -> dict[str, Any]:
    """One model: its tables as text and the sentences, for each quality; the first one's noise, and its plot's rows."""
    qualities: list[str] = list(task["qualities"])
    judges = [Judge(quality, task["examples"]) for quality in qualities]
    every = list(zip(*(summaries(rows, quality) for quality in qualities), strict=True))
    found, judge, ratios = [s[0] for s in every], judges[0], list(task["ratios"])
    dense = next(s for s in every if s[0].method == "dense")
    refused = [s for s in found if s.refused and s.ratio is not None]

    def cells(name: str) -> dict[str, Any]:
        return next(_cells(s, dense, judges) for s in every if (s[0].name, s[0].ratio) == (name, None))

    return {
        "task": task,
        "labels": [LABELS[quality] for quality in qualities],
        "found": found,
        "noise": judge.text(replace(dense[0], mean=judge.noise(dense[0]), seeds=1)) if task["examples"] else "",
        "dense": f"{judge.text(dense[0])}, {dense[0].sizes['bytes_disk'] / 1e6:.1f} MB in 16 bits",
        "ratios": [f"{r:g}" for r in ratios],
        "views": [_view([s[i] for s in every], ratios, j) for i, j in enumerate(judges)],
        "pair": [cells(n) for n in PAPER_SIZE if any(s.name == n for s in found)],
        "bytes": [_cells(s, dense, judges) for s in [dense, *(s for s in every if s[0].track == "bytes")]],
        "all": [_cells(s, dense, judges) for s in every],
        "refused": [f"{title(s.name, s.ratio)}: {s.refused.partition(';')[0]}" for s in refused],
    }


def _view(found: Sequence[Summary], ratios: Sequence[float], judge: Judge) -> dict[str, Any]:
    """The parameters track by one quality, and what it says."""
    by = {(s.name, s.ratio): s for s in found}
    names = list(dict.fromkeys(s.name for s in found if s.track == "parameters" and s.ratio is not None))
    columns = [[by[name, r] for name in names if (name, r) in by and not by[name, r].refused] for r in ratios]
    tops = {id(judge.best(column)) for column in columns if column}
    grid = [
        (title(name), [(judge.text(by[name, r]), id(by[name, r]) in tops) for r in ratios if (name, r) in by])
        for name in names
    ]
    return {"label": LABELS[judge.quality], "grid": grid, "findings": findings(found, ratios, judge)}


def _cells(row: Sequence[Summary], dense: Sequence[Summary], judges: Sequence[Judge]) -> dict[str, Any]:
    """A row's cells, one summary for each quality; a dash where nothing was measured."""
    s = row[0]

    def cell(key: str, write: Any) -> str:
        return write(s.sizes[key]) if key in s.sizes else "–"

    size = s.sizes.get("bytes_disk")
    return {
        "name": title(s.name, s.ratio),
        "parameters": cell("parameters", fixed(2, 1e6)),
        "disk": cell("bytes_disk", fixed(1, 1e6)),
        "relative": "–" if size is None else f"{size / dense[0].sizes['bytes_disk']:.3f}",
        "flops": cell("flops_per_token", fixed(1, 1e6)),
        "prefill": cell(RATES[0], fixed(2)),
        "decode": cell(RATES[1], fixed(2)),
        "qualities": [judge.text(one) for one, judge in zip(row, judges, strict=True)],
        "seconds": cell("compress_seconds", fixed(0)),
        "peak": cell("peak_memory_bytes", fixed(2, 1e9)),
        "chosen": ", ".join(f"{count} {method}" for method, count in sorted(s.chosen.items()))
        if s.method == "auto" else "",
    }  # fmt: skip
