"""all-MiniLM-L6-v2 as a whole: sentences per second of dense and compressed forms, probe accuracy beside speed.

    python bench/sentences.py [--quick] [--ratio 0.5] [--seeds 0 1 2] [--threads 2] [--batch 32]

Film-review snippets, sorted by length and padded inside a batch, as an embedding service would take them. Dense: torch
in float32, bfloat16 and dynamic int8, our kernel in float32 and int8. Compressed at --ratio of the parameters of all
linears in the blocks: SPP (attention and feed-forward, without a search), Auto, SVD, and WidthPrune, whose ratio is of
the feed-forward part alone; SPP also with its linears on our kernel and in int8. No training. "No linear layers"
returns zeros at once: no compression can be faster. Accuracy is of a linear classifier on the features, mean over the
calibration's seeds. Models are timed interleaved in this process, those of the first seed. Lines are appended to
bench/results/sentences.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model import Free, replaced, rounded, torch_int8
from torch import Tensor, nn

import tinycomp as tc
from tinycomp.eval.machine import machine
from tinycomp.eval.probes import Probe, joined, minilm
from tinycomp.eval.size import size_of
from tinycomp.eval.timing import time_interleaved
from tinycomp.layers import DenseLinear

RESULTS = Path(__file__).parent / "results" / "sentences.jsonl"
CALIBRATION = 256  # snippets


def batches(probe: Probe, size: int, count: int) -> list[dict[str, Tensor]]:
    """`count` batches spread over the lengths of the test part."""
    rows = sorted(probe.inputs[probe.train :], key=lambda row: row["input_ids"].shape[1])
    starts = torch.linspace(0, len(rows) - size, count).long().tolist()
    return [joined(rows[start : start + size]) for start in starts]


def compressed(probe: Probe, ratio: float, seed: int) -> dict[str, nn.Module]:
    data = probe.calibration(CALIBRATION, seed)
    configs = {
        f"SPP {ratio}": tc.SPP(ratio=ratio, steps=0, seed=seed),
        f"Auto {ratio}": tc.Auto(ratio=ratio, seed=seed),
        f"SVD {ratio}": tc.SVD(ratio=ratio, seed=seed),
        f"WidthPrune {ratio}": tc.WidthPrune(ratio=ratio, seed=seed),
    }
    found = {name: tc.compress(probe.model, config, data, progress=False)[0] for name, config in configs.items()}
    found[f"SPP {ratio}, our kernel"] = own(copy.deepcopy(found[f"SPP {ratio}"]))
    found[f"SPP {ratio} int8"] = rounded(copy.deepcopy(found[f"SPP {ratio}"]), 8)
    return found


def own(model: nn.Module) -> nn.Module:
    """Linear layers on our dense kernel."""
    return replaced(model, lambda _, module: DenseLinear.from_linear(module) if isinstance(module, nn.Linear) else None)


def dense(probe: Probe) -> dict[str, nn.Module]:
    found = {"dense float32": probe.model, "dense bfloat16": copy.deepcopy(probe.model).bfloat16()}
    int8 = torch_int8(probe.model)
    if int8 is not None:
        found["dense int8, torch"] = int8
    found["dense float32, ours"] = own(copy.deepcopy(probe.model))
    found["dense int8, ours"] = rounded(copy.deepcopy(probe.model), 8)
    return found


def over(model: nn.Module, work: list[dict[str, Tensor]]) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> None:
        for batch in work:
            model(**batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few test sentences")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = options.seeds[:1] if options.quick else options.seeds
    probe = minilm(2000, 500 if options.quick else 4000)
    made = {}
    for seed in seeds:
        made[seed] = compressed(probe, options.ratio, seed)
        print(f"seed {seed}: compressed", flush=True)
    found = dense(probe) | made[seeds[0]]
    work = batches(probe, options.batch, 8)
    timed = found | {"no linear layers": replaced(copy.deepcopy(probe.model), lambda _, module: Free(module))}
    times = time_interleaved({name: over(model, work) for name, model in timed.items()}, 3 if options.quick else 15)
    print("timed; measuring accuracy", flush=True)
    rates = {name: timing.rate(options.batch * len(work)) for name, timing in times.items()}
    about = machine()
    for name in timed:
        models = [own[name] for own in made.values() if name in own] or [timed[name]] * (name in found)
        measured = [probe.measure(model) for model in models]
        row: dict[str, Any] = {
            "name": name, "protocol": probe.protocol, "sentences_s": rates[name].median,
            "p20": rates[name].p20, "p80": rates[name].p80, "batch": options.batch, "threads": options.threads,
            "vs_dense_float32": rates[name].median / rates["dense float32"].median,
            "bytes_memory": size_of(timed[name]).bytes_memory, "accuracy": [m["accuracy"] for m in measured],
            "feature_error": [m["feature_error"] for m in measured], "machine": about,
        }  # fmt: skip
        text = f"{name:20} {row['sentences_s']:7.1f} sentences/s {row['vs_dense_float32']:5.2f}x dense float32"
        text += f" | {row['bytes_memory'] / 1e6:5.1f} MB"
        if measured:
            text += f" | accuracy {100 * sum(row['accuracy']) / len(measured):.2f} %"
            text += f" ({', '.join(f'{100 * a:.2f}' for a in row['accuracy'])})"
            text += f" | feature error {100 * sum(row['feature_error']) / len(measured):.1f} %"
        print(text, flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
