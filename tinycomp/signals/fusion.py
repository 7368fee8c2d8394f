"""Strategic fusion: a regressor from the signals of a block to what an edit of it costs; stored as plain JSON.

Training rows are transitions: a model without the blocks R, one further edit of block l, and the change of quality that
was measured. The features are the block's signals, standardised over the blocks still there, and the edit itself: its
kind and the fraction of the block's parameters that it removes, so that one regressor ranks drops, ranks, clusters and
widths of any block against one another.

Source: Strategic Fusion (arXiv 2501.03273), whose features and target these are; forest and ridge settings are
scikit-learn's defaults (100 trees; alpha 1) where the publication gives none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinycomp.signals.collect import SignalTable
from tinycomp.signals.registry import signal_of

FORMAT_VERSION = 2
Kind = Literal["ridge", "forest"]
Mode = Literal["in-set", "leave-one-out", "nested"]


@dataclass(frozen=True)
class BlockEdit:
    """One structural edit of one block.

    block: its index among the blocks of the table it is scored with.
    kind: "drop", "rank", "clusters", "width", or any other name that transitions were measured for.
    removed: fraction of the block's parameters that it takes away, in (0, 1].
    """

    block: int
    kind: str = "drop"
    removed: float = 1.0


@dataclass(frozen=True)
class Transition:
    """One measured edit.

    data_set: name of the data it was measured on; part: "fit" or "judge" where the data was split (nested mode).
    removed: blocks that were gone before, numbered as in the whole model; block: the one edited, likewise.
    features: {column: standardised signal} of that block.
    before, after: minus the loss, or any other quality (larger is better).
    """

    data_set: str
    removed: tuple[int, ...]
    block: int
    features: dict[str, float]
    before: float
    after: float
    kind: str = "drop"
    fraction: float = 1.0
    part: str = "fit"


def training_rows(transitions: Sequence[Transition], mode: Mode, data_set: str) -> list[Transition]:
    """The transitions a regressor for `data_set` may learn from.

    "in-set": all of that set. "leave-one-out": those of all other sets. "nested": those of that set measured on its
    "fit" part alone, so that its "judge" part is new to the regressor.

    Raises:
        ValueError: nothing is left.
    """
    if mode == "leave-one-out":
        rows = [t for t in transitions if t.data_set != data_set]
    else:
        rows = [t for t in transitions if t.data_set == data_set and (mode == "in-set" or t.part == "fit")]
    if not rows:
        raise ValueError(f"fusion: got no transitions for mode {mode!r} and set {data_set!r}; measure some first")
    return rows


@dataclass
class FusionModel:
    """A fitted regressor; predicts the change of quality of an edit.

    kind: "ridge" (coefficients on the features) or "forest" (mean of regression trees, each as parallel lists: feature
        index or -1, threshold, left and right child, value).
    columns: signal columns, in the order of the features; edits: known kinds of edit, which follow them one-hot, and
        the removed fraction comes last.
    scale, worst: the regressor predicts asinh(change / scale), not below `worst`. A few edits ruin a model and cost a
        hundred times what the others do; on the change itself, a fit would serve those alone.
    """

    kind: Kind
    columns: list[str]
    edits: list[str]
    coefficients: list[float] = field(default_factory=list)
    intercept: float = 0.0
    trees: list[dict[str, list[float]]] = field(default_factory=list)
    rows: int = 0
    scale: float = 1.0
    worst: float = -700.0

    @classmethod
    def fit(cls, transitions: Sequence[Transition], kind: Kind = "forest", seed: int = 0) -> FusionModel:
        """Fit on measured transitions.

        Raises:
            ValueError: none given.
            RuntimeError: scikit-learn is missing.
        """
        if not transitions:
            raise ValueError("fusion: got no transitions, allowed at least one; measure some first")
        try:
            from sklearn.ensemble import RandomForestRegressor
            from sklearn.linear_model import Ridge
        except ImportError as error:
            raise RuntimeError("fusion: fitting needs scikit-learn; install tinycomp[fusion]") from error
        columns = sorted({c for t in transitions for c in t.features})
        model = cls(kind, columns, sorted({t.kind for t in transitions}), rows=len(transitions))
        x = np.stack(
            [model._features([t.features.get(c, 0.0) for c in columns], t.kind, t.fraction) for t in transitions]
        )
        change = np.array([t.after - t.before for t in transitions])
        model.scale = float(np.median(np.abs(change[change != 0]))) if change.any() else 1.0
        y = np.arcsinh(change / model.scale)
        model.worst = float(y.min())
        if kind == "ridge":
            ridge = Ridge(alpha=1.0).fit(x, y)
            model.coefficients, model.intercept = [float(c) for c in ridge.coef_], float(ridge.intercept_)
        else:
            forest = RandomForestRegressor(n_estimators=100, random_state=seed).fit(x, y)
            model.trees = [_tree(e.tree_) for e in forest.estimators_]
        return model

    def score(self, edits: Sequence[BlockEdit], table: SignalTable) -> np.ndarray:
        """(edits,) predicted change of quality; the least harmful edit has the largest value.

        Args:
            edits: of blocks of `table`.
            table: signals of the model as it is now.

        Raises:
            ValueError: an edit of a kind the regressor has never seen, or signals it needs are missing.
        """
        missing = [c for c in self.columns if c not in table.values]
        if missing:
            raise ValueError(f"fusion: got signals without {', '.join(missing)}, which this regressor was fitted on")
        z = table.standardised(self.columns)
        return self.predict(np.stack([self._features(z[e.block], e.kind, e.removed) for e in edits]))

    def weights(self, kinds: Sequence[str], removed: float, table: SignalTable) -> dict[str, np.ndarray]:
        """kind -> (blocks,): predicted cost of that edit of each block, over the mean of all; for a budget to spread.

        w = clip(cost / mean cost, 0.1, 10): nothing is believed to be free. A kind that the regressor has never seen
        costs the mean of those it has; where it has seen none of them, whole blocks are dropped instead.

        Args:
            kinds: of edits, as in `BlockEdit`.
            removed: fraction of a block's parameters that each edit takes away, in (0, 1].
            table: signals of the model as it is now.

        Raises:
            ValueError: as `score`.
        """
        seen = [k for k in dict.fromkeys(kinds) if k in self.edits] or ["drop"]
        depth = len(next(iter(table.values.values())))
        size = {k: 1.0 if k == "drop" else removed for k in seen}
        cost = np.maximum([-self.score([BlockEdit(b, k, size[k]) for b in range(depth)], table) for k in seen], 0.0)
        weight = np.clip(cost / cost.mean(), 0.1, 10.0) if cost.any() else np.ones_like(cost)
        return {k: weight[seen.index(k)] if k in seen else weight.mean(0) for k in kinds}

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n,) for features (n, columns + kinds + 1)."""
        if self.kind == "ridge":
            found = x @ np.array(self.coefficients) + self.intercept
        else:
            found = np.mean([_walk(tree, x) for tree in self.trees], axis=0)
        return self.scale * np.sinh(np.maximum(found, self.worst))

    def _features(self, signals: Any, kind: str, removed: float) -> np.ndarray:
        if kind not in self.edits:
            raise ValueError(f"fusion: got an edit of kind {kind!r}, this regressor has seen {', '.join(self.edits)}")
        return np.array([*signals, *(float(kind == e) for e in self.edits), removed], dtype=np.float64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FusionModel:
        """Read what `save` wrote.

        Raises:
            ValueError: another format, or fields that do not fit.
        """
        try:
            data = json.loads(Path(path).read_text())
            version = data.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise ValueError(f"format_version {version!r}, allowed {FORMAT_VERSION}")
            model = cls(**data)
            model._check()
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"fusion: {os.fspath(path)} is no stored regressor ({why}); fit and save one") from error
        return model

    def _check(self) -> None:
        """Raise unless every prediction ends and is a number."""
        for column in self.columns:
            signal_of(column)
        features = len(self.columns) + len(self.edits) + 1
        if self.kind not in ("ridge", "forest") or not self.edits:
            raise ValueError(f"kind {self.kind!r} and edits {self.edits!r}, allowed is ridge or forest, and some edits")
        if self.kind == "forest" and not self.trees:
            raise ValueError("a forest without trees")
        if self.kind == "ridge" and len(self.coefficients) != features:
            raise ValueError(f"{len(self.coefficients)} coefficients, allowed {features}")
        numbers = [*self.coefficients, self.intercept, self.scale, self.worst]
        for tree in self.trees:
            feature, children = np.array(tree["feature"]), np.array([tree["left"], tree["right"]])
            inner = feature >= 0
            size = {len(tree[name]) for name in ("feature", "threshold", "left", "right", "value")}
            if size != {len(feature)} or not len(feature) or feature.dtype.kind != "i" or children.dtype.kind != "i":
                raise ValueError("a tree whose lists do not fit each other")
            if (feature >= features).any() or (children[:, inner] >= len(feature)).any():
                raise ValueError("a tree that asks for a feature or a node that is not there")
            if (children <= np.arange(len(feature)))[:, inner].any():
                raise ValueError("a tree whose children do not follow their parents")
            numbers += [*tree["threshold"], *tree["value"]]
        if not np.isfinite(np.array(numbers, dtype=np.float64)).all() or self.scale <= 0:
            raise ValueError("numbers that are not finite, or a scale that is not above 0")


def _tree(tree: Any) -> dict[str, list[float]]:
    """A scikit-learn tree as lists; leaves have feature -1."""
    return {
        "feature": [int(f) if f >= 0 else -1 for f in tree.feature],
        "threshold": [float(t) for t in tree.threshold],
        "left": [int(c) for c in tree.children_left],
        "right": [int(c) for c in tree.children_right],
        "value": [float(v) for v in tree.value[:, 0, 0]],
    }


def _walk(tree: dict[str, list[float]], x: np.ndarray) -> np.ndarray:
    feature, threshold = np.array(tree["feature"]), np.array(tree["threshold"])
    children = np.array([tree["left"], tree["right"]])
    node = np.zeros(len(x), dtype=int)
    inputs = x.astype(np.float32)  # scikit-learn's trees split float32 values
    while (feature[node] >= 0).any():
        inner = feature[node] >= 0
        right = inputs[np.arange(len(x)), np.maximum(feature[node], 0)] > threshold[node]
        node = np.where(inner, children[right.astype(int), node], node)
    return np.array(tree["value"])[node]
