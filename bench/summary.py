"""The rows of bench/ops.py as a table, bench/results/ops.md: which a whole run and `python bench/summary.py` write.

Of each row the last one timed with one thread on the machine that timed the last line of ops.jsonl.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cases import cases

COLUMNS = ["op", "layer", "inputs", "dtype", "rows", "% of the limit"]
COLUMNS += ["of dense torch", "of the best peer (least to most)", "lost to"]


def summary(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: medians over the sizes of a layer; what a row that is slower than a peer has lost to."""
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "time_us" in row:
            groups[row["op"], row["label"], row["m"], row["dtype"]].append(row)
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|" + "---|" * len(COLUMNS)
    for key, found in sorted(groups.items()):

        def median(name: str, found: list[dict[str, Any]] = found) -> str:
            values = [row[name] for row in found if name in row]
            return f"{statistics.median(values):.2f}" if values else "-"

        ratios = [row["ratio_best_peer"] for row in found if "ratio_best_peer" in row]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        lost = sorted({row["best_peer"] for row in found if row.get("ratio_best_peer", 1) < 1})
        cells = [*map(str, key), str(len(found)), f"{statistics.median(row['percent'] for row in found):.0f}"]
        cells += [median("ratio_dense"), median("ratio_best_peer") + spread, ", ".join(lost)]
        yield f"| {' | '.join(cells)} |"


def write(results: Path) -> None:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    machine = lines[-1]["machine"]["cpu"]
    known = {case.key for case in cases(quick=False)}
    rows = {row["key"]: row for row in lines if row["machine"]["cpu"] == machine and row["threads"] == 1}
    rows = {key: row for key, row in rows.items() if key in known}
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    about = f"{len(rows)} rows of `python bench/ops.py`, {machine}, one thread, medians over sizes; commits {commits}."
    results.with_suffix(".md").write_text("\n".join([about, "", *summary(rows.values())]) + "\n")


if __name__ == "__main__":
    write(Path(__file__).parent / "results" / "ops.jsonl")
