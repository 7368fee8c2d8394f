"""`write_report`: one page that shows what a compression did, as Markdown and as self-contained HTML."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tinycomp.eval import path_plot, plots
from tinycomp.eval.table import COLUMNS, best, dense_row, number, print_table, relative, remarks, significant, text

__all__ = ["facts_of", "print_table", "standalone", "template", "write_report"]

NO_PLOTS = "Plots need matplotlib, which is not installed: pip install 'tinycomp[report]' and write the report again."
LISTED_SKIPS = 12


def write_report(out_dir: str | Path, results: Mapping[str, Any]) -> list[Path]:
    """Write report.md and report.html, and with matplotlib the plots that report.md shows as SVG files beside it.

    Args:
        out_dir: folder, made where it is missing; files of these names are replaced.
        results: `title, model, machine, protocol {name, hash}, command, rows, compressions, notes`; rows hold the keys
            of `table.COLUMNS` with `name, method, ratio, plain, note` and, from `Speed`, `flags`; compressions are
            `CompressionReport.to_dict()`, with `coverage()` under "coverage" where it was measured. Values that were
            not measured are absent or None.

    Returns:
        The files, report.md first.

    Raises:
        ValueError: a missing key, or no rows.
    """
    for key in ("title", "rows"):
        if not results.get(key):
            raise ValueError(f"report: got no {key!r}, keys are {sorted(results)}; add it")
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(results)
    context = _context(results)
    written = [folder / "report.md", folder / "report.html"]
    for name, _, svg in pictures:
        written.append(folder / f"report-{name}.svg")
        written[-1].write_text(standalone(svg), encoding="utf-8")
    written[0].write_text(template("report.md.j2").render(context, pictures=pictures), encoding="utf-8")
    written[1].write_text(template("report.html.j2").render(context, pictures=pictures), encoding="utf-8")
    return written


@cache
def template(name: str) -> Any:
    """The Jinja template of this name beside this file."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("tinycomp.eval", ""), autoescape=name.endswith(".html.j2"), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)


def _pictures(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(file name, caption, SVG) of every plot that the results have numbers for; none without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(f"report: {NO_PLOTS}", stacklevel=3)
        return []
    rows, compressions = results["rows"], plots.chosen(results.get("compressions") or ())
    names = [_compression_name(c) for c in compressions]
    pictures = []
    if plots.has_points(rows, "perplexity"):
        caption = (
            "Quality against bytes on disk. Down and to the left is better; the numbers are the ratio asked for, the "
            "dashed line joins the rows that no other beats in both."
        )
        pictures.append(("quality", caption, plots.quality_plot(rows)))
    if plots.has_points(rows, "decode_tokens_s"):
        caption = (
            "Speed against bytes on disk. The dashed line is the rate at which a model of that size would decode if it "
            "read its weights as fast as the dense model did in the same run."
        )
        pictures.append(("speed", caption, plots.speed_plot(rows)))
    if compressions:
        shown = len([c for c in results["compressions"] if c.get("records")])
        more = f" The first {len(compressions)} of {shown} compressions." if shown > len(compressions) else ""
        caption = f"Error per layer: relative error of each matrix's outputs on the calibration inputs.{more}"
        pictures.append(("error", caption, plots.error_plot(compressions, names)))
        caption = f"Sizes chosen per layer: stored numbers of each matrix after, as a fraction of before.{more}"
        pictures.append(("kept", caption, plots.kept_plot(compressions, names)))
    searched = path_plot.searched(results)
    if searched is not None:
        caption = (
            "The path: loss of the masked model and share of the parameters whose units have entered, by step; what "
            "was kept of each sublayer; the ratio from which on half of its units are kept, small is important."
        )
        pictures.append(("path", caption, path_plot.path_plot(searched)))
    return pictures


def standalone(svg: str) -> str:
    """The plot as a file: dark ink on white, because a file does not know the page around it."""
    svg = svg.replace("currentColor", "#222").replace("var(--faint, #888)", "#888")
    end = svg.index(">") + 1
    return f'{svg[:end]}<rect width="100%" height="100%" fill="white"/>{svg[end:]}'


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    rows, dense = results["rows"], dense_row(results["rows"])
    marked, shown = best(rows), _columns_with_values(rows)
    table = []
    for index, row in enumerate(rows):
        cells = []
        for column in shown:
            ratio = relative(row, dense, column)
            cells.append(
                {
                    "text": text(row, column),
                    "best": (index, column.key) in marked,
                    "relative": "" if ratio is None else f"{ratio:.2f}×",
                }
            )
        table.append({"name": row["name"], "note": _row_note(row), "dense": row is dense, "cells": cells})
    return {
        "title": results["title"],
        "facts": facts_of(results),
        "command": results.get("command"),
        "columns": shown,
        "table": table,
        "remarks": remarks(rows),
        "notes": list(results.get("notes") or ()),
        "compressions": [_compression(c) for c in results.get("compressions") or ()],
        "no_plots": NO_PLOTS if importlib.util.find_spec("matplotlib") is None else "",
    }


def _columns_with_values(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [column for column in COLUMNS if any(number(row, column.key) is not None for row in rows)]


def _row_note(row: Mapping[str, Any]) -> str:
    parts = [str(row["note"])] if row.get("note") else []
    if row.get("plain") and str(row.get("method", "")).lower() != "dense":
        parts.append("plain model: loads without tinycomp")
    return "; ".join(parts)


def facts_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The header: what was measured, how, and where."""
    protocol, machine = results.get("protocol") or {}, results.get("machine") or {}
    facts = [("Model", str(results["model"]))] if results.get("model") else []
    if protocol.get("name"):
        facts.append(("Perplexity protocol", f"{protocol['name']} (hash {protocol.get('hash', 'unknown')})"))
    hardware = [str(machine["cpu"])] if machine.get("cpu") else []
    for key, unit in (("cores", "cores"), ("threads", "threads"), ("memory_gb", "GB")):
        if machine.get(key):
            hardware.append(f"{machine[key]} {unit}")
    if machine.get("load_average") is not None:
        hardware.append(f"load {machine['load_average']}")
    if hardware:
        facts.append(("Machine", ", ".join(hardware)))
    limits = [
        f"{what} {machine[key]} {unit}"
        for key, what, unit in (("stream_gb_s", "memory read", "GB/s"), ("gemm_gf_s", "matrix product", "GFLOP/s"))
        if machine.get(key)
    ]
    if limits:
        facts.append(("Measured limits", ", ".join(limits)))
    versions = [f"{key} {machine[key]}" for key in ("tinycomp", "torch", "transformers", "python") if machine.get(key)]
    if versions:
        facts.append(("Software", ", ".join(versions)))
    return facts


def _compression_name(compression: Mapping[str, Any]) -> str:
    if compression.get("name"):
        return str(compression["name"])
    methods = [str(m.get("method", m)) if isinstance(m, Mapping) else str(m) for m in compression.get("methods") or ()]
    ratio = number(compression, "ratio_achieved")
    name = " + ".join(dict.fromkeys(methods)) or "compression"
    return name if ratio is None else f"{name}, {ratio:.3g} kept"


def _compression(compression: Mapping[str, Any]) -> dict[str, Any]:
    """One compression as the page shows it: facts, coverage, what was skipped by reason, fallbacks."""
    requested, achieved = number(compression, "ratio_requested"), number(compression, "ratio_achieved")
    facts = []
    if achieved is not None:
        asked = "" if requested is None else f" (asked for {requested:g})"
        facts.append(("Kept of the targeted parameters", f"{achieved:.4g}{asked}"))
    for key, label in (
        ("targeted_parameters", "Targeted parameters"),
        ("parameters_before", "Parameters before"),
        ("parameters_after", "Parameters after"),
    ):
        if (value := number(compression, key)) is not None:
            facts.append((label, f"{value:,.0f}"))
    if (seconds := number(compression, "seconds")) is not None:
        facts.append(("Time", f"{seconds:.1f} s"))
    if (peak := number(compression, "peak_memory_bytes")) is not None:
        facts.append(("Peak memory", f"{peak / 1e9:.2f} GB"))
    if compression.get("allocation"):
        facts.append(("Allocation", str(compression["allocation"])))
    if compression.get("fingerprint"):
        facts.append(("Fingerprint", str(compression["fingerprint"])))
    return {
        "name": _compression_name(compression),
        "facts": facts,
        "coverage": _coverage(compression.get("coverage") or {}),
        "skipped": _skipped(compression.get("skipped") or ()),
        "fallbacks": list(compression.get("fallbacks") or ()),
        "worst": _worst(compression.get("records") or ()),
    }


def _coverage(coverage: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(module class, touched or not, number of modules, MB)"""
    return [
        (
            row["module"],
            "compressed" if row["touched"] else "untouched",
            str(row["modules"]),
            f"{row['bytes'] / 1e6:.1f}",
        )
        for row in coverage.get("classes") or ()
    ]


def _skipped(skipped: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Grouped by reason, most parameters first; long lists are cut and say so."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for item in skipped:
        groups[str(item["reason"])].append(item)
    totals = {reason: sum(int(i.get("parameters") or 0) for i in items) for reason, items in groups.items()}
    out = []
    for reason in sorted(groups, key=totals.__getitem__, reverse=True):
        paths = [str(item["path"]) for item in groups[reason]]
        more = f" and {len(paths) - LISTED_SKIPS} more" if len(paths) > LISTED_SKIPS else ""
        shown = ", ".join(paths[:LISTED_SKIPS]) + more
        out.append({"reason": reason, "paths": shown, "parameters": f"{totals[reason]:,}"})
    return out


def _worst(records: Sequence[Mapping[str, Any]], count: int = 5) -> list[tuple[str, str, str, str]]:
    """(path, method, kept, relative error) of the matrices with the largest relative error."""
    measured = [r for r in records if math.isfinite(number(r, "relative_error") or math.nan)]
    measured.sort(key=lambda r: float(r["relative_error"]), reverse=True)
    return [
        (
            r["path"],
            str(r.get("method", "")),
            f"{r['size_after'] / max(r['size_before'], 1):.3f}",
            significant(r["relative_error"]),
        )
        for r in measured[:count]
    ]
