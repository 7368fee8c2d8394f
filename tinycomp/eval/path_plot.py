"""The plot of a search: loss and size along the path, and how much of every sublayer stayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinycomp.eval.plots import COLOURS, FAINT, MARKERS, _figure, _svg

LABELS = {"ffn": "feed-forward", "qk": "queries and keys", "v": "values"}


def searched(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first method record of the compressions that holds a path, or None."""
    methods = (m for c in results.get("compressions") or () for m in c.get("methods") or ())
    return next((m for m in methods if m.get("curve") and m.get("groups")), None)


def path_plot(method: Mapping[str, Any]) -> str:
    """Left: the loss and the share of the parameters that have entered, by step. Right: kept share of each sublayer.

    Args:
        method: `curve` (a dict per step) and `groups` (a dict per unit group), as SPP reports them.
    """
    figure, (left, right) = _figure(1, 2, 9.2, 3.8)
    steps = [point["step"] for point in method["curve"]]
    left.plot(steps, [point["loss"] for point in method["curve"]], color=COLOURS[0], lw=1)
    left.set(xlabel="step", ylabel="loss of the masked model")
    twin = left.twinx()
    twin.plot(steps, [point["active"] for point in method["curve"]], color=COLOURS[1], lw=1.5)
    twin.set(ylim=(0, 1.02))
    twin.set_ylabel("share of the parameters that entered", color=COLOURS[1])
    for number, kind in enumerate(LABELS):
        kept = [g["kept"] / g["units"] for g in method["groups"] if g["kind"] == kind]
        if kept:
            marker, colour = MARKERS[number], COLOURS[number]
            right.plot(range(len(kept)), kept, marker=marker, color=colour, lw=0.8, ms=3.5, label=LABELS[kind])
    right.axhline(1.0, color=FAINT, lw=0.8)
    right.set(ylim=(0, 1.05), xlabel="sublayer, in the order they run", ylabel="kept share of its units")
    right.legend(frameon=False, fontsize=8)
    return _svg(figure, "path")
