"""What the tracks consist of: the models with their measure of quality, and the rows of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tinycomp import data
from tinycomp.eval.probes import Probe
from tinycomp.eval.quality import DEFAULT, perplexity
from tinycomp.io import default_model, load_model

Quality = Literal["perplexity", "accuracy", "feature_error"]


@dataclass(frozen=True)
class Entry:
    """One row of a track, once per seed.

    Args:
        name: of the row, ratio left out.
        track: "parameters" or "bytes".
        method: name on the command line; "dense" for the model itself.
        ratio: of all linear parameters.
        fields: of the method's config.
        like: name of an earlier row that fixes the ratio: its kept fraction of the targeted parameters or bytes.
        seeded: depends on calibration data or random choices; else one row serves all seeds.
    """

    name: str
    track: Literal["parameters", "bytes"]
    method: str
    ratio: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    like: str | None = None
    seeded: bool = True


METHODS = ("auto", "cur", "svd", "swsc", "widthprune")
# rows of the bytes track that `Auto` is measured against, each at the same bytes
SINGLES = {
    "int8": Entry("int8", "bytes", "rounding", fields={"bits": 8}, seeded=False),
    "int8 masks": Entry(
        "int8 masks", "bytes", "wanda", 0.5, {"structured": False, "value_bits": 8, "guard_speed": False}
    ),
    "int4": Entry("int4", "bytes", "rounding", fields={"bits": 4}),
}


@dataclass
class Task:
    """A model and how its quality is measured.

    Args:
        name: of the model.
        qualities: what `measure` returns, the first one plotted.
        protocol: name of the measurement; `hash` stands for its data as well.
        model: dense, float32.
        batches: seed -> calibration batches.
        measure: model -> its qualities.
        ratios: of all parameters in the linears of the blocks.
        paper_targets: the q, k and gate (or first feed-forward) projections, which CURing's paper compresses.
        methods: of the parameters track.
        singles: keys of SINGLES; "int4" also lets `Auto` round to 4 bits. Not where the weights lie on a 4-bit grid
            already: that would prove nothing.
        examples: in the test part, of an accuracy.
        timed: also time every row of the first seed against the dense model.
    """

    name: str
    qualities: tuple[Quality, ...]
    protocol: str
    hash: str
    model: nn.Module
    batches: Callable[[int], list[dict[str, Tensor]]]
    measure: Callable[[nn.Module], dict[str, float]]
    ratios: tuple[float, ...]
    paper_targets: tuple[str, ...]
    methods: tuple[str, ...] = METHODS
    singles: tuple[str, ...] = ("int8", "int4")
    timed: bool = False
    examples: int = 0


def causal_task(source: str | None, ratios: Sequence[float], tokens: int, samples: int, length: int) -> Task:
    """A causal language model; None is the default one, whose weights lie on a 4-bit grid."""
    model, tokenizer = load_model(source if source is not None else default_model(), None)
    if tokenizer is None:
        raise ValueError(f"tracks: got {type(model).__name__}, allowed: a causal language model with its tokenizer")
    protocol = DEFAULT if tokens == DEFAULT.max_tokens else DEFAULT.shortened(tokens)
    return Task(
        name=Path(source).name if source is not None else "SmolLM2-135M-Instruct",
        qualities=("perplexity",),
        protocol=protocol.name,
        hash=protocol.hash,
        model=model.float(),
        batches=lambda seed: data.batches(
            None, tokenizer, num_calibration_samples=samples, max_seq_length=length, seed=seed
        ),
        measure=lambda compressed: {"perplexity": perplexity(compressed, tokenizer, protocol).perplexity},
        ratios=tuple(ratios),
        paper_targets=(r"re:.*\.(q_proj|k_proj|gate_proj)",),
        singles=("int8", "int8 masks") if source is None else ("int8", "int8 masks", "int4"),
        timed=True,
    )


def probe_task(probe: Probe, ratios: Sequence[float], samples: int) -> Task:
    return Task(
        name=probe.model_name,
        qualities=("accuracy", "feature_error"),
        protocol=probe.protocol,
        hash=probe.hash,
        model=probe.model,
        batches=lambda seed: probe.calibration(samples, seed),
        measure=probe.measure,
        examples=len(probe.labels) - probe.train,
        ratios=tuple(ratios),
        paper_targets=(r"re:.*\.(query|key|q_proj|k_proj|intermediate\.dense|fc1)",),
    )


def entries(task: Task) -> list[Entry]:
    """Every row but the dense one, those that others refer to first."""
    paper = {"preset": "paper", "targets": task.paper_targets}
    found = [Entry(m, "parameters", m, ratio) for ratio in task.ratios for m in task.methods]
    found += [Entry("cur paper", "parameters", "cur", ratio, paper) for ratio in task.ratios]
    found += [
        Entry("cur paper, own size", "parameters", "cur", fields=paper),
        Entry("cur, same matrices", "parameters", "cur", fields={"targets": task.paper_targets},
              like="cur paper, own size"),
    ]  # fmt: skip
    found += [SINGLES[name] for name in task.singles]
    automatic = {
        "budget": "bytes", "bits": (8, 4) if "int4" in task.singles else (8,),
        "families": ("svd", "cur", "widthprune", "rounding", "wanda"),
    }  # fmt: skip
    return found + [Entry(f"auto as {name}", "bytes", "auto", None, automatic, like=name) for name in task.singles]
