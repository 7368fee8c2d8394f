"""Fingerprints: short hashes that tell whether two jobs are the same job. Order-independent for mappings."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

DIGITS = 16


def _update_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.device.type == "meta" or not tensor.numel():
        return
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy())


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _update_tensor(digest, value)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{{{key}:".encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _update(digest, item)
    elif hasattr(value, "model_dump"):
        digest.update(type(value).__name__.encode())
        _update(digest, value.model_dump(mode="json"))
    else:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    digest.update(b";")


def fingerprint(*parts: Any) -> str:
    """First 16 hex digits of the SHA-256 of `parts`.

    Args:
        parts: tensors (dtype, shape and values count), pydantic configs, mappings (key order does not count),
            sequences, JSON scalars.
    """
    digest = hashlib.sha256()
    for part in parts:
        _update(digest, part)
    return digest.hexdigest()[:DIGITS]


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter and buffer in the checkpoint: name, dtype, shape and values."""
    return fingerprint({name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)})
