"""CUR decomposition: a weight rebuilt from its own rows, or from its own columns, a small link, and its own rows.

Three forms:
  "rows"  W' = [R; T R] with R = W[p]: r real rows stay exact, the others are T = W S Rᵀ (R S Rᵀ)^-1 times them, which
          is the weighted least-squares optimum; r (m + n - r) numbers, never more than dense. The default.
  "cur"   W' = C U R with real columns and rows and U = C⁺ W S Rᵀ (R S Rᵀ)^-1, U folded into C: r (m + n) numbers.
  paper   the January 2025 algorithm, step by step (`preset="paper"`): three factors, only U trains.

Source: Park and Moon, "CURing Large Models: Compression via CUR Decomposition", arXiv 2501.04211 (2025), and its
released code. Differs, outside the preset: rows are chosen by pivoting in the space whitened by the inputs' second
moment S and scaled by the loss gradient's, the link uses S too, and rank is spread over all layers by predicted loss.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinycomp.edits import Replace
from tinycomp.linalg import (
    cholesky,
    interpolate,
    made_anew,
    output_moment,
    pivoted_cholesky,
    pivoted_interpolation,
    row_order,
)
from tinycomp.methods import _curing
from tinycomp.methods._base import Linear, Method, Option, Result, Unit, record
from tinycomp.methods._low_rank import (
    FactorRounding,
    Factors,
    LowRankConfig,
    check_rank,
    full_option,
    full_result,
    low_rank_result,
    rank_grid,
    stored_bits,
    stored_size,
    with_rounding,
)
from tinycomp.methods._options import require_finite
from tinycomp.models import ModelSpec
from tinycomp.selection import SELECTIONS

LOSS_GRID = 16  # ranks that the form "cur" offers: each costs a whole decomposition


class CUR(LowRankConfig):
    """CUR decomposition. Fields beside these: see `LowRankConfig`; with the paper preset `rank` is the largest (256).

    Args:
        form: "rows" keeps rows only, "cur" keeps rows and columns.
        selection: how indices are chosen: "pivoted" (pivoted QR in the whitened space), "released" (the published
            code's greedy step) or a name in `tinycomp.selection.SELECTIONS`.
        link: U of the form "cur": "weighted" by the inputs' second moment, "qr" or "pinv" for the plain C⁺ W R⁺.
        trainable: keep C, U and R apart, so that U can be trained; form "cur" only.
        signed: select on W diag(a) rather than |W| diag(a); the paper uses absolute values.
        num_layers: paper preset only: how many layers are compressed; None means 10, more when `ratio` asks for it.
        layer_order: paper preset only: "angular" takes the layers that turn the last token least; "last", "random".
    """

    form: str = Field(default="rows", pattern="^(rows|cur)$")
    selection: str = "pivoted"
    link: str = Field(default="weighted", pattern="^(weighted|qr|fast|pinv)$")
    trainable: bool = False
    signed: bool = True
    num_layers: int | None = Field(default=None, ge=1)
    layer_order: str = Field(default="angular", pattern="^(angular|last|random)$")

    @model_validator(mode="before")
    @classmethod
    def _paper(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            paper = {
                "form": "cur", "selection": "released", "link": "pinv", "trainable": True, "signed": False,
                "sequential": False, "allocation": "uniform",
                "targets": tuple(rf"re:.*\.{name}" for name in _curing.TARGETS),
            }  # fmt: skip
            return paper | values
        return values

    @model_validator(mode="after")
    def _known(self) -> CUR:
        known = ("pivoted", *_curing.GREEDY, *SELECTIONS)
        if self.selection not in known:
            raise ValueError(f"selection: got {self.selection!r}, allowed {', '.join(known)}; pick one of these")
        if self.form == "cur" and self.selection == "pivoted":
            raise ValueError("selection: 'pivoted' is for form='rows'; form='cur' takes e.g. 'sketch-qr'")
        if self.form == "rows" and self.trainable:
            raise ValueError("trainable: the form 'rows' has no link U to train; use form='cur'")
        if self.trainable and self.bits != 16:
            raise ValueError(
                f"bits: got {self.bits} with trainable, allowed 16: three factors are not rounded; "
                "use trainable=False, which folds the link into the columns"
            )
        return self


def needs(config: CUR) -> frozenset[str]:
    extra = {"last_hidden"} if config.preset == "paper" and config.layer_order == "angular" else set()
    return frozenset({"gram", *extra} | ({"output_gram"} if config.preset != "paper" else set()))


def _gram(linear: Linear) -> Tensor:
    if linear.gram is None:
        raise ValueError(f"{linear.path}: got no calibration statistics, allowed CUR with data only; pass `data`")
    return linear.gram


def whitened_rows(linear: Linear, damping: float) -> Tensor:
    """diag(G)^(1/2) W Ls (m, n) float64: a row's length is its share of the loss, its direction its outputs."""
    return linear.weight.double() @ cholesky(_gram(linear), damping, linear.path) * _row_scale(linear)[:, None]


def _row_scale(linear: Linear) -> Tensor:
    """diag(G)^(1/2) (m,) float64, ones without G."""
    if linear.output_gram is None:
        return torch.ones(linear.out_features, dtype=torch.float64, device=linear.weight.device)
    diagonal = linear.output_gram.diagonal().double()
    return (diagonal + 1e-6 * diagonal.mean()).clamp(min=1e-30).sqrt()


def select_rows(linear: Linear, rank: int, config: CUR) -> Tensor:
    """Indices (rank,) int64 of the rows that stay, in the order of choice."""
    if config.selection == "pivoted":
        return _pivoted(linear, config)["order"][:rank]
    if config.selection in _curing.GREEDY:
        return _curing.choose_indices(_selection_matrix(linear, config), rank, config.selection, config.seed)[0]
    from tinycomp import selection

    return selection.select(whitened_rows(linear, config.damping), rank, config.selection, config.seed)


def _selection_matrix(linear: Linear, config: CUR) -> Tensor:
    return _curing.selection_matrix(linear.weight.float(), _curing.input_rms(_gram(linear)), config.signed)


def _pivoted(linear: Linear, config: CUR) -> dict[str, Tensor]:
    """All rows in pivot order, the scaled rows' Cholesky factor in that order, and the losses of `row_losses`."""

    def make() -> dict[str, Tensor]:
        m, n = linear.weight.shape
        share = linear.remember if m <= n else made_anew  # a larger one costs more to keep than to make
        scale = _row_scale(linear)
        moment = output_moment(linear.weight, _gram(linear), config.damping, share)
        upper, order = pivoted_cholesky(moment * torch.outer(scale, scale), min(m, n))
        coefficients = torch.empty(upper.T.shape, dtype=upper.dtype, device=upper.device)
        coefficients[order] = upper.T
        losses = _losses(linear, (coefficients / scale[:, None]).float())
        return {"order": order, "upper": upper.float(), "losses": losses}

    return linear.remember(f"pivoted rows {config.damping}", make)


def row_losses(linear: Linear, config: CUR) -> Tensor:
    """(min(m, n) + 1,) float64: predicted loss when the first 0, 1, ... rows in pivot order are kept, the others refit.

    With A = W Ls and Q the rows of A orthonormalised in pivot order, keeping r rows leaves the coefficients of A on the
    later columns q_k of Q, so the loss is the sum over k >= r of c_kᵀ G c_k / 2 with c_k = A q_k.
    """
    if config.selection == "pivoted":
        return _pivoted(linear, config)["losses"]
    order = select_rows(linear, min(linear.weight.shape), config)
    a = linear.weight.double() @ cholesky(_gram(linear), config.damping, linear.path)
    return _losses(linear, a @ torch.linalg.qr(a[order].T)[0])


def _losses(linear: Linear, coefficients: Tensor) -> Tensor:
    weighted = coefficients if linear.output_gram is None else linear.output_gram.to(coefficients) @ coefficients
    tail = (weighted * coefficients).sum(0).double().clamp(min=0).flip(0).cumsum(0).flip(0)
    return 0.5 * torch.cat([tail, tail.new_zeros(1)])


def _sizes(linear: Linear, rank: int, config: CUR) -> tuple[int, int]:
    m, n = linear.weight.shape
    if config.trainable:
        size = _curing.stored_numbers(m, n, rank)
        return size, size * 8 * linear.dtype.itemsize
    pivoted = config.form == "rows"
    return stored_size(m, n, rank, pivoted), stored_bits(m, n, rank, linear.dtype, pivoted, config.bits)


def options(unit: Unit, config: CUR) -> list[Option]:
    (linear,) = unit.linears
    require_finite(linear)
    m, n = linear.weight.shape
    rows = config.form == "rows"
    ranks = [config.rank] if config.rank else rank_grid(m, n, rows)
    for rank in ranks:
        check_rank(linear, rank)
    if rows:
        table = row_losses(linear, config)
        losses = [float(table[r]) for r in ranks]
    else:
        ranks = ranks[:: max(len(ranks) // LOSS_GRID, 1)]
        losses = [linear.predicted_loss(linear.weight.float() - _product(*decompose(linear, r, config))) for r in ranks]
    found = [
        Option(*_sizes(linear, rank, config), loss, {"rank": rank}) for rank, loss in zip(ranks, losses, strict=True)
    ]
    if config.bits != 16:
        rounding = FactorRounding(linear, config.bits)
        found = with_rounding(found, lambda o: rounding.loss(_two_factors(linear, o.choice["rank"], config)))
    return found if config.rank else [*(o for o in found if o.size < m * n), full_option(unit, config.bits)]


def _two_factors(linear: Linear, rank: int, config: CUR) -> Factors:
    """Kept rows and the map to the others; of the form "cur" rows and columns, the link folded into these."""
    if config.form == "rows" and config.selection == "pivoted":
        found = _pivoted(linear, config)
        pivots, scale = found["order"][:rank], _row_scale(linear)
        order, rest = row_order(pivots, linear.out_features)
        t = pivoted_interpolation(found["upper"].double(), found["order"], rank) * scale[pivots] / scale[rest, None]
        return Factors(linear.weight[pivots].float(), t.float(), order)
    if config.form == "rows":
        pivots = select_rows(linear, rank, config)
        return Factors(*interpolate(linear.weight, pivots, _gram(linear), config.damping))
    c, u, r = decompose(linear, rank, config)
    return Factors(r, c.double().matmul(u.double()).float(), None)


def decompose(linear: Linear, rank: int, config: CUR) -> tuple[Tensor, Tensor, Tensor]:
    """C (m, r), U (r, r), R (r, n) of the form "cur", float32."""
    check_rank(linear, rank)
    weight = linear.weight.float()
    c, u, r, _, _ = _curing.decompose(
        weight,
        _curing.input_rms(_gram(linear)),
        rank,
        signed=config.signed,
        method=config.selection,
        link=config.link,  # type: ignore[arg-type]
        gram=_gram(linear) if config.link == "weighted" else None,
        damping=config.damping,
        exact=config.preset == "paper",
        seed=config.seed,
    )
    return c, u, r


def _product(c: Tensor, u: Tensor, r: Tensor) -> Tensor:
    return c @ (u @ r)


def build(unit: Unit, choice: dict[str, Any], config: CUR) -> Result:
    (linear,) = unit.linears
    require_finite(linear)
    if choice.get("full"):
        return full_result(linear, "CUR", config)
    rank = choice["rank"]
    check_rank(linear, rank)
    if not config.trainable:
        return low_rank_result(linear, "CUR", _two_factors(linear, rank, config), config)
    c, u, r = decompose(linear, rank, config)
    m, n = linear.weight.shape
    path = linear.path
    tensors = {f"{path}.r.weight": r, f"{path}.u.weight": u, f"{path}.c.weight": c}
    if linear.bias is not None:
        tensors[f"{path}.bias"] = linear.bias
    kwargs = {"in_features": n, "out_features": m, "rank": rank, "bias": linear.bias is not None}
    size, bits = _sizes(linear, rank, config)
    row = record(linear, "CUR", size, bits, linear.weight.float() - _product(c, u, r), rank=rank)
    edit = Replace(path, layer="CURLinear", kwargs=kwargs)
    return Result([edit], {k: v.to(linear.dtype) for k, v in tensors.items()}, [row])


def assign(
    spec: ModelSpec, shapes: dict[str, tuple[int, int]], hidden: list[Tensor] | None, config: CUR
) -> dict[str, dict[str, Any]] | None:
    """Steps 2 to 4 of the paper: which layers, at which rank; None outside the paper preset.

    Args:
        spec: of the model; the last stack's blocks are the layers.
        shapes: (out, in) of every targeted linear.
        hidden: last-token outputs (documents, d) of every block; None (a plan without data) takes the first candidates.
        config: with the paper preset.

    Raises:
        ValueError: fewer than 3 blocks, or a ratio out of reach.
    """
    if config.preset != "paper":
        return None
    blocks = list(spec.stacks[-1].blocks)
    if config.layer_order == "angular" and hidden is not None:
        scores = _curing.layer_scores(hidden)
    else:
        scores = dict.fromkeys(range(1, len(blocks) - 1), 0.0)
    order = _curing.choose_layers(scores, len(blocks), config.layer_order, config.seed)  # type: ignore[arg-type]
    order = [i for i in order if any(p in shapes for p in blocks[i].linears)]
    count, largest = config.num_layers or _curing.NUM_LAYERS, config.rank or _curing.R_MAX
    if config.ratio is not None:
        layers = [[shapes[p] for p in blocks[i].linears if p in shapes] for i in order]
        total = sum(m * n for m, n in shapes.values())
        outside = total - sum(m * n for layer in layers for m, n in layer)
        count, largest = _curing.size_rule(layers, int(config.ratio * total) - outside, largest)
    return {
        p: {"rank": _curing.rank_rule(*shapes[p], largest)}
        for i in order[:count]
        for p in blocks[i].linears
        if p in shapes
    }


METHOD = Method("CUR", CUR, needs, options, build, assign=assign)
