"""The search for an importance order: masks on all units follow a split Bregman path, and the order of entry remains.

The loss is multiplied by nu, which gives the coupling |M - G|²/2 the weight one: the same trajectories as with
L + |M - G|²/(2 nu), in time units of nu, and one scale for every model. Without a given nu it is n / (2 rise) for n
units: while the twin is zero, L + |M|²/(2 nu) cannot settle above its value at M = 1, so that the coupling raises the
loss by at most `rise`.

Source: SPP, arXiv 2501.03289; `preset="paper"` is what its repository runs, without a coupling.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tinycomp.calib import collect
from tinycomp.calib.loss import no_cache
from tinycomp.io import fingerprint
from tinycomp.io.journal import write_atomic
from tinycomp.io.provenance import model_fingerprint
from tinycomp.models import spec_of
from tinycomp.models.units import UnitGroup, UnitPath
from tinycomp.train.bregman import SplitBregman, lipschitz, step_size
from tinycomp.train.losses import Batch, BlockOutputs
from tinycomp.train.masks import Masks, search_loss
from tinycomp.train.samples import Samples, model_inputs
from tinycomp.train.unit_loss import places, unit_losses

RELEASED = {
    "coupled": False, "direction": "adam", "lr": 1e-3, "nu": 1.0, "threshold": 3.0, "nonnegative": True,
    "per_head": False, "loss": "labels", "warm": 0.0,
}  # fmt: skip
LIPSCHITZ_AT = (1.0, 0.5, 0.25)  # all masks at this: the path starts at one, and the coupling pulls to zero
CHECKPOINT = "search.safetensors"
_TAG = "tinycomp_search"
ADAM_TRAVEL = 4.0  # steps times lr: with a threshold of 2, a unit whose mask stays at one enters half-way


class PathSearch(BaseModel):
    """How a path is searched. Errors name the field, what was got and what is allowed.

    Args:
        preset: "default", or "paper": the released iteration (the other fields still win).
        steps: gradient steps; 0: no search, the order is that of the predicted losses (`train.unit_loss`).
        samples: samples per step.
        length: tokens per sample; longer ones are cut into pieces.
        loss: "labels", "distill" or "auto", see `train.masks.search_loss`.
        direction: "adam" or "sgd".
        lr: step size; None is 4 / steps for Adam, and for SGD the one that the Lipschitz constant of the gradient
            allows (power iteration on the masks).
        beta: momentum.
        rise: what the coupling may cost, in units of the loss (nats); fixes nu where that is None.
        nu: strength of the coupling, large is weak.
        kappa: damping of the sparse twin.
        threshold: lambda; above 1 / kappa, below which units of no importance enter too.
        compensate: the search sees weights that are refit to the masks (`train.masks.Refit`), as after slicing.
        warm: where V starts, as a share of the threshold times the unit's place, 0 to 1, in the order of the predicted
            losses (`train.unit_loss`); 0 starts V at zero, as published.
        coupled: the published iteration; False is the released one.
        nonnegative: keep the twin at least 0.
        prox: "unit", or "head": the indices of one head enter together.
        dual: "plain", "nesterov" or "adam", see `SplitBregman`.
        kick: see `SplitBregman`; needs direction "sgd", beta 0 and no other acceleration.
        per_head: every head has indices of its own; False shares them over the heads of a sublayer, as released.
        checkpoint_every: steps between checkpoints, where there is a folder for them.
        seed: of the order of the samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "paper"] = "default"
    steps: int = Field(default=200, ge=0)
    samples: int = Field(default=4, ge=1)
    length: int = Field(default=256, ge=2)
    loss: Literal["auto", "labels", "distill"] = "auto"
    direction: Literal["adam", "sgd"] = "adam"
    lr: float | None = Field(default=None, gt=0.0)
    beta: float = Field(default=0.9, ge=0.0, lt=1.0)
    rise: float = Field(default=4.0, gt=0.0)
    nu: float | None = Field(default=None, gt=0.0)
    kappa: float = Field(default=1.0, gt=0.0)
    threshold: float = Field(default=2.0, ge=0.0)
    compensate: bool = False
    warm: float = Field(default=0.95, ge=0.0, le=1.0)
    coupled: bool = True
    nonnegative: bool = False
    prox: Literal["unit", "head"] = "unit"
    dual: Literal["plain", "nesterov", "adam"] = "plain"
    kick: float = Field(default=0.0, ge=0.0)
    per_head: bool = True
    checkpoint_every: int = Field(default=20, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _released(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            return RELEASED | values
        return values


def search_path(
    model: nn.Module, groups: Sequence[UnitGroup], batches: Sequence[Batch], config: PathSearch, *,
    folder: Path | None = None, progress: Callable[[str, int, int, str], None] = lambda *_: None,
) -> UnitPath:  # fmt: skip
    """Search the order in which the units of a frozen model enter.

    Args:
        model: left as it was, also when interrupted.
        groups: its unit groups.
        batches: calibration data, with labels where the model's own loss is wanted.
        config: how.
        folder: for checkpoints; a search that was killed continues from the last one, with the same result.
        progress: called with (description, done, total, note).

    Raises:
        ValueError: nothing to mask, unusable data, a checkpoint of another search, or a loss that is NaN.
    """
    if not groups:
        raise ValueError("SPP: got no unit groups, allowed are models with dense attention or feed-forward sublayers")
    training = model.training
    model.eval()
    try:
        losses: dict[str, Tensor] = {}
        started = folder is not None and (folder / CHECKPOINT).exists()  # V is in the checkpoint
        if not config.steps or (config.warm and not started):
            where = _broken(model, batches[0]) if batches else None
            if where is not None:
                raise ValueError(
                    f"SPP search: got NaN or infinite values before the first step, first in {where}; allowed are "
                    "finite ones. Use float32 weights, or check that layer's weights and the data"
                )
            losses = unit_losses(model, groups, batches, config.seed)
        if not config.steps:
            return UnitPath.from_scores(losses, config.model_dump(mode="json"))
        start = places(losses) if losses else {}
        seen = _grams(model, groups, batches, config.seed) if config.compensate else None
        with no_cache(model), torch.enable_grad(), Masks(model, groups, config.per_head, seen) as masks:
            return _Search(model, masks, batches, config, folder, start).run(progress)
    finally:
        model.train(training)


def _grams(model: nn.Module, groups: Sequence[UnitGroup], batches: Sequence[Batch], seed: int) -> dict[str, Tensor]:
    """Second moments of the inputs of the linears that read units."""
    paths = list(dict.fromkeys(g.members[-1].path for g in groups if g.members[-1].dim == 1))
    store = collect(model, spec_of(model), list(batches), frozenset({"gram"}), paths=paths, seed=seed)
    found = {path: stats.gram for path, stats in store.get(paths).items() if stats.gram is not None}
    store.close()
    return found


def _broken(model: nn.Module, batch: Batch) -> str | None:
    """The first block whose output is not finite."""
    with torch.no_grad(), BlockOutputs(model, [b.path for b in spec_of(model).blocks]) as recorder:
        model(**model_inputs(batch))
    return next((p for p, h in recorder.found.items() if not bool(torch.isfinite(h).all())), None)


class _Search:
    """One search under way."""

    def __init__(
        self, model: nn.Module, masks: Masks, batches: Sequence[Batch], config: PathSearch, folder: Path | None,
        start: dict[str, Tensor],
    ):  # fmt: skip
        self.model, self.masks, self.config, self.folder = model, masks, config, folder
        rows = [row for batch in batches for row in _rows(batch, config.length)]
        if not rows:
            raise ValueError("SPP: got no calibration samples, allowed is at least one; pass data")
        self.samples = Samples(rows, 0, getattr(getattr(model, "config", None), "pad_token_id", None) or 0)
        self.loss = search_loss(model, masks, self.batch(0), config.loss)
        units = sum(len(v) for v in masks.values)
        self.nu = (config.nu or units / (2 * config.rise)) if config.coupled else 1.0
        lr = self._lr()
        if not config.coupled and config.steps * lr < config.threshold:
            warnings.warn(
                f"SPP search: {config.steps} steps of lr={lr:g} move V by about {config.steps * lr:g}, and the "
                f"threshold is {config.threshold:g}: no unit enters, and V alone ranks them. The released iteration "
                f"needs about {math.ceil(config.threshold / lr)} steps",
                stacklevel=2,
            )
        self.optimiser = SplitBregman(
            masks.values, lr=lr, kappa=config.kappa, threshold=config.threshold, direction=config.direction,
            beta=config.beta, coupled=config.coupled, nonnegative=config.nonnegative, dual=config.dual,
            nu=1.0 if config.coupled else config.nu or 1.0, kick=config.kick,
            groups=masks.head_numbers() if config.prox == "head" else None,
        )  # fmt: skip
        if start:
            parts = [
                torch.zeros(len(v)).index_add_(0, u, start[g.name]) / u.bincount()
                for v, u, g in zip(masks.values, masks.units, masks.groups, strict=True)
            ]
            self.optimiser.dual.copy_(config.warm * config.threshold * torch.cat(parts))
        sizes = [(len(v), g.count * g.parameters_per_unit) for v, g in zip(masks.values, masks.groups, strict=True)]
        self.share = torch.cat([torch.full((n,), float(p) / n) for n, p in sizes]) / sum(p for _, p in sizes)
        self.curve: list[dict[str, Any]] = []
        self.identity = ""

    def batch(self, step: int) -> Batch:
        """The samples of a step, drawn without replacement inside an epoch; the same whatever came before."""
        count, wanted = len(self.samples), []
        for place in range(step * self.config.samples, (step + 1) * self.config.samples):
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + place // count)
            wanted.append(int(torch.randperm(count, generator=generator)[place % count]))
        batch = self.samples.collate([self.samples.rows[i] for i in wanted])
        return {name: value.to(self.masks.device) for name, value in batch.items()}

    def _lr(self) -> float:
        config = self.config
        if config.lr is not None:
            return config.lr
        if config.direction == "adam":
            return ADAM_TRAVEL / config.steps
        batch = self.batch(0)

        def gradient(at: Tensor) -> Tensor:
            parts = at.split([len(v) for v in self.masks.values])
            for value, part in zip(self.masks.values, parts, strict=True):
                value.data.copy_(part)
            grads = torch.autograd.grad(self.nu * self.loss(batch), self.masks.values)
            return torch.cat([g.flatten() for g in grads])

        ones = torch.cat([v.detach() for v in self.masks.values])
        largest = max(lipschitz(gradient, at * ones, seed=config.seed) for at in LIPSCHITZ_AT)
        for value in self.masks.values:
            value.data.fill_(1.0)
        return step_size(largest, 1.0, config.kappa)

    def run(self, progress: Callable[[str, int, int, str], None]) -> UnitPath:
        config, optimiser = self.config, self.optimiser
        self._resume()
        for step in range(len(self.curve), config.steps):
            batch = self.batch(step)
            optimiser.zero_grad()
            loss = self.loss(batch)
            value = float(loss.detach())
            if math.isfinite(value):
                (self.nu * loss).backward()
            if not (math.isfinite(value) and bool(torch.isfinite(optimiser.grad).all())):
                raise ValueError(self._what_broke(step, value, batch))
            objective = optimiser.objective(self.nu * value) / self.nu  # before the step, as the loss
            optimiser.step()
            self.curve.append(self._point(value, objective))
            note = f"loss {value:.3f}, in {self.curve[-1]['active']:.0%}"
            progress("SPP: searching the path", step + 1, config.steps, note)
            if self.folder and ((step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps):
                self._save(self.folder)
        found = {"nu": self.nu, "lr": optimiser.lr, "samples_seen": config.steps * config.samples}
        dual = optimiser.dual if config.nonnegative else optimiser.dual.abs()
        return UnitPath(
            self.masks.spread(optimiser.entry), {k: v.float() for k, v in self.masks.spread(dual).items()}, self.curve,
            config.model_dump(mode="json") | found,
        )  # fmt: skip

    def _point(self, loss: float, objective: float) -> dict[str, Any]:
        """One point of the curve; `active` is the share of the parameters whose units have entered."""
        optimiser = self.optimiser
        return {
            "step": optimiser.steps,
            "loss": loss,
            "objective": objective,
            "active": float(self.share.to(optimiser.gamma)[optimiser.gamma != 0].sum()),
            "mean_mask": float(optimiser.mask.mean()),
        }

    def _what_broke(self, step: int, loss: float, batch: Batch) -> str:
        where = _broken(self.model, batch)
        if where is None:
            pairs = zip(self.masks.groups, self.masks.values, strict=True)
            wrong = (g.name for g, v in pairs if v.grad is not None and not bool(torch.isfinite(v.grad).all()))
            where = next(wrong, "the output of the model")
        return (
            f"SPP search: got loss {loss} with NaN or infinite values at step {step + 1}, first in {where}; allowed "
            f"are finite ones. Lower lr ({self.optimiser.lr:.3g}), use float32 weights, or check that layer's weights "
            "and the data"
        )

    def _save(self, folder: Path) -> None:
        state = {name: t.cpu().contiguous() for name, t in self.optimiser.state_dict().items()}
        text = json.dumps({"identity": self.identity, "curve": self.curve, "lr": self.optimiser.lr})
        write_atomic(folder / CHECKPOINT, save(state, metadata={_TAG: text}))

    def _resume(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [g.name for g in self.masks.groups]
        job = self.config.model_dump(mode="json", exclude={"checkpoint_every"})
        self.identity = fingerprint(job, names, model_fingerprint(self.model), self.samples.rows)
        file = self.folder / CHECKPOINT
        if not file.exists():
            return
        with safe_open(file, "pt") as stored:
            found = json.loads((stored.metadata() or {}).get(_TAG, "{}"))
            if found.get("identity") != self.identity:
                raise ValueError(
                    f"SPP search: {file} belongs to another search (its model, data or options differ); finish that "
                    "one, delete the file, or name another folder"
                )
            self.optimiser.load_state_dict({name: stored.get_tensor(name) for name in stored.keys()})  # noqa: SIM118
        self.curve, self.optimiser.lr = found["curve"], found["lr"]


def _rows(batch: Batch, length: int) -> list[Batch]:
    """Samples of a batch; unpadded token sequences are cut into pieces of `length`."""
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(next(iter(batch.values()))))]
    found: list[Batch] = []
    for row in rows:
        ids = row.get("input_ids")
        padded = ids is None or ("attention_mask" in row and not bool(row["attention_mask"].bool().all()))
        if padded or len(ids) <= length or any(v.shape != ids.shape for v in row.values()):  # type: ignore[arg-type, union-attr]
            found.append(row)
            continue
        for start in range(0, len(ids) - length + 1, length):  # type: ignore[arg-type]
            found.append({name: value[start : start + length] for name, value in row.items()})
    return found
