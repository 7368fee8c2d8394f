"""The result table: one definition of its columns for terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: the row's key, a heading of at most two short lines, how a value is written, which value is best.

    relative: the value divided by the dense row's says more than the value; shown beside it where there is room.
    """

    key: str
    title: str
    unit: str
    write: Callable[[float], str]
    best: Literal["min", "max"] | None = None
    relative: bool = False


def significant(value: float) -> str:
    """Four significant digits, thousands separated, powers of ten from a million on: 23.98, 11,243, 2.4e6."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 1e6:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if size else "0"


def fixed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """Writer with `digits` decimals, after division by `scale`."""
    return lambda value: f"{value / scale:,.{digits}f}" if math.isfinite(value) else significant(value)


COLUMNS = (
    Column("achieved_ratio", "kept", "", fixed(3)),
    Column("parameters", "param.", "M", fixed(1, 1e6), "min"),
    Column("bytes_disk", "disk", "MB", fixed(1, 1e6), "min", relative=True),
    Column("bytes_memory", "memory", "MB", fixed(1, 1e6), "min"),
    Column("flops_per_token", "FLOPs", "M/tok", fixed(1, 1e6), "min"),
    Column("prefill_tokens_s", "prefill", "tok/s", fixed(1), "max", relative=True),
    Column("decode_tokens_s", "decode", "tok/s", fixed(1), "max", relative=True),
    Column("perplexity", "perpl.", "", significant, "min"),
    Column("compress_seconds", "time", "s", fixed(1)),
    Column("peak_memory_bytes", "peak", "GB", fixed(2, 1e9)),
)


def number(row: Row, key: str) -> float | None:
    """The row's value as a float, or None where it was not measured."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def text(row: Row, column: Column) -> str:
    """The cell as it is printed; a dash where nothing was measured."""
    value = number(row, column.key)
    return "–" if value is None else column.write(value)


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The uncompressed model's row."""
    return next((row for row in rows if str(row.get("method", "")).lower() == "dense"), None)


def relative(row: Row, dense: Row | None, column: Column) -> float | None:
    """The row's value over the dense one's, where the column shows it."""
    if dense is None or row is dense or not column.relative:
        return None
    value, base = number(row, column.key), number(dense, column.key)
    return value / base if value is not None and base else None


def best(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """(row index, key) of the best value of each ranked column among the compressed rows; ties share the mark."""
    marked: set[tuple[int, str]] = set()
    dense = dense_row(rows)
    compressed = [(index, row) for index, row in enumerate(rows) if row is not dense]
    if len(compressed) < 2:
        return marked
    for column in COLUMNS:
        values = {i: v for i, row in compressed if (v := number(row, column.key)) is not None and not math.isnan(v)}
        if column.best is None or not values:
            continue
        top = min(values.values()) if column.best == "min" else max(values.values())
        marked |= {(index, column.key) for index, value in values.items() if value == top}
    return marked


def front(rows: Sequence[Row], cost: str = "bytes_disk", loss: str = "perplexity") -> list[int]:
    """Indices of the rows that no other row beats in both, cheapest first; equal rows are all kept."""
    points = [
        (c, q, index)
        for index, row in enumerate(rows)
        if (c := number(row, cost)) is not None and (q := number(row, loss)) is not None and not math.isnan(q)
    ]
    kept = [
        (c, q, index)
        for c, q, index in points
        if not any((a <= c and b <= q) and (a < c or b < q) for a, b, _ in points)
    ]
    return [index for _, _, index in sorted(kept)]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the numbers say against the rows: beaten by another row, slower than dense, beyond a physical limit."""
    dense = dense_row(rows)
    out = []
    for winner, losers in _beaten(rows):
        size, quality = (text(rows[winner], _column(key)) for key in ("bytes_disk", "perplexity"))
        names = ", ".join(str(rows[i]["name"]) for i in losers)
        out.append(
            f"Beaten in both bytes and quality by {rows[winner]['name']} ({size} MB, perplexity {quality}): {names}."
        )
    broken = [str(row["name"]) for row in rows if math.isnan(number(row, "perplexity") or 0.0)]
    if broken:
        out.append(f"The perplexity is not a number, the model is broken: {', '.join(broken)}.")
    slower = [
        f"{row['name']} ({speed:.2f} times)"
        for row in rows
        if (speed := relative(row, dense, _column("decode_tokens_s"))) is not None and speed < 1
    ]
    if slower:
        out.append(f"Decoding is slower than dense here: {', '.join(slower)}.")
    return out + [f"{row['name']}: {flag}." for row in rows for flag in row.get("flags") or ()]


def _beaten(rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
    """(front row, compressed rows it beats): every beaten row once, under the beater of best quality."""
    dense, best_first = dense_row(rows), sorted(front(rows), key=lambda i: number(rows[i], "perplexity") or 0.0)
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        size, quality = number(row, "bytes_disk"), number(row, "perplexity")
        if row is dense or index in best_first or size is None or quality is None or math.isnan(quality):
            continue
        winner = next(
            i
            for i in best_first
            if (number(rows[i], "bytes_disk") or 0) <= size and (number(rows[i], "perplexity") or 0) <= quality
        )
        groups.setdefault(winner, []).append(index)
    return list(groups.items())


def _column(key: str) -> Column:
    return next(column for column in COLUMNS if column.key == key)


def print_table(results: Mapping[str, Any], console: Any = None) -> None:
    """Print the result table to the terminal; it fits 80 columns.

    Args:
        results: dict of `write_report`.
        console: rich Console, or None for a new one.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console() if console is None else console
    rows = results["rows"]
    protocol = results.get("protocol") or {}
    table = Table(
        title=results.get("title"),
        caption=f"perplexity: {protocol.get('name', 'not measured')}  {protocol.get('hash', '')}".rstrip(),
        caption_justify="left",
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
        box=None,
        header_style="bold",
    )
    table.add_column("model", overflow="fold", min_width=14, max_width=24)
    for column in COLUMNS:
        table.add_column(f"{column.title}\n{column.unit}", justify="right", no_wrap=True)
    marked = best(rows)
    for index, row in enumerate(rows):
        cells = [f"[bold green]{text(row, c)}[/]" if (index, c.key) in marked else text(row, c) for c in COLUMNS]
        table.add_row(str(row["name"]), *cells)
    console.print(table)
