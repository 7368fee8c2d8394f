"""k-means to the same inertia: ours against torch's products, scikit-learn and faiss, in one process.

    python bench/kmeans.py [--peers DIR] [--repeats 7] [--threads 1] [--quick]

All start from random points. torch takes 20 steps, each a product, an argmin and an indexed sum, or stops as ours does:
where a step gains less than 0.1 %; scikit-learn and faiss take at most 20, the former with its own early stop. Ours
starts on all columns or on a projection. Inertia is of the total, the mean of seeds. A peer counts where our inertia is
at most 0.5 % above its own; the target, 5 times the speed of the fastest of them, counts our early stop to what is
ours, so that "torch, same stop" is shown beside. Lines are appended to bench/results/kmeans.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from ops import commit  # noqa: E402
from peers import Peers  # noqa: E402
from selection import power_law  # noqa: E402

from tinycomp.eval.machine import load_average, machine  # noqa: E402
from tinycomp.eval.timing import time_interleaved  # noqa: E402
from tinycomp.io.load import default_model, load_model  # noqa: E402
from tinycomp.methods._kmeans import Lloyd, cluster  # noqa: E402

RESULTS = HERE / "results" / "kmeans.jsonl"
STEPS, TARGET, ALLOWED = 20, 5.0, 1.005
Run = Callable[[int], Tensor]  # seed -> labels


def torch_lloyd(points: Tensor, k: int, tolerance: float = -1.0) -> Run:
    norms = float(points.square().sum())

    def run(seed: int) -> Tensor:
        centroids = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]]
        before = float("inf")
        for _ in range(STEPS):
            scores, labels = torch.addmm(centroids.square().sum(1), points, centroids.T, alpha=-2).min(1)
            counts = torch.bincount(labels, minlength=k)[:, None]
            sums = torch.zeros_like(centroids).index_add_(0, labels, points)
            centroids = torch.where(counts > 0, sums / counts.clamp_min(1), centroids)
            now = norms + float(scores.sum())
            if before - now <= tolerance * now:
                break
            before = now
        return labels

    return run


def sklearn_lloyd(points: Tensor, k: int, library: Any) -> Run:
    from sklearn.cluster import KMeans

    array = points.numpy()

    def run(seed: int) -> Tensor:
        return torch.from_numpy(
            KMeans(k, init="random", n_init=1, max_iter=STEPS, random_state=seed).fit(array).labels_
        )

    return run


def faiss_lloyd(points: Tensor, k: int, library: Any) -> Run:
    array = points.numpy()

    def run(seed: int) -> Tensor:
        most = -(-len(points) // k)  # else it samples
        found = library.Kmeans(
            points.shape[1], k, niter=STEPS, seed=seed + 1, max_points_per_centroid=most, min_points_per_centroid=1
        )
        found.train(array)
        return torch.from_numpy(found.index.search(array, 1)[1][:, 0])

    return run


def ours(points: Tensor, k: int, **fields: Any) -> Run:
    return lambda seed: cluster(points, k, Lloyd(steps=STEPS, init="random", seed=seed, **fields)).labels


def inertia(points: Tensor, k: int, labels: Tensor) -> float:
    """Of the means of what the labels put together, over that of one cluster."""
    index = labels.long()
    sums = torch.zeros(k, points.shape[1], dtype=torch.float64).index_add_(0, index, points.double())
    means = (sums / torch.bincount(index, minlength=k).clamp_min(1)[:, None]).float()
    return float((points - means[index]).square().sum() / (points - points.mean(0)).square().sum())


def data(quick: bool) -> dict[str, tuple[Tensor, int]]:
    size = 1024 if quick else 4096
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(300, size, generator=generator)
    grouped = torch.randn(size, size, generator=generator).add_(
        kinds[torch.randint(300, (size,), generator=generator)], alpha=0.5
    )
    found = {"power law": (power_law(size, 0.5, 0.0), size // 16), "300 kinds": (grouped, size // 16)}
    model, _ = load_model(default_model())
    linears = [m for name, m in model.named_modules() if name.endswith("mlp.up_proj")][: 2 if quick else 8]
    rows = torch.cat([m.weight.detach().float() for m in linears])
    return found | {f"up_proj of {len(linears)} blocks": (rows, 256)}


def compare(name: str, points: Tensor, k: int, peers: Peers, options: argparse.Namespace) -> list[dict[str, Any]]:
    runs: dict[str, Run] = {"torch": torch_lloyd(points, k)}
    for library, make in (("sklearn", sklearn_lloyd), ("faiss", faiss_lloyd)):
        if library in peers.found:
            runs[library] = make(points, k, peers.found[library])
    others = tuple(runs)
    runs["torch, same stop"] = torch_lloyd(points, k, Lloyd().tolerance)
    runs["ours"] = ours(points, k)
    width = min(512, points.shape[1] // 2)
    runs[f"ours, {width} dimensions first"] = ours(points, k, projection=width)
    labels: dict[str, list[Tensor]] = {label: [] for label in runs}

    def candidate(label: str) -> Callable[[], None]:
        return lambda: labels[label].append(runs[label](len(labels[label])))

    times = time_interleaved({label: candidate(label) for label in runs}, options.repeats, warmup=0)
    reached = {label: sum(inertia(points, k, f) for f in found) / len(found) for label, found in labels.items()}
    rows = []
    for label in runs:
        good = [p for p in others if reached[label] <= ALLOWED * reached[p]]
        row = {"data": name, "size": [*points.shape], "clusters": k, "path": label, "inertia": reached[label]}
        row |= {"seconds": times[label].median, "p20": times[label].quantile(0.2), "p80": times[label].quantile(0.8)}
        if label.startswith("ours") and good:
            peer = min(good, key=lambda p: times[p].median)
            row |= {
                "peer": peer,
                "ratio": times[peer].median / row["seconds"],
                "of_all_peers": len(good) == len(others),
            }
        if "ratio" in row:
            row["ratio_same_stop"] = times["torch, same stop"].median / row["seconds"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="environment of requirements-peers.txt")
    parser.add_argument("--repeats", type=int, default=7, help="each with another seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small matrices: whether it works")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    peers = Peers(options.peers)
    if "sklearn" in peers.found:  # its own threads, and those of its BLAS
        importlib.import_module("threadpoolctl").threadpool_limits(options.threads)
    about = {
        "commit": commit(),
        "threads": options.threads,
        "machine": machine(limits=False),
        "versions": peers.versions,
    }
    print(f"{about['machine']['cpu']}, threads: {options.threads}, load {load_average():.2f}")
    print(
        "| data | | seconds | inertia | fastest peer within 0.5 % | ratio | | of torch, same stop |\n"
        + "|"
        + "---|" * 8
    )
    for name, (points, k) in data(options.quick).items():
        for row in compare(name, points, k, peers, options):
            text = f"| {name}, {points.shape[0]} x {points.shape[1]}, k {k} | {row['path']} | {row['seconds']:.2f} "
            text += f"({row['p20']:.2f}..{row['p80']:.2f}) | {row['inertia']:.4f} | "
            if "ratio" in row:
                met = "met" if row["ratio"] >= TARGET else "missed"
                text += f"{row['peer']} | {row['ratio']:.2f} | {met if row['of_all_peers'] else 'not of all peers'} "
                text += f"| {row['ratio_same_stop']:.2f} |"
            else:
                text += "| | | |"
            print(text, flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row | about | {"load_average": load_average()}) + "\n")


if __name__ == "__main__":
    main()
