"""Per matrix or per feed-forward sublayer the best of the other methods, under one budget of parameters, bytes or time.

Every family offers its sizes with the loss each is predicted to cost; one Lagrangian allocation takes the cheapest
combination. Nothing here is a method of its own: what `Auto` builds is exactly what the chosen method builds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor, nn

from tinycomp.methods import cur, rounding, svd, swsc, wanda, width
from tinycomp.methods._base import Method, MethodConfig, Option, Result, Unit
from tinycomp.models import ModelSpec
from tinycomp.signals import FusionModel, collect_signals

# Masks and rounding store the same numbers in fewer bits: they compete where bytes or time are the budget.
PARAMETER_FAMILIES = ("svd", "cur", "swsc", "widthprune")
BYTE_FAMILIES = (*PARAMETER_FAMILIES, "rounding", "wanda")
EDITS = {"SVD": "rank", "CUR": "rank", "SWSC": "clusters", "WidthPrune": "width"}  # as transitions call them
SIGNAL_BATCHES, GRADIENTS = 2, 8
_METHODS = {
    "svd": svd.METHOD,
    "cur": cur.METHOD,
    "swsc": swsc.METHOD,
    "widthprune": width.METHOD,
    "rounding": rounding.METHOD,
    "wanda": wanda.MASKED,
}


class Auto(MethodConfig):
    """The best method for each part of the model. A budget of bytes with room for every target in 8 bits is spent so.

    Args:
        budget: what `ratio` is a fraction of: the targeted "parameters", their "bytes", or the measured "time" of their
            calls at `rows` batch rows on this machine.
        families: methods that compete; empty means all that fit the budget's kind.
        rows: batch rows (sequences times tokens per step) at which a layer must not be slower than dense.
        guard_speed: measure that, and drop the options that lose; off makes the choice independent of the machine,
            unless the budget is time.
        screen: blocks on which each family is tried first; one that never wins there is dropped (0 tries all).
        bits: widths that rounding may use; where bytes or time are the budget, also for the factors of SVD and CUR and
            for the weights that WidthPrune keeps, beside the model's own width. Empty: nothing is rounded but the
            values behind masks.
        fusion: a stored regressor of layer signals (JSON): each option's predicted loss is multiplied by what the
            regressor expects of that kind of edit in that block, relative to the mean of all.
    """

    budget: Literal["parameters", "bytes", "time"] = "parameters"
    families: tuple[str, ...] = ()
    rows: int = Field(default=1, ge=1)
    guard_speed: bool = True
    screen: int = Field(default=2, ge=0)
    bits: tuple[Literal[4, 8], ...] = (8,)
    fusion: str | None = None

    @field_validator("families")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(_METHODS))
        if unknown:
            raise ValueError(f"got {unknown}, allowed {sorted(_METHODS)}; name families from this list")
        return value


def families(config: Auto) -> tuple[tuple[Method, MethodConfig], ...]:
    """The competing methods with the fields they share with `config`."""
    names = config.families or (PARAMETER_FAMILIES if config.budget == "parameters" else BYTE_FAMILIES)
    names = tuple(n for n in names if n != "rounding" or config.bits)
    shared: dict[str, Any] = {"seed": config.seed, "damping": config.damping, "sequential": config.sequential}
    extra: dict[str, dict[str, Any]] = {
        "rounding": {"bits": config.bits[0] if len(config.bits) == 1 else None},
        "wanda": {"structured": False, "value_bits": 8},
    }
    found = [(_METHODS[n], _METHODS[n].config(**shared, **extra.get(n, {}))) for n in names]
    if config.budget != "parameters":
        for name in ("svd", "cur", "widthprune"):
            if name in names:
                method = _METHODS[name]
                configs = [method.config(**shared | {"bits": bits}) for bits in config.bits]
                found += [(_with_rounding(method, each.bits), each) for each in configs]  # type: ignore[attr-defined]
    return tuple(found)


def _with_rounding(method: Method, bits: int) -> Method:
    """A method with rounded weights, as a family of its own; whole matrices are left to Rounding."""

    def options(unit: Unit, config: MethodConfig) -> list[Option]:
        return [o for o in method.options(unit, config) if not o.choice.get("full")]

    return replace(method, name=f"{method.name} int{bits}", options=options)


def needs(config: Auto) -> frozenset[str]:
    return frozenset({"gram", "output_gram"}).union(*(method.needs(c) for method, c in families(config)))


def options(unit: Unit, config: Auto) -> list[Option]:
    """Every family's options for this unit; `choice["family"]` says whose each is."""
    found = []
    for method, family in families(config):
        if method.unit_kind == unit.kind:
            for option in method.options(unit, family):
                found.append(Option(option.size, option.bits, option.loss, option.choice | {"family": method.name}))
    return found


def build(unit: Unit, choice: dict[str, Any], config: Auto) -> Result:
    (method, family) = next((m, c) for m, c in families(config) if m.name == choice["family"])
    return method.build(unit, choice, family)


def weights(
    model: nn.Module, spec: ModelSpec, config: Auto, batches: Callable[[], Sequence[dict[str, Tensor]]]
) -> dict[str, np.ndarray]:
    """Family -> (blocks,) factor on the predicted losses, from `config.fusion`; {} without one.

    Signals come from the first batches alone: the regressor ranks blocks, it does not need every sample.
    """
    if config.fusion is None:
        return {}
    fused = FusionModel.load(config.fusion)
    table = collect_signals(
        model, spec, batches()[:SIGNAL_BATCHES], gradient_samples=GRADIENTS, seed=config.seed,
        probe="skip_loss" in fused.columns,
    )  # fmt: skip
    kinds = {m.name: EDITS.get(m.name.split()[0], "") for m, _ in families(config)}
    found = fused.weights(list(kinds.values()), 1 - (config.ratio or 0.0), table)
    return {name: found[kind] for name, kind in kinds.items()}


METHOD = Method("Auto", Auto, needs, options, build, families=families, weights=weights)
