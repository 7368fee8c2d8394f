"""The speed targets of the CPU kernels, each measured beside its peer, as one table.

    python bench/targets.py [--peers DIR] [--quick] [--cpu-time] [--small-pages] [--filter TEXT]

One thread, 4096 x 4096 but where a row says so. `ratio` is the peer's time over ours in one interleaved run, `limit`
the same with ours at the measured ceilings of this machine (of memory: our weights read alone, in the same rounds),
`structure` bytes of the dense weight over ours and `kernel` what remains of the speed-up over dense torch. Ours and
peers are on pages of 2 MB where the system has them, unless `--small-pages` is given. A target above its limit cannot
be met here; in brackets the limit if a call from Python is added, which costs tens of microseconds where the weights
have driven its code out of the caches. Rows are appended to bench/results/targets.jsonl as they finish.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from case import Case  # noqa: E402
from cases import low_rank, masked, other, shared  # noqa: E402
from ops import Bench, commit  # noqa: E402
from pages import use_large_pages  # noqa: E402

from tinycomp.eval.machine import load_average, machine  # noqa: E402

RESULTS = HERE / "results" / "targets.jsonl"
SIZE = 4096


class Target(NamedTuple):
    """A row of the table: what is held against which peers (the fastest of them counts), and the wanted ratio."""

    name: str
    case: str  # end of the key of a case
    peers: tuple[str, ...]
    ratio: float


BF16, CSR = "bfloat16", ("torch csr fp32", "scipy csr fp32", "torch bsr fp32")
SHARED = ("torch composite", "torch fp32 composite")
TARGETS = (
    Target("CUR d/8 bf16, M=1", f"lowrank_linear/d/8/4096x4096/M1/{BF16}", ("torch folded",), 2.0),
    Target("CUR d/8 bf16, M=8", f"lowrank_linear/d/8/4096x4096/M8/{BF16}", ("torch folded",), 3.0),
    Target("CUR d/8 bf16, M=32", f"lowrank_linear/d/8/4096x4096/M32/{BF16}", ("torch fp32 folded",), 1.9),
    Target("CUR d/8 bf16, M=128", f"lowrank_linear/d/8/4096x4096/M128/{BF16}", ("torch fp32 folded",), 1.2),
    Target("CUR d/8 bf16 for fp16, M=128", f"lowrank_linear/d/8/4096x4096/M128/{BF16}", ("torch fp32 folded",), 1.8),
    Target(
        "CUR d/8 int8 against dense int4, M=1",
        f"quant_lowrank_linear/d/8 pivoted int8/4096x4096/M1/{BF16}",
        ("openvino int4",),
        2.5,
    ),
    Target("SWSC n/16+r32 bf16, M=1", f"swsc_linear/n/16+r32/4096x4096/M1/{BF16}", SHARED, 2.4),
    Target("SWSC n/16+r32 bf16, M=8", f"swsc_linear/n/16+r32/4096x4096/M8/{BF16}", SHARED[:1], 4.0),
    Target("SWSC n/16+r32 bf16, M=32", f"swsc_linear/n/16+r32/4096x4096/M32/{BF16}", SHARED[1:], 2.3),
    Target(
        "SWSC n/16+r32 bf16 against dense int4, M=1",
        f"swsc_linear/n/16+r32/4096x4096/M1/{BF16}",
        ("openvino int4",),
        4.5,
    ),
    Target("mask 50 %, bf16, M=1", f"masked_linear/bitmask 50%/4096x4096/M1/{BF16}", CSR, 2.0),
    Target("mask 75 %, bf16, M=1", f"masked_linear/bitmask 75%/4096x4096/M1/{BF16}", CSR, 1.9),
    Target("mask 90 %, bf16, M=1", f"masked_linear/index 90%/4096x4096/M1/{BF16}", CSR, 2.6),
    Target("mask 75 %, bf16, M=32", f"masked_linear/bitmask 75%/4096x4096/M32/{BF16}", CSR, 1.8),
    Target("mask 90 %, bf16, M=32", f"masked_linear/index 90%/4096x4096/M32/{BF16}", CSR, 2.0),
    Target("2:4 bf16 against dense torch bf16, M=1", f"masked_linear/2:4 50%/4096x4096/M1/{BF16}", ("dense",), 3.2),
    Target("block 32, 90 %, M=128", f"masked_linear/block32 90%/4096x4096/M128/{BF16}", ("torch bsr fp32",), 2.5),
    Target(
        "k-means assignment 4096 x 4096, k 256",
        "kmeans_assign//4096x4096 k256/M0/float32",
        ("torch gemm", "scikit-learn"),
        1.4,
    ),
    Target(
        "k-means assignment, bf16 for fp16",
        "kmeans_assign//4096x4096 k256/M0/bfloat16",
        ("torch fp32 gemm", "scikit-learn"),
        2.5,
    ),
    Target("Bregman step, twin stored", "split_bregman_step_//16M/M0/float32", ("torch.compile",), 1.18),
    Target(
        "Bregman step, twin computed", "split_bregman_step_//16M no gamma, bits/M0/float32", ("torch.compile",), 1.55
    ),
    Target(
        "Bregman step, half entered, twin stored",
        "split_bregman_step_//16M half entered/M0/float32",
        ("torch.compile",),
        1.18,
    ),
    Target(
        "Bregman step, half entered, twin computed",
        "split_bregman_step_//16M half entered no gamma, bits/M0/float32",
        ("torch.compile",),
        1.55,
    ),
    Target("Bregman step, twin stored: its traffic alone", "split_bregman_step_//16M/M0/float32", ("traffic",), 0.85),
    Target("column norms: a read alone", "column_norms//4096x4096/M0/float32", ("read",), 0.85),
)


def _read(args: tuple[Any, ...]) -> Callable[[], object]:
    from tinycomp import _C

    return lambda: _C.read_words(args[0].data_ptr(), args[0].numel(), 8)


def _traffic(args: tuple[Any, ...]) -> Callable[[], object]:
    """What the step reads and writes where nothing has entered, and an addition for each number."""
    mask, dual, gamma, _, grad = (a.clone() for a in args[:5])

    def touch(mask: torch.Tensor, dual: torch.Tensor, gamma: torch.Tensor, grad: torch.Tensor) -> None:
        mask.add_(grad)
        dual.add_(gamma)

    compiled = torch.compile(touch)
    return lambda: compiled(mask, dual, gamma, grad)


# No peers, but what moves the same bytes and computes nothing to speak of.
ALONE = {"read": _read, "traffic": _traffic}
NOT_HERE = (
    "fp16 multiply-add (CUR d/8 M=128 1.8, k-means 2.5): products of bfloat16 stand in, in pairs or in tiles of AMX",
    "DeepSparse: does not install, CSR of torch and scipy stands in",
    "selection: bench/selection.py; k-means to equal inertia: bench/kmeans.py",
)


def all_cases() -> dict[str, Case]:
    """Cases by key; arguments are made when a case runs."""
    made: list[Case] = []
    for m in (1, 8, 32, 128):
        for family in (shared, masked):
            made += family(SIZE, SIZE, m, torch.bfloat16)
        made += low_rank(SIZE, SIZE, m, torch.bfloat16, 8)
    return {case.key: case for case in [*made, *other()]}


def measured(bench: Bench, target: Target, case: Case) -> dict[str, Any]:
    """One row; `ratio` is missing where no peer ran."""
    case.peers = {name: make for name, make in (case.peers | ALONE).items() if name in target.peers}
    bench.peers.wanted = frozenset(target.peers)
    row = bench.row(case) | {"target": target._asdict(), "load_average": load_average()}
    if "time_us" not in row:
        return row
    times = {name: us for name, us in row["others_us"].items() if name in target.peers}
    if not times:
        return row
    peer = min(times, key=lambda name: times[name])
    found = {"peer": peer, "ratio": times[peer] / row["time_us"], "limit": times[peer] / row["limit_us"]}
    return row | found | {"limit_called": times[peer] / (row["limit_us"] + row["call_us"])}


def verdict(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return row.get("fault", "peer is not installed")
    wanted = row["target"]["ratio"]
    if row["ratio"] >= wanted:
        text = "met"
    elif wanted > row["limit"]:
        text = "above the limit"
    else:
        text = "above the limit with a call" if wanted > row["limit_called"] else "missed"
    return text + (f" | FAULT {row['fault']}" if "fault" in row else "")


def table(rows: list[dict[str, Any]]) -> str:
    head = "| | ours, us (p20..p80) | % of ceiling | peer | ratio | target | limit | structure x kernel | |"
    lines = [head, "|" + "---|" * 9]
    for row in rows:
        cells = [row["target"]["name"], "", "", "", "", f"{row['target']['ratio']:.2f}", "", "", verdict(row)]
        if "time_us" in row:
            cells[1] = f"{row['time_us']:.0f} ({row['p20_us']:.0f}..{row['p80_us']:.0f})"
            cells[2] = f"{row['percent']:.0f}"
        if "ratio" in row:
            cells[3], cells[4] = row["peer"], f"{row['ratio']:.2f}"
            cells[6] = f"{row['limit']:.2f} ({row['limit_called']:.2f})"
        if "structure" in row:
            cells[7] = f"{row['structure']:.2f} x {row['kernel']:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def keep(row: dict[str, Any], about: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row | about) + "\n")


def compare(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    bench = Bench(options)
    about = {
        "machine": machine(limits=False),
        "commit": commit(),
        "peaks": bench.peaks,
        "versions": bench.peers.versions,
    }
    limits = ", ".join(f"{name} {value:.1f}" for name, value in bench.peaks.items())
    print(
        f"{about['machine']['cpu']}, one thread, load {load_average():.2f}; GB/s and G operations/s: {limits}",
        flush=True,
    )
    found, rows = all_cases(), []
    for target in TARGETS:
        if options.filter and options.filter not in target.name:
            continue
        rows.append(measured(bench, target, found[target.case]))
        print(f"{target.name}: {verdict(rows[-1])}, load {rows[-1].get('load_average', 0):.2f}", flush=True)
        keep(rows[-1], about)
    print("\n" + table(rows))
    print(f"\nOf this process's memory {max(row.get('large_pages', 0) for row in rows):.0%} was on pages of 2 MB")
    print("\nNot in the table: " + "; ".join(NOT_HERE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, less cold memory: whether it works")
    parser.add_argument("--peers", type=Path, help="environment of requirements-peers.txt")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process, for a shared machine")
    parser.add_argument("--filter", help="only rows whose name holds this text")
    parser.add_argument("--small-pages", action="store_true", help="memory on such pages as the system gives by itself")
    options = parser.parse_args()
    if not options.small_pages:
        use_large_pages()
    torch.set_grad_enabled(False)
    options.threads = 1
    compare(options)


if __name__ == "__main__":
    main()
