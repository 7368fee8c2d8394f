"""Tables of `fusion.py`'s results: accuracy against removed blocks, regret, recovery and control, costs."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from tinycomp.signals.registry import price

RESAMPLES = 4000


def merged(name: str) -> str:
    """The three random orders are one strategy."""
    return "random" if name.startswith("random") else name


def answers(cells: list[dict[str, Any]], strategy: str, k: int) -> np.ndarray:
    """(test samples of all cells,) mean correctness of a strategy with k removed blocks."""
    parts = []
    for cell in cells:
        sets = [s[k - 1] for n, s in cell["strategies"].items() if merged(n) == strategy] if k else [[]]
        rows = [np.array([int(c) for c in cell["test"][json.dumps(sorted(s))]]) for s in sets]
        parts.append(np.mean(rows, axis=0))
    return np.concatenate(parts)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """(mean, lower, upper): 95 % percentile bootstrap of the mean; `values` may be differences of two strategies."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    means = values[draws].mean(1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def not_better(values: np.ndarray, seed: int = 0) -> float:
    """Share of bootstrap means that are not above 0: the one-sided p of "the first is better"."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return float((values[draws].mean(1) <= 0).mean())


def regret(cell: dict[str, Any], strategy: str, k: int) -> float:
    """Validation accuracy that the best set of k blocks has over the strategy's."""
    best = max(v for key, v in cell["validation"].items() if len(json.loads(key)) == k)
    sets = [s[k - 1] for n, s in cell["strategies"].items() if merged(n) == strategy]
    return best - statistics.mean(cell["validation"][json.dumps(sorted(s))] for s in sets)


def mean_regret(cells: list[dict[str, Any]], strategy: str) -> float:
    return statistics.mean(regret(c, strategy, k) for c in cells for k in range(1, c["depth"]))


def best_single(cells: list[dict[str, Any]]) -> str:
    """The single signal with the least regret over all cells: chosen in hindsight, which favours it."""
    others = ("fusion", "random", "every", "top", "exhaustive")
    return min((n for n in cells[0]["strategies"] if not n.startswith(others)), key=lambda n: mean_regret(cells, n))


def classifier_tables(cells: list[dict[str, Any]]) -> list[str]:
    names = sorted({merged(n) for n in cells[0]["strategies"]}, key=lambda n: mean_regret(cells, n))
    depth = cells[0]["depth"]
    lines = [
        f"## Classifiers: {len({c['set'] for c in cells})} sets, seeds {sorted({c['seed'] for c in cells})}", "",
        f"Test accuracy in % of {len(answers(cells, 'random', 0))} samples in all, without recovery; in brackets what",
        "it has over random order, a 95 % interval of a paired bootstrap; in all: the mean over sizes. Regret: mean",
        "distance in points from the best of all sets of the same size, on validation samples, over sizes, sets and",
        "seeds.", "",
        "| strategy | " + " | ".join(f"{k} removed" for k in range(depth)) + " | over random, in all | regret |",
        "|---" * (depth + 3) + "|",
    ]  # fmt: skip
    for name in names:
        gains = [answers(cells, name, k) - answers(cells, "random", k) for k in range(1, depth)]
        row = [f"{100 * answers(cells, name, 0).mean():.1f}"]
        for k, gain in enumerate(gains, 1):
            row.append(f"{100 * answers(cells, name, k).mean():.1f} ({_points(gain)})")
        row.append(_points(np.mean(gains, axis=0)))
        lines.append(f"| {name} | " + " | ".join(row) + f" | {100 * mean_regret(cells, name):.2f} |")
    return [*lines, "", *claims(cells, names, depth), "", *ratio_table(cells, names, depth), ""]


def _points(difference: np.ndarray) -> str:
    """The 95 % interval of a mean difference, in points."""
    _, low, high = interval(difference)
    return f"{100 * low:+.1f}..{100 * high:+.1f}"


def claims(cells: list[dict[str, Any]], names: list[str], depth: int) -> list[str]:
    """The two acceptance claims, with what was found."""
    fused, best = [n for n in names if n.startswith("fusion")], best_single(cells)
    against = " | ".join(["against random, all sizes: points, p", *(f"at {k}" for k in range(1, depth))])
    lines = [
        f"Best single signal in hindsight: {best}, regret {100 * mean_regret(cells, best):.2f} points. Fusion:", "",
        "| fusion | regret | at most the best single's | " + against + " |",
        "|---" * (depth + 3) + "|",
    ]  # fmt: skip
    for name in fused:
        found = mean_regret(cells, name)
        gains = [answers(cells, name, k) - answers(cells, "random", k) for k in range(1, depth)]
        row = []
        for difference in (np.mean(gains, axis=0), *gains):
            row.append(f"{100 * difference.mean():+.1f}, {not_better(difference):.3f}")
        verdict = "yes" if found <= mean_regret(cells, best) + 1e-12 else "no"
        lines.append(f"| {name} | {100 * found:.2f} | {verdict} | " + " | ".join(row) + " |")
    return lines


def ratio_table(cells: list[dict[str, Any]], names: list[str], depth: int) -> list[str]:
    """Recovery with the control, and accuracy to size, whose unit is points of accuracy per million parameters."""
    cells = [c for c in cells if "recovered" in c]
    if not cells:
        return []
    order = list(cells[0]["recovered"])
    lines = [
        f"Recovery ({len(cells)} of the sets and seeds), and accuracy to size in accuracy points per million",
        "parameters (all parameters):", "",
        "| model | M parameters | accuracy before | after recovery | gain | points per M before | after | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    whole = 100 * answers(cells, "random", 0).mean() / (cells[0]["parameters"][0] / 1e6)
    for name in order:
        before, after = (
            np.concatenate([[int(b) for b in c["recovered"][name][when]] for c in cells])
            for when in ("before", "after")
        )
        size = statistics.mean(c["recovered"][name]["parameters"] for c in cells) / 1e6
        mean, low, high = interval((after - before).astype(float))
        lines.append(
            f"| {name} | {size:.2f} | {100 * before.mean():.1f} | {100 * after.mean():.1f} | {100 * mean:+.1f} "
            f"({100 * low:+.1f}..{100 * high:+.1f}) | {100 * before.mean() / size:.3f} | "
            f"{100 * after.mean() / size:.3f} | x {100 * after.mean() / size / whole:.3f} |"
        )
    return lines


def signal_tables(cells: list[dict[str, Any]]) -> list[str]:
    pairs = [(p["predicted"], p["measured"]) for c in cells for p in c["predictions"]]
    rho = spearmanr(*zip(*pairs, strict=True)).statistic
    lines = [
        f"Predicted against measured change of the loss (forest, five folds, {len(pairs)} removals): rank correlation "
        f"{rho:.2f}.",
        "",
    ]
    parts = sorted({p for c in cells for p in c["signal_seconds"]})  # skip_loss has passes of its own
    cost = ", ".join(f"{p} {statistics.mean(c['signal_seconds'].get(p, 0) for c in cells):.2f}" for p in parts)
    lines += [f"Processor seconds of the signals, by what they need: {cost}.", ""]
    names = list(cells[0]["correlations"])
    prices = ", ".join(f"{n} {price(n, cells[0]['depth']):g}" for n in names)
    lines += [f"Price of each alone, in forward passes of the model over the samples: {prices}.", ""]
    lines += [
        "Spearman rank correlation between signals over the blocks, mean over sets and seeds (all turned so that large",
        "means keep):",
        "",
    ]
    lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for a in names:
        row = [f"{statistics.mean(c['correlations'][a][b] for c in cells):.2f}" for b in names]
        lines.append(f"| {a} | " + " | ".join(row) + " |")
    return [*lines, ""]


def decoder_table(cells: list[dict[str, Any]]) -> list[str]:
    counts = cells[0]["counts"]
    lines = [
        f"## SmolLM2, seeds {sorted(c['seed'] for c in cells)}", "",
        f"Perplexity {cells[0]['protocol']} ({cells[0]['hash']}), dense {cells[0]['dense']:.2f}; no recovery;",
        "geometric mean over seeds (and random orders).", "",
        "| strategy | " + " | ".join(f"{k} removed" for k in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]  # fmt: skip
    rows: dict[str, list[float]] = {}
    for name in {merged(n) for n in cells[0]["strategies"]}:
        found = [s for c in cells for n, s in c["strategies"].items() if merged(n) == name]
        rows[name] = [float(np.exp(np.mean([np.log(s[i]["perplexity"]) for s in found]))) for i in range(len(counts))]
    for name, values in sorted(rows.items(), key=lambda item: item[1][-1]):
        lines.append(f"| {name} | " + " | ".join(f"{v:.2f}" for v in values) + " |")
    return [*lines, ""]


def figure(cells: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against removed blocks with intervals, and predicted against measured change, as one SVG."""
    from matplotlib.figure import Figure

    fused = min((n for n in cells[0]["strategies"] if n.startswith("fusion")), key=lambda n: mean_regret(cells, n))
    shown = [fused, best_single(cells), "skip_loss", "block_influence", "every-other", "random"]
    made = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = made.subplots(1, 2, width_ratios=(3, 2))
    removed = np.arange(cells[0]["depth"])
    for i, name in enumerate(dict.fromkeys(shown)):
        found = 100 * np.array([interval(answers(cells, name, int(k))) for k in removed])
        errors = np.abs(found[:, 1:] - found[:, :1]).T
        left.errorbar(removed + 0.06 * (i - 2.5), found[:, 0], errors, label=name, capsize=2, lw=1.4, elinewidth=0.8)
    left.set(xlabel="blocks removed", ylabel="test accuracy, %, with 95 % intervals", xticks=removed)
    left.legend(fontsize=8, frameon=False)
    pairs = np.array([(p["predicted"], p["measured"]) for c in cells for p in c["predictions"]])
    right.scatter(pairs[:, 0], pairs[:, 1], s=6, alpha=0.4, linewidths=0)
    ends = [pairs.min(), pairs.max()]
    right.plot(ends, ends, lw=0.8, color="grey")
    right.set(xlabel="predicted change of minus the loss, nats", ylabel="measured change, nats")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    made.savefig(path)


def write(folder: Path) -> None:
    """Write report.md and its figure from the results in `folder`, and print it."""
    found = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*-*.json"))}
    cells, decoders = [c for c in found.values() if "set" in c], [c for c in found.values() if "counts" in c]
    for cell in cells:
        if recovered := found.get(f"recovered-{cell['set']}-{cell['seed']}"):
            cell["recovered"] = recovered
    lines = ["# Layer pruning", ""]
    if cells:
        figure(cells, folder / "fusion.svg")
        lines += ["![accuracy against removed blocks; predicted against measured change](fusion.svg)", ""]
        lines += classifier_tables(cells) + signal_tables(cells)
    if decoders:
        lines += decoder_table(decoders)
    (folder / "report.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write(Path(sys.argv[1]))
    else:
        print("usage: python bench/fusion_tables.py RESULTS_FOLDER")
