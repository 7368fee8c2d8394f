"""The report's plots, as SVG text whose lines and letters take the colour of the page around them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinycomp.eval.table import Row, dense_row, front, number

# Drawn in these colours and replaced by CSS afterwards, so that one picture suits light and dark pages.
INK, FAINT = "#010203", "#040506"
# Okabe and Ito's palette, without black: distinct for colour-blind readers, visible on white and on near-black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f", "#a6761d")
MARKERS = "osD^vPX<>"
MAX_PANELS = 6


def quality_plot(rows: Sequence[Row]) -> str:
    """Perplexity (log axis) against bytes on disk: a line per method, the dense model, the Pareto front."""
    return _scatter(rows, "perplexity", "perplexity (log scale, lower is better)", log=True, with_front=True)


def speed_plot(rows: Sequence[Row]) -> str:
    """Decode rate against bytes on disk, with the rate that the dense model's bytes per second would give."""
    return _scatter(
        rows, "decode_tokens_s", "decoded tokens per second (higher is better)", log=False, with_front=False
    )


def has_points(rows: Sequence[Row], key: str) -> bool:
    """Whether at least two rows have both coordinates."""
    return len(_points(rows, key)) > 1


def _points(rows: Sequence[Row], key: str) -> list[tuple[float, float, Row]]:
    found = []
    for row in rows:
        x, y = number(row, "bytes_disk"), number(row, key)
        if x is not None and y is not None and math.isfinite(y) and y > 0:
            found.append((x / 1e6, y, row))
    return found


def _scatter(rows: Sequence[Row], key: str, label: str, log: bool, with_front: bool) -> str:
    points, dense = _points(rows, key), dense_row(rows)
    figure, (axes,) = _figure(1, 1, 9.2, 4.8)
    if log:
        _log_axis(axes, [y for _, y, _ in points])
    else:
        axes.set_ylim(0, 1.1 * max(y for _, y, _ in points))
    if with_front:
        best = [(x, y) for i in front(rows) for x, y, row in points if row is rows[i]]
        axes.step(*zip(*best, strict=True), where="post", color=FAINT, lw=1, ls=(0, (4, 3)), label="best for its bytes")
    elif dense is not None and (base := next((p for p in points if p[2] is dense), None)):
        low = min(x for x, _, _ in points)
        xs = [low + (base[0] - low) * i / 60 for i in range(61)]
        axes.plot(xs, [base[1] * base[0] / x for x in xs], color=FAINT, lw=1, ls=(0, (4, 3)), label="dense bytes/s")
    methods = list(dict.fromkeys(str(row.get("method")) for _, _, row in points if row is not dense))
    for index, method in enumerate(methods):
        mine = sorted((x, y) for x, y, row in points if str(row.get("method")) == method)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(*zip(*mine, strict=True), lw=1.6, ms=7, label=method, **style)
    for x, y, row in points:
        if row is dense:
            axes.plot([x], [y], "*", ms=15, color=INK, label="dense", ls="none")
    axes.margins(x=0.06)
    axes.set_xlabel("MB on disk")
    axes.set_ylabel(label)
    axes.grid(True, which="major", color=FAINT, alpha=0.25, lw=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelcolor=INK)
    _label_points(figure, axes, [(x, y, _short(row)) for x, y, row in points if row is not dense])
    return _svg(figure, key)


def _short(row: Row) -> str:
    """What tells this point from the others of its line: the ratio asked for, or the name where there is none."""
    ratio = number(row, "ratio")
    return str(row["name"]) if ratio is None else f"{ratio:g}"


def _label_points(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each label beside its point, at the first place that hides no point and no other label.

    A label that its neighbour already has, or that fits nowhere, is left out.
    """
    figure.draw_without_rendering()  # the layout decides where the points are
    places = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in places]
    written: list[tuple[float, float, str]] = []
    for (x, y, label), (px, py) in zip(points, places, strict=True):
        if not label or any(label == other and abs(px - qx) + abs(py - qy) < 40 for qx, qy, other in written):
            continue
        width, height = 8 * len(label), 14
        for dx, dy in ((9, 3), (9, -16), (-9 - width, 3), (-9 - width, -16), (-width / 2, 10), (-width / 2, -24)):
            box = (px + dx, py + dy, px + dx + width, py + dy + height)
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                taken.append(box)
                written.append((px, py, label))
                shift = (dx * 72 / figure.dpi, (dy + 2) * 72 / figure.dpi)
                axes.annotate(label, (x, y), shift, textcoords="offset points", color=INK, fontsize=9)
                break


def layer_table(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """projection name -> {layer number: record}, from paths such as `model.layers.3.mlp.up_proj`.

    The layer is the first number in the path. A projection is named by the shortest end of its path that no other
    has; where several stacks were compressed, the stack's name stands before it.
    """
    found = [(m[1], int(m[2]), m[3], r) for r in records if (m := re.match(r"(.*?)\.(\d+)\.(.+)", r["path"]))]
    stacks, ends = {head for head, *_ in found}, {rest for _, _, rest, _ in found}
    table: dict[str, dict[int, Mapping[str, Any]]] = {}
    for head, layer, rest, record in found:
        name = _shortest_end(rest, ends)
        if len(stacks) > 1:
            name = f"{(head.split('.')[-2:])[0]} {name}"
        table.setdefault(name, {})[layer] = record
    return table


def _shortest_end(path: str, others: set[str]) -> str:
    parts = path.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if sum(f".{o}".endswith(f".{end}") for o in others) == 1), path)


def chosen(compressions: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The compressions that the per-layer plots show: those with records, the first six."""
    return [c for c in compressions if layer_table(c.get("records") or ())][:MAX_PANELS]


def error_plot(compressions: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Relative output error by depth, a line per projection, a panel per compression, one scale for all."""
    rows, columns = _grid(len(compressions))
    figure, panels = _figure(rows, columns, 9.2, 2.7 * rows + 0.9, sharex=True, sharey=True)
    lines: dict[str, Any] = {}
    projections = list(dict.fromkeys(name for c in compressions for name in layer_table(c["records"])))
    for axes, compression, name in zip(panels, compressions, names, strict=False):
        for projection, layers in layer_table(compression["records"]).items():
            depth = sorted(layers)
            index = projections.index(projection)
            style = {"color": COLOURS[index % len(COLOURS)], "ls": ("-", (0, (4, 2)), ":")[index // len(COLOURS) % 3]}
            values = [_error(layers[d]) for d in depth]
            (lines[projection],) = axes.plot(depth, values, lw=1.4, marker=".", ms=4, **style)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.grid(True, which="major", color=FAINT, alpha=0.25, lw=0.6)
    _log_axis(panels[0], [e for c in compressions for r in c["records"] if math.isfinite(e := _error(r))])
    _hide_unused(panels, len(compressions))
    figure.supxlabel("layer", fontsize=10, color=INK)
    figure.supylabel("relative error of the outputs", fontsize=10, color=INK)
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside upper center",
        ncols=min(7, len(lines)),
        frameon=False,
        labelcolor=INK,
    )
    return _svg(figure, "error")


def _error(record: Mapping[str, Any]) -> float:
    """The record's relative error, NaN where a logarithmic axis cannot show it."""
    value = number(record, "relative_error")
    return value if value is not None and 0 < value < math.inf else math.nan


def kept_plot(compressions: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Heat map, layer by projection: stored numbers after over before; the global budget's choice at a glance."""
    tables = [layer_table(c["records"]) for c in compressions]
    rows, columns = _grid(len(tables))
    tallest = max(len(t) for t in tables)
    figure, panels = _figure(rows, columns, 9.2, (0.24 * tallest + 0.75) * rows + 0.9, sharex=True)
    smallest = min(_kept(record) for t in tables for layers in t.values() for record in layers.values())
    low = min(0.9, math.floor(10 * smallest) / 10)  # the scale ends at the smallest kept, so that differences show
    for axes, table, name in zip(panels, tables, names, strict=False):
        depth = range(1 + max(layer for layers in table.values() for layer in layers))
        grid = [[_kept(layers.get(layer)) for layer in depth] for layers in table.values()]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
        axes.set_yticks(range(len(table)), list(table), fontsize=9)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
    _hide_unused(panels, len(tables))
    figure.supxlabel("layer", fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.025, pad=0.01)
    bar.set_label("fraction of the numbers kept", color=INK)
    bar.ax.tick_params(colors=INK, labelsize=9)
    bar.outline.set_visible(False)
    return _svg(figure, "kept")


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic y axis with plain numbers; 1, 2 and 5 of each decade where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    if values:
        low, high = min(values), max(values)
        margin = max(1.1, (high / low) ** 0.06)
        axes.set_ylim(low / margin, high * margin)
        steps = (1.0, 2.0, 5.0) if high < 300 * low else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e"))
    )
    axes.yaxis.set_minor_formatter(NullFormatter())


def _kept(record: Mapping[str, Any] | None) -> float:
    return math.nan if record is None else record["size_after"] / max(record["size_before"], 1)


def _grid(panels: int) -> tuple[int, int]:
    columns = 1 if panels == 1 else 2
    return -(-panels // columns), columns


def _hide_unused(panels: Sequence[Any], used: int) -> None:
    for axes in panels[used:]:
        axes.set_visible(False)


def _figure(rows: int, columns: int, width: float, height: float, **sharing: Any) -> tuple[Any, list[Any]]:
    """A figure without a window, in the page's ink, and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)
    for panel in axes:
        panel.patch.set_alpha(0)
        panel.tick_params(colors=INK, which="both", labelsize=9)
        panel.xaxis.label.set_color(INK)
        panel.yaxis.label.set_color(INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
    return figure, axes


def _svg(figure: Any, salt: str) -> str:
    """SVG without prologue and metadata, the same in every run, with no id that another plot of the page may have."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--faint, #888)")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    used = set(re.findall(r'[(="]#([\w.]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)


def tracks_plot(found: Sequence[Any], task: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Two panels: quality against parameters kept, a line per method, and against bytes, a point per row.

    Args:
        found: `tracks_page.Summary` of one model; bars are their spreads.
        task: its first quality is "perplexity" (log axis) or "accuracy" (percent).
        titles: of the rows, by name.
    """
    scale, log = (1.0, True) if task["qualities"][0] == "perplexity" else (100.0, False)
    shown = [s for s in found if not s.refused and math.isfinite(s.mean)]
    dense = next(s for s in shown if s.method == "dense")
    figure, (left, right) = _figure(1, 2, 10.4, 4.4, sharey=True)
    lines = [s for s in shown if s.track == "parameters" and s.ratio is not None]
    names = list(dict.fromkeys(s.name for s in lines))
    styles = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    for name, (colour, marker) in styles.items():
        mine = sorted((s for s in lines if s.name == name), key=lambda s: s.ratio)
        x, y, e = ([s.ratio for s in mine], [scale * s.mean for s in mine], [scale * s.spread for s in mine])
        left.errorbar(x, y, e, color=colour, marker=marker, lw=1.6, ms=6, capsize=3, label=titles[name])
        disk = [s.sizes["bytes_disk"] / 1e6 for s in mine]
        right.plot(disk, y, color=colour, marker=marker, lw=0.8, ms=4, alpha=0.6)
    left.axhline(scale * dense.mean, color=FAINT, lw=1, ls=(0, (4, 3)))
    for s in (s for s in shown if s.track == "bytes"):
        auto = s.method == "auto"
        style = {"color": styles["auto"][0] if auto and "auto" in styles else INK, "marker": "o" if auto else "D"}
        x, y, e = s.sizes["bytes_disk"] / 1e6, scale * s.mean, scale * s.spread
        right.errorbar([x], [y], [e], ls="none", ms=6, capsize=3, mfc="none" if auto else None, **style)
        place = {"xytext": (9, -4), "ha": "left"} if auto else {"xytext": (-9, -4), "ha": "right"}
        right.annotate(titles[s.name], (x, y), textcoords="offset points", color=INK, fontsize=8, **place)
    right.plot([dense.sizes["bytes_disk"] / 1e6], [scale * dense.mean], "*", ms=14, color=INK, label="dense, 16 bits")
    if log:
        _log_axis(left, [s.mean for s in shown])
    left.invert_xaxis()
    right.invert_xaxis()
    left.set_xlabel("fraction of the linear parameters kept")
    left.set_xticks(sorted({s.ratio for s in lines}))
    right.set_xlabel("MB on disk")
    right.margins(x=0.2)
    left.set_ylabel("perplexity (log scale)" if log else "accuracy in percent")
    for axes in (left, right):
        axes.grid(True, which="major", color=FAINT, alpha=0.25, lw=0.6)
    figure.legend(loc="outside upper center", ncols=8, frameon=False, labelcolor=INK, fontsize=9)
    return _svg(figure, task["name"])
