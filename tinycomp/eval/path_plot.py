"""The plot of a path: loss and size along the search, what stayed of every sublayer, and when it comes in the order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinycomp.eval.plots import COLOURS, FAINT, MARKERS, _figure, _svg

LABELS = {"ffn": "feed-forward", "qk": "queries and keys", "v": "values"}


def searched(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first method record of the compressions that holds a path, or None."""
    methods = (m for c in results.get("compressions") or () for m in c.get("methods") or ())
    return next((m for m in methods if "curve" in m and m.get("groups")), None)


def path_plot(method: Mapping[str, Any]) -> str:
    """Loss and share of the parameters that have entered, by step; kept share of each sublayer; its place in the order.

    Args:
        method: `curve` (a dict per step; empty without a search) and `groups` (a dict per unit group), as SPP reports.
    """
    curve, groups = method["curve"], method["groups"]
    places = [g.get("half_at") for g in groups]
    panels = [("kept share of its units", [g["kept"] / g["units"] for g in groups])]
    if None not in places:
        panels.append(("ratio at which half of its units are in", places))
    figure, axes = _figure(1, len(panels) + bool(curve), 4.6 * (len(panels) + bool(curve)), 3.8)
    if curve:
        _search(axes[0], curve)
    for axis, (label, values) in zip(axes[-len(panels) :], panels, strict=True):
        for number, kind in enumerate(LABELS):
            own = [value for value, g in zip(values, groups, strict=True) if g["kind"] == kind]
            if own:
                marker, colour = MARKERS[number], COLOURS[number]
                axis.plot(range(len(own)), own, marker=marker, color=colour, lw=0.8, ms=3.5, label=LABELS[kind])
        axis.axhline(1.0, color=FAINT, lw=0.8)
        axis.set(ylim=(0, 1.05), xlabel="sublayer, in the order they run", ylabel=label)
    axes[-1].legend(frameon=False, fontsize=8)
    return _svg(figure, "path")


def _search(axis: Any, curve: Sequence[Mapping[str, Any]]) -> None:
    steps = [point["step"] for point in curve]
    axis.plot(steps, [point["loss"] for point in curve], color=COLOURS[0], lw=1)
    axis.set(xlabel="step", ylabel="loss of the masked model")
    twin = axis.twinx()
    twin.plot(steps, [point["active"] for point in curve], color=COLOURS[1], lw=1.5)
    twin.set(ylim=(0, 1.02))
    twin.set_ylabel("share of the parameters that entered", color=COLOURS[1])
