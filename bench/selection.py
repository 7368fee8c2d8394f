"""CUR of one matrix: the published way (exact SVD, DEIM loop, pseudo-inverses) against ours, in one process.

    python bench/selection.py [--size 4096] [--rank 512] [--repeats 1] [--methods sketch-qr ...]
                              [--cpu-time] [--json]

The published path appears twice: with textbook DEIM (one r x r solve per step) and with the greedy step that CURing
released. Ours is one sketch, pivoted QR, the link U from CholeskyQR2 bases, and the fold C U. Errors are relative
Frobenius errors of the product. The target is stated against the cheaper and against the more accurate of the two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy
import torch
from torch import Tensor

from tinycomp import selection
from tinycomp.eval.machine import machine
from tinycomp.eval.timing import time_interleaved
from tinycomp.methods import _curing as curing

RESULTS = Path(__file__).parent / "results" / "selection.jsonl"
Factors = tuple[Tensor, Tensor]
TIME_RATIO, ERROR_RATIO = 0.1, 1.005


def power_law(size: int, decay: float, coherence: float, seed: int = 0) -> Tensor:
    """Square float32 matrix with singular values i^-decay; coherence > 0 gives outlier rows and columns."""
    generator = torch.Generator().manual_seed(seed)

    def basis() -> Tensor:
        scale = torch.exp(coherence * torch.randn(size, 1, generator=generator))
        return torch.linalg.qr(scale * torch.randn(size, size, generator=generator))[0]

    return basis() * torch.arange(1, size + 1) ** -decay @ basis().T


def deim_loop(vectors: Tensor) -> Tensor:
    """DEIM as published: one dense solve per step."""
    chosen = [int(vectors[:, 0].abs().argmax())]
    for j in range(1, vectors.shape[1]):
        coefficients = torch.linalg.solve(vectors[chosen, :j], vectors[chosen, j])
        chosen.append(int((vectors[:, j] - vectors[:, :j] @ coefficients).abs().argmax()))
    return torch.tensor(chosen)


def published(w: Tensor, rank: int, greedy: Callable[[Tensor], Tensor]) -> Factors:
    left, _, right = selection.singular_vectors(w, rank, exact=True)
    c, r = w[:, greedy(right)], w[greedy(left)]
    return c @ curing.link_pinv(c, w, r), r


def ours(w: Tensor, rank: int, method: str) -> Factors:
    rows, columns = selection.select_pair(w, rank, method)
    c, r = w[:, columns], w[rows]
    return c @ curing.link_fast(c, w, r).to(w.dtype), r


def error(w: Tensor, factors: Factors) -> float:
    return float((w - factors[0] @ factors[1]).double().norm() / w.double().norm())


def run_case(
    name: str, w: Tensor, rank: int, repeats: int, methods: list[str], clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """Times interleaved, one row per path; the errors come from the timed runs."""
    results: dict[str, Factors] = {}

    def candidate(label: str, make: Callable[[], Factors]) -> Callable[[], None]:
        def run() -> None:
            results[label] = make()

        return run

    paths: dict[str, Callable[[], Factors]] = {
        "published DEIM": lambda: published(w, rank, deim_loop),
        "published CURing": lambda: published(w, rank, curing.greedy_released),
    }
    for method in methods:
        paths[f"ours {method}"] = lambda method=method: ours(w, rank, method)  # type: ignore[misc]
    corner = w[:512, :512].contiguous()  # loads the libraries; a warm-up at full size would cost minutes
    published(corner, min(64, rank), deim_loop)
    ours(corner, min(64, rank), methods[0])
    timings = time_interleaved({k: candidate(k, v) for k, v in paths.items()}, repeats, warmup=0, clock=clock)
    errors = {label: error(w, factors) for label, factors in results.items()}
    peers = [label for label in paths if label.startswith("published")]
    seconds, best_error = min(timings[p].median for p in peers), min(errors[p] for p in peers)
    rows: list[dict[str, Any]] = []
    for label in paths:
        t = timings[label]
        time_ratio, error_ratio = t.median / seconds, errors[label] / best_error
        met = None if label in peers else time_ratio <= TIME_RATIO and error_ratio <= ERROR_RATIO
        row = {"case": name, "path": label, "size": list(w.shape), "rank": rank, "met": met}
        row |= {"seconds": t.median, "p20": t.quantile(0.2), "p80": t.quantile(0.8), "time_ratio": time_ratio}
        row |= {"error": errors[label], "error_ratio": error_ratio}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=[selection.DEFAULT], choices=sorted(selection.SELECTIONS))
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of all threads, for a busy machine")
    parser.add_argument("--json", action="store_true", help=f"append the rows to {RESULTS.name}")
    arguments = parser.parse_args()
    here = machine(limits=False)
    about = {
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent.parent, capture_output=True, text=True
        ).stdout.strip(),
        "scipy": scipy.__version__,
        "clock": "cpu" if arguments.cpu_time else "wall",
        **here,
    }
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(", ".join(f"{key} {about[key]}" for key in ("clock", "cpu", "threads", "torch", "load_average")))
    for name, decay, coherence in (("power law", 1.0, 0.0), ("outliers", 0.5, 0.7)):
        w = power_law(arguments.size, decay, coherence)
        for row in run_case(name, w, arguments.rank, arguments.repeats, arguments.methods, clock):
            met = "" if row["met"] is None else f" | target {'met' if row['met'] else 'MISSED'}"
            print(
                f"{name:9} {row['path']:18} {arguments.size}^2 r={arguments.rank} fp32 | {row['seconds']:7.2f} s "
                f"({row['p20']:.2f}..{row['p80']:.2f}) | x{row['time_ratio']:.3f} of published | "
                f"error {row['error']:.5f} x{row['error_ratio']:.4f}{met}",
                flush=True,
            )
            if arguments.json:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps({**about, **row}) + "\n")


if __name__ == "__main__":
    main()
