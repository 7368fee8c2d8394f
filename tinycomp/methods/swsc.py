"""SWSC: channels share cluster centroids, a low-rank term corrects the rest.

    axis output:  W ~ diag(s) L C + A B      C (k, n) centroids, L (m, k) one-hot labels, s (m,) scales
    axis input:   W ~ C Lt diag(s) + A B     C (m, k), L (n, k), s (n,); A (m, r) and B (r, n) in both

Source: Zeng, Tang, Liu, Li, "SWSC: Shared Weight for Similar Channel in LLM", arXiv 2501.08631 (January 2025).
`preset="paper"` is the published procedure: k-means on the channels, the cluster mean as representative, the SVD of the
error cut at rank r with its singular values split evenly, no data, once, on the query and key projections; average bits
16 (k + 1 + 2r) / m on an m x m matrix. The paper does not state the channel axis nor the k-means settings: output
channels, k-means++ and squared distance are this implementation's reading.

The default differs in four ways. It minimises the predicted loss tr(G E S Et)/2 instead of |E|^2, E = W - W', S the
second moment of the inputs, G that of the output gradients where collected. It alternates: k-means on W - A B, then the
low-rank step on W minus the shared part; neither half-step can raise the error. (k, r) are chosen by error under the
budget. Gain-shape scales, balanced clusters, restarts and a random projection are switches.

On the query and key projections of SmolLM2-135M (4 of 30 layers, 1/8 and 1/2 of the size) the claim behind the method
does not hold: no form of it has a smaller mean error than a truncated SVD of the same size, plain or weighted, at best
an equal one. With S and G (2 layers) the search for (k, r) returned k = 1, in effect an SVD. Hidden units of some
feed-forward layers (rows of up, columns of down) cluster a little, not enough to beat the pivoted SVD.

With S = F Ft (Cholesky) and uncoupled output channels the weighted problem is the plain one on W F, and centroids and B
return through a triangular solve with F. G couples output channels (S couples input channels) and no map of the points
makes that plain k-means: see `_shared_weights.cluster_step`.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tinycomp.edits import Replace
from tinycomp.methods._base import Linear, Method, MethodConfig, Option, Result, Unit, record
from tinycomp.methods._kmeans import Clusters, Lloyd
from tinycomp.methods._low_rank import with_rounding
from tinycomp.methods._options import dense_option, require_finite, size_grid
from tinycomp.methods._rounding import default_group, feedback
from tinycomp.methods._shared_weights import (
    Factors,
    Metric,
    average_bits,
    cluster_step,
    fit,
    paper_split,
    require_fits,
    spectrum,
    squared_tail,
    stored_bits,
    stored_numbers,
    weighted_rest,
)

PAPER_TARGETS = (r"re:.*(q_proj|k_proj|query|key|q_lin|k_lin)$",)
PAPER_BITS = 2.0
SCAN_FRACTIONS = (1 / 16, 1 / 8, 1 / 4)  # of the channels: cluster counts that `options` tries beside 1
SIZES = 31


class SWSC(MethodConfig):
    """Shared weights for similar channels, plus a low-rank correction.

    Args:
        axis: channels that are clustered: "output" (rows of W) or "input" (columns of W).
        clusters: centroids per matrix. None: chosen by error under the budget.
        rank: of the correction; 0 for none. None: what the budget leaves.
        bits: budget in average bits per weight of each compressed matrix, labels and scales counted, instead of
            `ratio`. Preset "paper": 16-bit numbers, labels not counted, as in its nominal figures; 2 unless given.
        factor_bits: 16 keeps centroids and factors in the model's dtype, 8 rounds them by row, 4 by groups of 64; part
            of the predicted loss, and of `bits` as a budget.
        activation_bits: 8 also rounds the layer's inputs as it runs; with rounded factors only.
        iterations: alternating refinements after the first pass.
        scaled: one more number per channel, its gain against the centroid (closed form).
        weighted: minimise the predicted loss; otherwise the plain squared error, and no data is needed.
        balanced: clusters of equal size.
        projection: cluster on a random projection to this many dimensions, then take two steps in all.
        init: where k-means starts: "k-means++" or "random".
        restarts: k-means starts, the best is kept.
        steps: most k-means steps of one start.
    """

    axis: Literal["output", "input"] = "output"
    clusters: int | None = Field(default=None, ge=1)
    rank: int | None = Field(default=None, ge=0)
    bits: float | None = Field(default=None, gt=0.0)
    factor_bits: Literal[16, 8, 4] = 16
    activation_bits: Literal[0, 8] = 0
    iterations: int = Field(default=2, ge=0)
    scaled: bool = False
    weighted: bool = True
    balanced: bool = False
    projection: int | None = Field(default=None, ge=1)
    init: Literal["k-means++", "random"] = "k-means++"
    restarts: int = Field(default=1, ge=1)
    steps: int = Field(default=25, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _paper(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") == "paper":
            published = {"targets": PAPER_TARGETS, "iterations": 0, "weighted": False}
            data = {**published, "sequential": False, "allocation": "uniform", **data}
        return data

    @model_validator(mode="after")
    def _one_budget(self) -> SWSC:
        if self.rank is not None and self.clusters is None:
            raise ValueError(f"SWSC: got rank={self.rank} without clusters; give both, or neither and a ratio or bits")
        if self.activation_bits and self.factor_bits == 16:
            raise ValueError("activation_bits: got 8 with factor_bits=16, allowed with 8 or 4; set factor_bits=8")
        budgets = [name for name in ("ratio", "bits", "rank") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise ValueError(
                f"SWSC: got {' and '.join(budgets)}; allowed one: each fixes the size; leave the others out"
            )
        return self

    @property
    def layout(self) -> dict[str, Any]:
        """What the accounting functions need beside the sizes."""
        return {"axis": 0 if self.axis == "output" else 1, "scaled": self.scaled}

    @property
    def stored(self) -> dict[str, Any]:
        """What `stored_bits` needs beside the sizes and the width of the model's own numbers."""
        return self.layout | {"factor_bits": self.factor_bits}

    @property
    def fixed(self) -> bool:
        """Whether the sizes follow from the config alone, without an allocation."""
        return self.bits is not None or self.rank is not None or self.preset == "paper"

    @property
    def lloyd(self) -> Lloyd:
        return Lloyd(
            steps=self.steps,
            init=self.init,
            restarts=self.restarts,
            scaled=self.scaled,
            balanced=self.balanced,
            projection=self.projection,
            seed=self.seed,
        )

    def metric(self, linear: Linear) -> Metric:
        if not self.weighted:
            return Metric()
        return Metric.of(linear.gram, linear.output_gram, self.layout["axis"], self.damping, linear.remember)


def needs(config: SWSC) -> frozenset[str]:
    return frozenset({"gram", "output_gram"}) if config.weighted else frozenset()


def options(unit: Unit, config: SWSC) -> list[Option]:
    """One candidate per size: the (k, r) of least predicted loss after a single pass, which refinement only lowers.

    With `clusters` and `rank`, with `bits`, or with preset "paper", there is one candidate. Unweighted, the loss is
    |W - W'|_F^2 / 2.
    """
    linear = unit.linears[0]
    require_finite(linear)
    m, n = linear.weight.shape
    number_bits = linear.dtype.itemsize * 8
    sizes = candidates(m, n, number_bits, config)
    fitting = _Fitting(linear, config)
    tails, found = {}, {}
    for k in sorted({k for pairs in sizes for k, _ in pairs}):
        tails[k] = fitting.first(k)["tail"]
    for pairs in sizes:
        k, r = min(pairs, key=lambda pair: float(tails[pair[0]][pair[1]]))
        size = stored_numbers(m, n, k, r, **config.layout)
        bits = stored_bits(m, n, k, r, number_bits=number_bits, **config.stored)
        found[k, r] = Option(size, bits, 0.5 * float(tails[k][r]), {"clusters": k, "rank": r})
    offered = list(found.values())
    if config.factor_bits != 16:
        offered = with_rounding(offered, lambda o: fitting.rounding_loss(o.choice["clusters"], o.choice["rank"]))
    return offered + ([] if config.fixed else [dense_option(unit)])


class _Fitting:
    """One matrix under one config: the metric, made when first needed, and the first clustering for every k."""

    def __init__(self, linear: Linear, config: SWSC):
        self.linear, self.config = linear, config

    @cached_property
    def metric(self) -> Metric:
        return self.config.metric(self.linear)

    def first(self, k: int) -> dict[str, Tensor]:
        """labels, centroids and scales of the first pass, and `tail`: the squared error left at every rank.

        With the number of clusters given it is surely built, so the vectors of the correction are kept as `basis`.
        """
        apart = {"ratio", "bits", "rank", "clusters", "targets", "ignore", "iterations", "sequential", "allocation",
                 "factor_bits", "activation_bits"}  # fmt: skip
        key = f"SWSC {k} {self.config.clusters is None} {self.config.model_dump_json(exclude=apart)}"
        return self.linear.remember(key, lambda: self._first(k))

    def factors(self, k: int, r: int, iterations: int) -> tuple[Factors, list[float]]:
        """The first clustering with its correction, refined `iterations` times; errors as `fit` gives them."""
        first = self.first(k)
        config = self.config
        return fit(
            self.linear.weight,
            k,
            r,
            axis=config.layout["axis"],
            metric=self.metric,
            iterations=iterations,
            lloyd=config.lloyd,
            start=Clusters(first["labels"], first["centroids"], first.get("scales")),
            basis=first.get("basis"),
        )

    def rounding_loss(self, k: int, r: int) -> float:
        """Predicted loss of rounding after a single pass; unweighted |W' - W''|_F^2 / 2, as the options' losses."""
        factors, _ = self.factors(k, r, 0)
        return self.lost(factors.dense() - self.rounded(factors)[0].dense())

    def rounded(self, factors: Factors) -> tuple[Factors, dict[str, Tensor]]:
        return factors.rounded(self.linear.dtype, self.config.factor_bits, self.inputs)

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor] | None:
        """Second moment of the inputs and its feedback, where the fit is weighted and has one."""
        gram = self.linear.gram if self.config.weighted else None
        return None if gram is None else (gram.float(), feedback(gram.float()))

    def lost(self, error: Tensor) -> float:
        """What an error (m, n) costs in the metric of the fit."""
        return self.linear.predicted_loss(error) if self.config.weighted else 0.5 * float(error.square().sum())

    def _first(self, k: int) -> dict[str, Tensor]:
        weight = self.linear.weight if self.config.axis == "output" else self.linear.weight.T
        target = self.metric.whiten_along(weight.float())
        found = cluster_step(target, k, self.metric, self.config.lloyd)
        made = {"labels": found.labels, "centroids": found.centroids, "scales": found.scales}
        rest = weighted_rest(target, found, self.metric)
        if self.config.clusters is None:
            made["tail"] = squared_tail(rest)
        else:
            made["tail"], made["basis"] = spectrum(rest)
        return {name: tensor for name, tensor in made.items() if tensor is not None}


def candidates(m: int, n: int, number_bits: int, config: SWSC) -> list[list[tuple[int, int]]]:
    """Per size, the (k, r) pairs to compare; sizes that not even one cluster fits are left out.

    Raises:
        ValueError: clusters or rank do not fit the matrix, or the budget holds no cluster.
    """
    axis, channels = config.layout["axis"], m if config.axis == "output" else n
    if config.clusters is not None:
        require_fits(m, n, config.clusters, config.rank or 0, axis)
        if config.rank is not None:
            return [[(config.clusters, config.rank)]]
    if config.preset == "paper":
        nominal = (config.bits or PAPER_BITS) / 16 * m * n
        budget = nominal if config.ratio is None else config.ratio * m * n - channels
        return [[paper_split(m, n, budget, axis=axis, clusters=config.clusters)]]
    ladder = [config.clusters] if config.clusters else sorted({1, *(max(1, int(f * channels)) for f in SCAN_FRACTIONS)})

    def cost(k: int, r: int) -> int:
        if config.bits is None:
            return stored_numbers(m, n, k, r, **config.layout)
        return stored_bits(m, n, k, r, number_bits=number_bits, **config.stored)

    def largest(k: int, budget: float) -> int:
        """Rank that k clusters leave room for, -1 for none."""
        return bisect_right(range(min(m, n) + 1), budget, key=lambda r: cost(k, r)) - 1

    out = []
    for fraction in size_grid(config.ratio, SIZES) if config.bits is None else (config.bits,):
        ranks = {k: largest(k, fraction * m * n) for k in ladder}
        pairs = [(k, r) for k, r in ranks.items() if r >= 0]
        out += [pairs] if pairs else []
    if not out:
        raise ValueError(
            f"SWSC: got a budget below one cluster of a {m} x {n} matrix; raise ratio or bits, or lower clusters"
        )
    return out


def build(unit: Unit, choice: dict[str, Any], config: SWSC) -> Result:
    """The chosen (k, r), refined by alternation, as one SWSCLinear."""
    linear = unit.linears[0]
    require_finite(linear)
    m, n = linear.weight.shape
    k, r = choice["clusters"], choice["rank"]
    fitting = _Fitting(linear, config)
    exact, history = fitting.factors(k, r, config.iterations)
    extra: dict[str, Any] = {}
    if config.factor_bits == 16:
        stored = exact.to(linear.dtype)
        tensors = {"centroids.weight": stored.centroids, "a.weight": stored.a, "b.weight": stored.b}
    else:
        stored, tensors = fitting.rounded(exact)
        error = linear.weight - exact.dense()
        extra = {"bits": config.factor_bits, "truncation_loss": linear.predicted_loss(error)}
        extra["rounding_loss"] = linear.predicted_loss(exact.dense() - stored.dense())
    if r == 0:
        tensors = {name: t for name, t in tensors.items() if name[0] not in "ab"}
    tensors["labels"] = exact.labels.to(torch.uint8 if k <= 256 else torch.int32)
    if stored.scales is not None:
        tensors["scales"] = stored.scales
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(linear.dtype)
    row = record(
        linear,
        "SWSC",
        stored_numbers(m, n, k, r, **config.layout),
        stored_bits(m, n, k, r, number_bits=linear.dtype.itemsize * 8, **config.stored),
        linear.weight - stored.to(torch.float32).dense(),
        clusters=k,
        rank=r,
        average_bits=average_bits(m, n, k, r, **config.layout),
        refinements=len(history) // 2,
        **extra,
    )
    kwargs = {"in_features": n, "out_features": m, "clusters": k, "rank": r, "bias": linear.bias is not None}
    if config.factor_bits != 16:
        kwargs |= {"activation_bits": config.activation_bits, "bits": config.factor_bits}
        kwargs["group_size"] = default_group(config.factor_bits)
    layer = "SWSCLinear" if config.factor_bits == 16 else "QuantSWSCLinear"
    edit = Replace(linear.path, layer=layer, kwargs=kwargs | config.layout)
    return Result([edit], {f"{linear.path}.{name}": t.contiguous() for name, t in tensors.items()}, [row])


METHOD = Method(name="SWSC", config=SWSC, needs=needs, options=options, build=build)
