"""What the command line prints: JSON for programs, tables for people."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console()
err = Console(stderr=True, highlight=False)


def emit(value: dict[str, Any]) -> None:
    """Print one JSON object; a number that JSON does not have (inf, nan) becomes a string."""
    print(json.dumps(_plain(value), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print rows as an aligned table; columns but the first are right-aligned when their cells are numbers."""
    view = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(isinstance(row[index], (int, float, type(None))) for row in rows)
        view.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        view.add_row(*(cell(value) for value in row))
    out.print(view)


def cell(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
