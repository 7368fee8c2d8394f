"""What every method file shares: its config fields, the units it decides on, and what it returns.

A method is four things, gathered in `METHODS` (methods/__init__.py):

    Config                          pydantic model, subclass of MethodConfig
    needs(config) -> frozenset      statistics to collect: any of NEEDS
    options(unit, config) -> list   candidate sizes with the loss each is predicted to cost (pure, cheap to keep)
    build(unit, choice, config)     one chosen candidate as edits and tensors (pure: the model is untouched)

The pipeline collects, allocates one budget over the options of all units, builds block by block and applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tinycomp.edits import Edit
from tinycomp.linalg import Remember, made_anew
from tinycomp.models import FFNSpec, UnitGroup

NEEDS = frozenset({"gram", "output_gram", "last_hidden"})
DEFAULT_IGNORE = ("lm_head", "re:.*embed.*", "re:.*norm.*", "re:.*router.*")


class MethodConfig(BaseModel):
    """Fields every method has. Errors name the field, what was got and what is allowed.

    Args:
        targets: modules to compress: exact names, `re:` regular expressions, or class names; empty means every
            linear layer of the repeated blocks.
        ignore: modules to leave alone, in the same language; wins over `targets`.
        ratio: fraction of the targeted parameters that is kept, in (0, 1].
        preset: "default", or "paper" for parity with the published algorithm.
        seed: every random choice derives from it.
        sequential: fit each block on the inputs that the already compressed prefix produces. Off by default: it takes
            several times as long, and on SmolLM2-135M with 5,120 calibration tokens it was worse (see CHANGELOG).
        allocation: "global" spreads the budget by predicted loss, "uniform" gives every unit the same ratio.
        damping: added to second moments, as a fraction of their mean diagonal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    ratio: float | None = Field(default=None, gt=0.0, le=1.0)
    preset: Literal["default", "paper"] = "default"
    seed: int = Field(default=0, ge=0)
    sequential: bool = False
    allocation: Literal["global", "uniform"] = "global"
    damping: float = Field(default=1e-4, ge=0.0)


@dataclass
class Linear:
    """One target matrix as a method sees it.

    weight: (out_features, in_features) float32, the matrix to approximate. In sequence this is the original weight
        refit to the compressed prefix's inputs, so approximating it well is all a method has to do.
    bias: (out_features,) or None.
    gram: (in, in) float32 mean of x xᵀ over calibration tokens (raw second moment, not centred), or None.
    output_gram: (out, out) float32 mean of g gᵀ, g the gradient of the model's loss with respect to this linear's
        output, or None. tr(G dW S dWᵀ)/2 predicts the loss in nats per token (K-FAC).
    transposed: the module stores its weight as (in, out) (GPT-2's Conv1D).
    dtype: the module's dtype, which stored factors take.
    remember: `remember(key, make)` returns `make()`, from memory when these statistics have seen `key` for this linear:
        for factorisations that options, other ratios and `build` share.
    """

    path: str
    weight: Tensor
    bias: Tensor | None = None
    gram: Tensor | None = None
    output_gram: Tensor | None = None
    transposed: bool = False
    dtype: torch.dtype = torch.float32
    remember: Remember = field(default=made_anew, repr=False)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def predicted_loss(self, error: Tensor) -> float:
        """tr(G E S Eᵀ)/2 for an error E = W - W' (out, in), in nats per token; identity for a missing statistic."""
        return self._loss(error.float(), self._outputs(error.float()))

    def relative_error(self, error: Tensor) -> float:
        """|E S^(1/2)|_F / |W S^(1/2)|_F: relative error of the outputs on calibration data."""
        return self.errors(error)[0]

    def errors(self, error: Tensor) -> tuple[float, float]:
        """(|E S^(1/2)|_F / |W S^(1/2)|_F, tr(G E S Eᵀ)/2): relative error of the outputs, and predicted loss."""
        e = error.float()
        outputs = self._outputs(e)
        energy = float(self.remember("energy", self._energy)["energy"])
        relative = max(float((outputs * e).sum()), 0.0) / max(energy, 1e-30)
        return relative**0.5, self._loss(e, outputs)

    def _outputs(self, weight: Tensor) -> Tensor:
        return weight if self.gram is None else weight @ self.gram

    def _loss(self, error: Tensor, outputs: Tensor) -> float:
        gradients = error if self.output_gram is None else self.output_gram @ error
        return 0.5 * float((outputs * gradients).detach().sum())

    def _energy(self) -> dict[str, Tensor]:
        """|W S^(1/2)|_F^2."""
        w = self.weight.float()
        return {"energy": (self._outputs(w) * w).sum()}


@dataclass
class Unit:
    """What is decided at once: one linear ("linear"), or one feed-forward sublayer ("ffn": gate?, up, down)."""

    name: str
    kind: Literal["linear", "ffn"]
    linears: tuple[Linear, ...]
    block: int = 0
    ffn: FFNSpec | None = None

    @property
    def size(self) -> int:
        """Weight parameters, biases not counted."""
        return sum(linear.weight.numel() for linear in self.linears)


@dataclass(frozen=True)
class Option:
    """One candidate: stored numbers, bits on disk in all, predicted loss in nats per token, and what `build` needs.

    seconds: of one call, where it was measured.
    """

    size: int
    bits: int
    loss: float
    choice: dict[str, Any]
    seconds: float = 0.0


@dataclass
class Result:
    """Edits, the tensors they need (full parameter paths, storage layout), one record per touched linear."""

    edits: list[Edit] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    def extend(self, other: Result) -> None:
        self.edits += other.edits
        self.tensors |= other.tensors
        self.records += other.records


def record(linear: Linear, method: str, new_size: int, new_bits: int, error: Tensor, **extra: Any) -> dict[str, Any]:
    """The report's row for one linear. Sizes count stored numbers and bits on disk."""
    relative, predicted = linear.errors(error)
    return {
        "path": linear.path,
        "method": method,
        "shape": list(linear.weight.shape),
        "size_before": linear.weight.numel(),
        "size_after": new_size,
        "bits_after": new_bits,
        "relative_error": relative,
        "predicted_loss": predicted,
        **extra,
    }


@dataclass(frozen=True)
class Method:
    """A row of METHODS.

    assign: where a method chooses layers and sizes itself (a published rule), the choices by path from the spec, the
        targets' shapes and the blocks' last-token outputs; it returns None where the common budget applies.
    families: names of the methods whose options compete (Auto).
    blocks: where a method removes whole blocks, its choice: see `strategic_fusion.choose`. The others do not apply.
    weights: factors on the predicted losses of each family, block by block: see `auto.weights`.
    units: where a method ranks the prunable units of the whole model, which ones it may remove and its choice: see
        `spp.groups_of` and `spp.choose`. The others do not apply.
    """

    name: str
    config: type[MethodConfig]
    needs: Callable[[Any], frozenset[str]]
    options: Callable[[Unit, Any], list[Option]]
    build: Callable[[Unit, dict[str, Any], Any], Result]
    unit_kind: Literal["linear", "ffn"] = "linear"
    assign: Callable[..., dict[str, dict[str, Any]] | None] = lambda *_: None
    families: Callable[[Any], tuple[tuple[Method, MethodConfig], ...]] | None = None
    blocks: Callable[..., tuple[Result, dict[str, Any]]] | None = None
    weights: Callable[..., dict[str, Any]] = lambda *_: {}
    units: tuple[Callable[..., tuple[UnitGroup, ...]], Callable[..., tuple[Result, dict[str, Any]]]] | None = None
