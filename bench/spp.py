"""SPP against one-shot scores and WidthPrune: perplexity or accuracy of sliced models, without any training.

    python bench/spp.py                                    SmolLM2, seed 0, FFN, ratios 0.9 0.8 0.6
    python bench/spp.py --parts ffn all --seeds 0 1 2      also with attention units
    python bench/spp.py --model minilm|dinov2|FOLDER       an encoder of the tracks (features, accuracy), or a folder
    python bench/spp.py --report                           table and plot of the rows in --output, as Markdown

Every order is cut at the same ratio of the parameters of its units, with the same rounding and the same refit on the
same data; `WidthPrune` allocates and selects by itself. Rows and searches that are finished are not repeated: a killed
run continues, and `--seconds` ends one early (exit code 75 while something is left).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tinycomp as tc
from tinycomp import data as text_data
from tinycomp.calib import StatsStore, collect
from tinycomp.calib.loss import fisher_loss
from tinycomp.compression import shadow_of
from tinycomp.edits import Plan
from tinycomp.eval.machine import machine, peak_memory
from tinycomp.eval.probes import PROBES
from tinycomp.eval.quality import DEFAULT
from tinycomp.methods import Linear
from tinycomp.methods._slicing import slice_units
from tinycomp.models import UnitGroup, UnitPath, spec_of
from tinycomp.pipeline import statistics_of
from tinycomp.surgery import apply_
from tinycomp.tracks.rows import Task, causal_task, probe_task
from tinycomp.train.masks import Masks
from tinycomp.train.path_search import PathSearch, search_path

AGAIN = 75
MEASURES = ("perplexity", "feature_error", "accuracy")  # the first one that a row has is plotted
LONG = "SPP coupled, 13 times the tokens"  # for language models, and only when it is named
SEARCHES = {
    "SPP coupled": {},
    "SPP coupled, V from zero": {"warm": 0.0},
    "SPP coupled, V from zero, compensated": {"warm": 0.0, "compensate": True},
    "SPP released, same lr and steps": {
        "coupled": False, "nonnegative": True, "per_head": False, "loss": "auto", "warm": 0.0,
    },
    "predicted loss, no search": {"steps": 0},
    LONG: {"steps": 200, "samples": 4, "length": 256},  # of 60 steps of 2 x 128
}  # fmt: skip
EQUAL = ", equal widths"  # an order that is cut at the same share in every sublayer; else one ranking of all units
SCORES = ("Wanda-style score", "first-order Taylor", "output energy" + EQUAL, "random")
ORDERS = (*(name for name in SEARCHES if name != LONG), *SCORES)


class OutOfTime(Exception):
    """The time given by --seconds is over; what is finished is kept."""


class Bench:
    """One model and seed: statistics, orders, and the rows that are missing."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.args, self.seed, self.started = args, seed, time.perf_counter()
        self.task = _task(args)
        self.model = self.task.model.eval()
        self.spec = spec_of(self.model)
        self.groups = tc.unit_groups(self.model)
        raw = self.task.batches(seed)
        self.batches = [text_data.for_model(b, self.model) for b in raw]
        self._grams: dict[str, Tensor] | None = None
        self._surgeon: StatsStore | None = None
        self.folder = args.work / _short([self.task.name, args.windows])
        self.folder.mkdir(parents=True, exist_ok=True)

    def check_time(self, *_: Any) -> None:
        if self.args.seconds and time.perf_counter() - self.started > self.args.seconds:
            raise OutOfTime

    def chosen(self, part: str) -> list[UnitGroup]:
        return [g for g in self.groups if part == "all" or g.kind == "ffn"]

    def grams(self) -> dict[str, Tensor]:
        """Input second moments of the linears that read units or make attention units."""
        if self._grams is None:
            file = self.folder / f"grams-{self.seed}.pt"
            if not file.exists():
                paths = list(dict.fromkeys(m.path for g in self.groups for m in g.members if m.dim or g.kind != "ffn"))
                store = collect(self.model, self.spec, self.batches, frozenset({"gram"}), paths=paths, seed=self.seed)
                torch.save({p: store.get([p])[p].gram for p in paths}, file)
                store.close()
            self._grams = torch.load(file)
        return self._grams

    def linear(self, path: str) -> Linear:
        module: Any = self.model.get_submodule(path)
        transposed = not isinstance(module, nn.Linear)
        weight = module.weight.detach().T if transposed else module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        return Linear(path, weight, bias, self.grams().get(path), transposed=transposed, dtype=weight.dtype)

    def order(self, name: str, part: str) -> UnitPath:
        name = name.removesuffix(EQUAL)
        file = self.folder / f"{_short([name, part, self.seed, _fields(self.args, name)])}.safetensors"
        if not file.exists():
            started = time.process_time()
            with peak_memory() as peak:
                path = self._make(name, part)
            path.config |= {"cpu_seconds_of_last_run": time.process_time() - started, "peak_bytes": peak.bytes}
            path.save(file)
        return UnitPath.load(file)

    def _make(self, name: str, part: str) -> UnitPath:
        groups = self.chosen(part)
        if name in SEARCHES:
            config = PathSearch(**_fields(self.args, name) | {"seed": self.seed, "checkpoint_every": 5})
            folder = self.folder / _short([name, part, config.model_dump()])
            return search_path(self.model, groups, self.batches, config, folder=folder, progress=self._searching)
        if name == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return UnitPath.from_scores({g.name: torch.rand(g.count, generator=generator) for g in groups})
        if name == "first-order Taylor":
            return UnitPath.from_scores(self._taylor(groups))
        score = self._wanda if name == "Wanda-style score" else self._energy
        return UnitPath.from_scores({g.name: score(g) for g in groups})

    def _searching(self, _: str, done: int, total: int, note: str) -> None:
        if done % 5 == 0:
            print(f"  {done}/{total} {note}", file=sys.stderr, flush=True)
            self.check_time()

    def _taylor(self, groups: Sequence[UnitGroup]) -> dict[str, Tensor]:
        """Mean over batches of the squared mask gradient at one; labels drawn from the model where it is stationary."""
        with Masks(self.model, groups) as masks:
            total = [torch.zeros_like(v) for v in masks.values]
            for number, batch in enumerate(self.batches[: self.args.taylor]):
                mask = batch.get("attention_mask")
                loss = fisher_loss(self.model(**batch), None if mask is None else mask.bool(), number)
                for t, g in zip(total, torch.autograd.grad(loss, masks.values), strict=True):
                    t += g.square()
        return dict(zip(masks.names(), total, strict=True))

    def _wanda(self, group: UnitGroup) -> Tensor:
        """Mean |W| rms over the weights that read the unit; for queries and keys, over those that make it."""
        sums, count = torch.zeros(group.count), 0
        for member in group.members if group.kind == "qk" else group.members[-1:]:
            linear = self.linear(member.path)
            scores = linear.weight.abs() * linear.gram.diagonal().clamp(min=0).sqrt()  # type: ignore[union-attr]
            sums += scores.mean(1 - member.dim if member.dim == 0 else 0)[member.features].mean(1)
            count += 1
        return sums / count

    def _energy(self, group: UnitGroup) -> Tensor:
        """|w_j|² E[h_j²], what the unit adds to the output; for queries and keys E[q²] E[k²]."""
        if group.kind != "qk":
            linear = self.linear(group.members[-1].path)
            energy = linear.weight.square().sum(0) * linear.gram.diagonal()  # type: ignore[union-attr]
            return energy[group.members[-1].features].sum(1)
        product = torch.ones(group.count)
        for member in group.members:
            linear = self.linear(member.path)
            energy = ((linear.weight @ linear.gram) * linear.weight).sum(1)  # type: ignore[operator]
            product *= energy[member.features].sum(1)
        return product

    def cut(self, path: UnitPath, part: str, ratio: float, uniform: bool) -> tuple[nn.Module, float, list[int]]:
        """(sliced model, achieved ratio, kept feed-forward widths)."""
        groups = self.chosen(part)
        kept = path.kept(groups, ratio, 8, uniform)
        linears = {m.path: self.linear(m.path) for g in groups for m in g.members}
        result = slice_units(linears, groups, kept)
        model = shadow_of(self.model)
        apply_(model, Plan(result.edits), result.tensors)
        total = sum(g.count * g.parameters_per_unit for g in groups)
        left = sum(len(kept[g.name]) * g.parameters_per_unit for g in groups)
        return model, left / total, [len(kept[g.name]) for g in groups if g.kind == "ffn"]

    def row(self, name: str, part: str, ratio: float) -> dict[str, Any]:
        started = time.process_time()
        extra: dict[str, Any] = {}
        if name == "dense":
            model, achieved = self.model, 1.0
        elif name == "WidthPrune":
            config = tc.WidthPrune(ratio=ratio, seed=self.seed)
            if self._surgeon is None:
                self._surgeon = statistics_of(self.model, [config], self.batches, seed=self.seed, progress=False)
            model, report = tc.compress(self.model, config, statistics=self._surgeon, progress=False)
            achieved = report.ratio_achieved
        else:
            path = self.order(name, part)
            model, achieved, widths = self.cut(path, part, ratio, name.endswith(EQUAL))
            searched = name.removesuffix(EQUAL) in SEARCHES
            extra = {"widths": widths, "search": path.config} if searched else {"widths": widths}
        extra["build_cpu_seconds"] = round(time.process_time() - started, 1)
        return {
            "model": self.task.name, "protocol": self.task.protocol, "hash": self.task.hash, "seed": self.seed,
            "name": name, "part": part, "ratio": ratio, "achieved": achieved,
            **self.task.measure(model), **extra,
        }  # fmt: skip


def _fields(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Fields of the search that makes this order, defaults among them; none for the others."""
    name = name.removesuffix(EQUAL)
    return PathSearch(**{**args.search, **SEARCHES[name]}).model_dump() if name in SEARCHES else {}


def _short(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _task(args: argparse.Namespace) -> Task:
    if args.model in PROBES:
        return probe_task(PROBES[args.model](*args.examples), args.ratios, args.windows)
    return causal_task(args.model, args.ratios, args.tokens, args.windows, 512)


def jobs(args: argparse.Namespace) -> list[tuple[str, str, float]]:
    found = [("dense", "-", 1.0)]
    for part in args.parts:
        names = [*args.only] if args.only else [*ORDERS, "WidthPrune"]
        found += [(n, part, r) for n in names for r in args.ratios if not (n == "WidthPrune" and part != "ffn")]
    return found


def run(args: argparse.Namespace) -> int:
    rows = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {r["key"] for r in rows}
    for seed in args.seeds:
        bench: Bench | None = None
        for name, part, ratio in jobs(args):
            size = [*args.examples] if args.model in PROBES else [args.tokens]
            key = _short([args.model, *size, args.windows, _fields(args, name), seed, name, part, ratio])
            if key in done:
                continue
            try:
                bench = bench or Bench(args, seed)
                bench.check_time()
                row = {"key": key} | bench.row(name, part, ratio)
            except OutOfTime:
                return AGAIN
            with args.output.open("a") as file:
                file.write(json.dumps(row | {"machine": machine(limits=False)}) + "\n")
            print(name, part, ratio, row.get("perplexity", row.get("accuracy")), flush=True)
    return 0


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A table for every model, part and measure, mean over seeds (and their range), best in bold."""
    lines: list[str] = []
    for model, part in sorted({(r["model"], r["part"]) for r in rows if r["part"] != "-"}):
        own = [r for r in rows if r["model"] == model and r["part"] == part]
        dense = next(r for r in rows if r["model"] == model and r["name"] == "dense")
        what = "feed-forward units" if part == "ffn" else "feed-forward and attention units"
        lines += [f"### {model}, {what}", ""]
        for measure in (m for m in MEASURES if m in dense):
            lines += [f"{measure} `{dense['protocol']}`, dense {dense[measure]:.4g}", "", *_table(own, measure), ""]
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], measure: str) -> list[str]:
    ratios = sorted({r["ratio"] for r in rows}, reverse=True)
    names = list(dict.fromkeys(r["name"] for r in rows))
    found = {(n, q): [r[measure] for r in rows if r["name"] == n and r["ratio"] == q] for n in names for q in ratios}
    best = max if measure == "accuracy" else min
    winners = {q: best((n for n in names if found[n, q]), key=lambda n, q=q: _mean(found[n, q])) for q in ratios}
    lines = ["| order | " + " | ".join(f"{q:g}" for q in ratios) + " |", "|---|" + "---|" * len(ratios)]
    return lines + [
        f"| {name} | " + " | ".join(_cell(found[name, q], winners[q] == name) for q in ratios) + " |" for name in names
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(values: Sequence[float], best: bool) -> str:
    if not values:
        return "-"
    text = f"{_mean(values):.4g}" + (f" ({min(values):.4g}..{max(values):.4g})" if len(values) > 1 else "")
    return f"**{text}**" if best else text


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pairs = sorted({(r["model"], r["part"]) for r in rows if r["part"] != "-"})
    names = sorted({r["name"] for r in rows if r["part"] != "-"})
    colours = dict(zip(names, (tab := pyplot.colormaps["tab20"].colors)[::2] + tab[1::2], strict=False))
    height = -(-len(pairs) // 3)
    figure, axes = pyplot.subplots(height, 3, figsize=(12, 3.4 * height), layout="constrained", squeeze=False)
    lines: dict[str, Any] = {}
    for axis in axes.flat[len(pairs) :]:
        axis.remove()
    for axis, (model, part) in zip(axes.flat, pairs, strict=False):
        own = [r for r in rows if (r["model"], r["part"]) == (model, part)]
        measure = next(m for m in MEASURES if m in own[0])
        for name in names:
            points: dict[float, list[float]] = {}
            for r in own:
                if r["name"] == name:
                    points.setdefault(r["ratio"], []).append(r[measure])
            values = [_mean(points[k]) for k in sorted(points)]
            if values:
                (lines[name],) = axis.plot(sorted(points), values, marker="o", ms=4, color=colours[name])
        axis.set_title(f"{model}, neurons" + ("" if part == "ffn" else " and attention"), fontsize=9)
        axis.set(xlabel="kept share of the parameters", ylabel=measure.replace("_", " "), yscale="log")
        best = max(min(r[measure] for r in own if r["ratio"] == q) for q in {r["ratio"] for r in own})
        axis.set_ylim(top=min(axis.get_ylim()[1], 4 * best))  # orders that destroy the model would hide the others
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--parts", nargs="+", choices=("ffn", "all"), default=["ffn"])
    parser.add_argument("--only", nargs="*", default=[], help="names of orders; also followed by ', equal widths'")
    parser.add_argument("--tokens", type=int, default=DEFAULT.max_tokens)
    parser.add_argument("--examples", type=int, nargs=2, default=[300, 300], help="training, test part of the probe")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--taylor", type=int, default=1000, help="batches of the Taylor score")
    parser.add_argument("--search", type=json.loads, default={}, help="fields of PathSearch as JSON")
    parser.add_argument("--work", type=Path, default=Path("build/spp"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "spp.jsonl")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args(argv)
    if args.report:
        rows = [json.loads(line) for line in args.output.read_text().splitlines()]
        print(report(rows))
        plot(rows, args.output.with_suffix(".svg"))
        return 0
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
