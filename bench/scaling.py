"""What more threads bring to memory-bound rows of the CPU kernels, and to a read of the same weights.

    python bench/scaling.py [--threads 2] [--quick] [--small-pages] [--filter TEXT]

One input each, weights cold, wall clock, all candidates of a row in the same rounds. `called` is one call from Python
for each weight, `in one call` the same by `ops.sequence`, as `tc.fuse_` runs layers; `read` is the weights read and
added up, `read, called` that and a call of an op that has next to nothing to do. A target above what the last one gains
cannot be met by calls from Python. Rows are appended to bench/results/scaling.jsonl as they finish.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from case import Case, copies_of, last_level_cache, rounds  # noqa: E402
from cases import dense, low_rank, shared  # noqa: E402
from ceilings import Memory  # noqa: E402
from ops import commit  # noqa: E402
from pages import large_share, use_large_pages  # noqa: E402

from tinycomp import ops  # noqa: E402
from tinycomp.eval.machine import load_average, machine  # noqa: E402
from tinycomp.eval.timing import time_interleaved  # noqa: E402

RESULTS = HERE / "results" / "scaling.jsonl"
TARGET = 1.8
HEAD = "| | KB | one thread, us | GB/s | several, us | GB/s | called | in one call | read | read, called | |"


def memory_bound() -> Iterator[Case]:
    """One input each: what another thread can help with is reading weights."""
    for dtype, out, columns, divisor in ((torch.bfloat16, 4096, 4096, 8), (torch.float32, 1536, 576, 2)):
        yield from low_rank(out, columns, 1, dtype, divisor)
        if dtype == torch.bfloat16:
            yield from shared(out, columns, 1, dtype)
        yield from dense(out, columns, 1, dtype)


def in_one_call(op: str, copies: list[tuple[Any, ...]]) -> Callable[[], object]:
    """A program that calls the op with each of `copies`."""
    defaults = [a.default_value for a in getattr(torch.ops.tinycomp, op).default._schema.arguments]
    tensors: list[Tensor | None] = []
    lines = []
    for args in copies:
        words = [op]
        for value in (*args, *defaults[len(args) :]):
            if isinstance(value, Tensor):
                words.append(f"%{len(tensors)}")
                tensors.append(value)
            else:
                words.append("-" if value is None else str(value))
        lines.append(" ".join(words))
    program = "\n".join([*lines, f"return %{len(tensors)}"])
    return lambda: ops.sequence(tensors, program)


def with_threads(count: int, call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(count)
        call()

    return run


def measured(case: Case, memory: Memory, options: argparse.Namespace, cold: int) -> dict[str, Any]:
    """Microseconds of a weight with one and several threads, by candidate."""
    args, op = case.make(), getattr(ops, case.op)
    copies = copies_of(args, max(2, -(-cold // case.weights)))
    runs: dict[str, Callable[[], object]] = {name: rounds(calls) for name, calls in memory.reads(copies).items()}
    runs |= {"called": rounds([partial(op, *a) for a in copies]), "in one call": in_one_call(case.op, copies)}
    counts = (1, options.threads)
    each = {f"{name} {n}": with_threads(n, run) for name, run in runs.items() for n in counts}
    timed = time_interleaved(each, 3 if options.quick else 11, 1, time.perf_counter)
    us = {name: [1e6 * timed[f"{name} {n}"].median / len(copies) for n in counts] for name in runs}
    gains = {name: one / several for name, (one, several) in us.items()}
    return {"key": case.key, "bytes": case.weights, "threads": options.threads, "us": us, "gains": gains}


def line(row: dict[str, Any]) -> str:
    gains, (one, several) = row["gains"], row["us"]["called"]
    # The pattern of reading that is the fastest with one thread.
    read = min(
        (name for name in row["us"] if name in ("read in order", "read side by side")), key=lambda n: row["us"][n][0]
    )
    limit = gains["read and call"]
    verdict = "met" if gains["called"] >= TARGET else "above the limit" if limit < TARGET else "missed"
    cells = [row["key"], f"{row['bytes'] / 1e3:.0f}"]
    for us in (one, several):
        cells += [f"{us:.1f}", f"{row['bytes'] / us / 1e3:.1f}"]
    cells += [f"{gain:.2f}" for gain in (gains["called"], gains["in one call"], gains[read], limit)]
    return "| " + " | ".join([*cells, f"{verdict}, load {row['load_average']:.2f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, less cold memory: whether it works")
    parser.add_argument("--threads", type=int, default=2, help="how many are held against one")
    parser.add_argument("--filter", default="", help="only rows whose key holds this text")
    parser.add_argument("--small-pages", action="store_true", help="memory on such pages as the system gives by itself")
    options = parser.parse_args()
    if not options.small_pages:
        use_large_pages()
    torch.set_grad_enabled(False)
    cold = (100 << 20) if options.quick else max(260 << 20, last_level_cache())
    memory = Memory(time.perf_counter, 3 * cold)
    rates = []
    for count in (1, options.threads):
        torch.set_num_threads(count)
        rates.append(memory.rate("stream", 5))
    about: dict[str, Any] = {"machine": machine(limits=False), "commit": commit(), "stream": rates}
    print(
        f"{about['machine']['cpu']}, load {load_average():.2f}; memory gives {rates[0]:.1f} GB/s to one thread", end=" "
    )
    print(f"and {rates[1]:.1f} to {options.threads}: {rates[1] / rates[0]:.2f} times\n\n{HEAD}\n|" + "---|" * 11)
    RESULTS.parent.mkdir(exist_ok=True)
    for case in memory_bound():
        if options.filter not in case.key:
            continue
        row = measured(case, memory, options, cold) | {"load_average": load_average()}
        print(line(row), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row | about | {"large_pages": large_share()}) + "\n")


if __name__ == "__main__":
    main()
