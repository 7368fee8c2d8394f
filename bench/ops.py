"""Every op of the registry against dense torch, the torch composite, and peers from other libraries.

    python bench/ops.py [--quick] [--peers DIR] [--threads 1] [--cpu-time] [--filter EXPRESSION] [--base REF] [--resume]
                        [--json] [--small-pages]

Candidates of a row run interleaved in this process, each over copies of its own weights that no cache holds, all of
them on pages of 2 MB where the system has those (`--small-pages`: as the system gives memory). A row is timed only
after its output has passed the tolerance rule. `%` is the time that the machine's measured ceilings allow, over the
time taken; that of memory is a plain read of the same copies in the same rounds (one thread; else of a large buffer).
A row above 105 % of the faster of both is a fault of measurement and says so. `structure` is bytes of the dense weight
over bytes of ours, `kernel` what remains of the speed-up. Lines are appended to bench/results/ops.jsonl; a whole run
(2,084 rows, an hour and a half with all peers) also writes their medians to ops.md and a plot of all rows to ops.png.
`--peers` names the environment of requirements-peers.txt; without it those columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]

from case import Case, copies_of, last_level_cache, rounds  # noqa: E402
from cases import cases  # noqa: E402
from ceilings import Memory, peaks  # noqa: E402
from pages import large_share, use_large_pages  # noqa: E402
from peers import Peers  # noqa: E402
from summary import write as write_table  # noqa: E402

from tinycomp import ops  # noqa: E402
from tinycomp.eval.machine import load_average, machine  # noqa: E402
from tinycomp.eval.timing import Timing, time_interleaved  # noqa: E402

RESULTS = HERE / "results" / "ops.jsonl"
FAULT = 1.05


def wrong(case: Case, args: tuple[Any, ...]) -> str:
    """Empty, or how the op's output misses the tolerance rule."""
    from test_ops import fresh, run
    from tolerance import assert_close, relative_error

    got = run(case.op, fresh(args))
    with ops.use_backend("torch"):
        same, reference = run(case.op, fresh(args)), run(case.op, fresh(args, torch.float64))
    for g, t, r in zip(got, same, reference, strict=True):
        if not g.is_floating_point():
            share = float((g != r).float().mean()) if g.numel() else 0.0
            if share > 1e-3:
                return f"{share:.1%} of integers differ"
        elif case.exact:
            try:
                assert_close(g, t, r, case.key)
            except AssertionError as error:
                return str(error)
        elif relative_error(g, r) > 0.05:
            return f"relative error {relative_error(g, r):.3g}"
    return ""


class Bench:
    """Runs cases and turns them into rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.peers = Peers(options.peers)
        self.cold_bytes = max(100 << 20, 3 * last_level_cache())
        self.memory = Memory(self.clock, max(256 << 20, self.cold_bytes))
        self.peaks = peaks(options.threads, self.memory)
        self.repeats = 3 if options.quick else 9
        self.seconds = 1.0  # of a row; long ones have few repeats, of which they need fewer

    def copies(self, size: int, flops: float = 1) -> int:
        """How many of `size` bytes no cache holds, but at most 50 ms of arithmetic: reading is next to nothing beside
        that, and what the other candidates of a round read keeps them cold as well."""
        cold = max(2, -(-self.cold_bytes // size)) if size else 1
        return min(cold, max(1, int(0.05 * self.peaks["fma"] * 1e9 / flops)))

    def row(self, case: Case) -> dict[str, Any]:
        args = case.make()
        fault = wrong(case, args)
        if fault:
            return {"key": case.key, "op": case.op, "fault": f"output: {fault}"}
        op = getattr(ops, case.op)
        flops = 2 * case.m * math.prod(case.outside) if case.outside else 1

        def copies(size: int) -> int:
            return self.copies(size, flops)

        ours = copies_of(args, copies(case.weights))
        named = {"ours": [lambda a=a: op(*a) for a in ours]}
        dense_bytes = 0
        if case.dense is not None:
            w = case.dense()
            dense_bytes = w.nbytes
            named["dense"] = [lambda v=v: F.linear(args[0], v[0]) for v in copies_of((w,), copies(w.nbytes))]
        for name, make in case.peers.items():  # they keep their own, larger, copies
            named[name] = [make(a) for a in ours[: copies(2 * case.weights)]]
        faults = dict(self.peers.add(named, case, args, copies))
        if case.weights and case.memory == "stream":
            named |= self.memory.reads(ours)
        calls = {k: rounds(v) for k, v in named.items()}
        first = sum(t.median for t in time_interleaved(calls, 1, 0, self.clock).values())
        repeats = min(max(int(self.seconds / first), 3), self.repeats)
        timed = time_interleaved(calls, repeats, 0, self.clock)
        times = {k: Timing(tuple(s / len(named[k]) for s in t.seconds)) for k, t in timed.items()}
        reads = {name: times.pop(name) for name in list(times) if name.startswith("read ")}
        if not reads:  # memory that others use as well is faster in some minutes than in others
            self.peaks[case.memory] = max(self.peaks[case.memory], self.memory.rate(case.memory, 3))
        return self._row(case, args, times, reads, dense_bytes) | ({"peer_faults": faults} if faults else {})

    def _row(
        self, case: Case, args: tuple[Any, ...], times: dict[str, Timing], reads: dict[str, Timing], dense_bytes: int
    ) -> dict[str, Any]:
        cost = ops.OPS[case.op].cost(*args)
        mine = times["ours"].median
        own = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        compute = own.get(case.dtype, "fma") if case.compute == "fma" else case.compute
        arithmetic, memory = cost.flops / self.peaks[compute] / 1e9, cost.bytes / self.peaks[case.memory] / 1e9
        called = reads.pop("read and call", None)
        limit = max(arithmetic, min((t.median for t in reads.values()), default=memory))
        impossible = max(arithmetic, min([memory, *(min(t.seconds) for t in reads.values())])) / FAULT
        row: dict[str, Any] = {
            "key": case.key,
            "op": case.op,
            "label": case.label,
            "shape": case.shape,
            "m": case.m,
            "dtype": str(case.dtype).removeprefix("torch."),
            "time_us": mine * 1e6,
            "p20_us": times["ours"].quantile(0.2) * 1e6,
            "p80_us": times["ours"].quantile(0.8) * 1e6,
            "gb_s": cost.bytes / mine / 1e9,
            "gflop_s": cost.flops / mine / 1e9,
            "limit_us": limit * 1e6,
            "call_us": max(called.median - reads["read in order"].median, 0) * 1e6 if called else 0.0,
            "large_pages": large_share(),
            "percent": 100 * limit / mine,
            "intensity": cost.flops / max(cost.bytes, 1),
            "others_us": {k: t.median * 1e6 for k, t in times.items() if k != "ours"},
        }
        others = {k: v for k, v in row["others_us"].items() if k != "dense"}
        if others:
            row["best_peer"] = min(others, key=lambda name: others[name])
            row["ratio_best_peer"] = min(others.values()) / row["time_us"]
        if "dense" in times:
            row["ratio_dense"] = times["dense"].median / mine
            row["structure"] = dense_bytes / max(case.weights, 1)
            row["kernel"] = row["ratio_dense"] / row["structure"]
        if case.weights and mine < impossible:
            row["fault"] = f"{mine / impossible:.0%} of the least possible time: cached weights or a wrong count"
        return row


def line(row: dict[str, Any]) -> str:
    if "time_us" not in row:
        return f"{row['key']:<62} {row['fault']}"
    text = f"{row['key']:<62} {row['time_us']:>10.1f} us ({row['p20_us']:.1f}..{row['p80_us']:.1f})"
    text += f" | {row['gb_s']:6.1f} GB/s {row['gflop_s']:7.1f} GF/s {row['percent']:4.0f} %"
    if "ratio_dense" in row:
        text += f" | dense {row['ratio_dense']:5.2f}x = {row['structure']:.2f} x {row['kernel']:.2f}"
    if "best_peer" in row:
        text += f" | {row['ratio_best_peer']:5.2f}x {row['best_peer']}"
    return text + (f" | FAULT {row['fault']}" if "fault" in row else "")


def commit() -> str:
    """The last one that changed what is measured, "-dirty" where that has changed since."""
    code = [":/csrc", ":/tinycomp", ":(top,glob)bench/*.py"]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args, "--", *code], cwd=HERE, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("log", "-1", "--format=%h") or "unknown") + ("-dirty" if changed else "")


def run(options: argparse.Namespace, known: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Rows as they are timed, but those of `known` keys."""
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    bench = Bench(options)
    about = {"machine": machine(limits=False), "commit": commit(), "threads": options.threads, "peaks": bench.peaks}
    about |= {"clock": "cpu" if options.cpu_time else "wall", "versions": bench.peers.versions}
    if not options.json:
        print(json.dumps(about), flush=True)
    for case in cases(options.quick):
        if case.key in known or (options.filter and not re.search(options.filter, case.key)):
            continue
        start_load = load_average()
        try:
            row = bench.row(case)
        except (TypeError, NotImplementedError) as error:
            if not options.older:  # only the library of another commit may lack an op or its arguments
                raise
            row = {"key": case.key, "op": case.op, "fault": f"not run: {error}"}
        yield row | {"load_average": start_load} | about


def earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows that an interrupted run of this commit, with these threads and clock, has left; the last one of each key."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    wanted = commit(), options.threads, "cpu" if options.cpu_time else "wall"
    rows = [row for row in map(json.loads, lines) if (row["commit"], row["threads"], row["clock"]) == wanted]
    return list({row["key"]: row for row in rows}.values())


def at_commit(ref: str, options: argparse.Namespace) -> dict[str, float]:
    """Times of the same rows with the library as it was at `ref`, built in a temporary checkout."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), ref], cwd=HERE, check=True)
        try:
            build = [sys.executable, "setup.py", "build_ext", "--inplace"]
            subprocess.run(build, cwd=tree, check=True, capture_output=True)
            command = [sys.executable, str(HERE / "ops.py"), "--json", "--older", "--threads", str(options.threads)]
            command += [*(["--quick"] if options.quick else []), *(["--cpu-time"] if options.cpu_time else [])]
            command += ["--filter", options.filter] if options.filter else []
            command += ["--small-pages"] if options.small_pages else []
            environment = os.environ | {"PYTHONPATH": str(tree)}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)
    found = map(json.loads, done.stdout.splitlines())
    return {row["key"]: row["time_us"] for row in found if "time_us" in row}


def plot(rows: list[dict[str, Any]], peak: dict[str, float], path: Path) -> None:
    """The roofline with our points on it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    grid = [2 ** (i / 4) for i in range(-10, 40)]
    for name, style in (("fma", "-"), ("bf16", "--"), ("vnni", ":")):
        rates = [min(peak["stream"] * i, peak[name]) for i in grid]
        axes.loglog(grid, rates, style, color="grey", linewidth=1, label=f"memory read, {name}")
    writes = [(i, peak["update"] * i) for i in grid if i <= 1]
    axes.loglog(*zip(*writes, strict=True), "-.", color="grey", linewidth=1, label="memory updated in place")
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for number, op in enumerate(sorted({row["op"] for row in rows})):
        chosen = [row for row in rows if row["op"] == op and row["gflop_s"] > 0]
        points = [r["intensity"] for r in chosen], [r["gflop_s"] for r in chosen]
        axes.loglog(
            *points,
            "osD^vPX*"[number % 8],
            color=colours[number % 20],
            markersize=5 if len(rows) < 200 else 2.5,
            label=op,
        )
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("G operations/s")
    axes.set_title(
        f"{rows[0]['machine']['cpu']}, threads: {rows[0]['threads']}, commit {rows[0]['commit']}", fontsize=9
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size of each layer, a few minutes")
    parser.add_argument("--peers", type=Path, help="environment of requirements-peers.txt")
    parser.add_argument("--older", action="store_true", help="leave out rows the library does not know (--base)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of this process, for a shared machine")
    parser.add_argument("--filter", help="only rows whose key this expression finds; the plot stays as it is")
    parser.add_argument("--base", metavar="REF", help="compare with the library at another commit")
    parser.add_argument("--resume", action="store_true", help="leave out rows that this commit has in the file")
    parser.add_argument("--json", action="store_true", help="print rows as JSON, write nothing")
    parser.add_argument("--small-pages", action="store_true", help="memory on such pages as the system gives by itself")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error(f"--cpu-time with --threads {options.threads}, allowed 1; the CPU clock adds threads up")
    if not options.small_pages:
        use_large_pages()
    RESULTS.parent.mkdir(exist_ok=True)
    rows = earlier(options) if options.resume else []
    for row in run(options, {row["key"] for row in rows}):
        print(json.dumps(row) if options.json else line(row), flush=True)
        rows.append(row)
        if not options.json:
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
    if options.json:
        return
    timed = [row for row in rows if "time_us" in row]
    if timed and not options.filter:
        plot(timed, timed[0]["peaks"], RESULTS.with_suffix(".png"))
        if not options.quick:
            write_table(RESULTS)
    if options.base:
        base = at_commit(options.base, options)
        for row in (r for r in timed if r["key"] in base):
            print(f"{row['key']:<62} {base[row['key']] / row['time_us']:.2f}x {options.base}")


if __name__ == "__main__":
    main()
