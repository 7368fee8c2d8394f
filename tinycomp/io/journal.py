"""Crash-safe journal: each finished piece of work is one file, written whole or not at all.

An entry is a safetensors file whose header carries the edits and records as JSON, so that a single rename commits
tensors and description together. A process killed at any instruction leaves complete entries and at most one
`*.tmp` file, which the next start removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tinycomp.edits import Edit, edit_from_dict

MANIFEST = "journal.json"


@dataclass
class Entry:
    """What a finished piece of work left: the three fields of a method's result, and what else to report (JSON)."""

    edits: list[Edit] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new one, never a mixture."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_directory(path.parent)


class Journal:
    """Finished pieces of one job, by key.

    Args:
        directory: made when missing; belongs to the journal alone.
        fingerprint: identifies the job (model, configs, data, seed). A journal of another job is refused.

    Raises:
        ValueError: the directory holds the journal of another job.
    """

    def __init__(self, directory: str | os.PathLike[str], fingerprint: str) -> None:
        self.directory = Path(directory)
        self.fingerprint = fingerprint
        manifest = self.directory / MANIFEST
        if manifest.exists():
            found = json.loads(manifest.read_text())["fingerprint"]
            if found != fingerprint:
                raise ValueError(
                    f"journal: {self.directory} belongs to another job (fingerprint {found}, this job is {fingerprint}:"
                    " its model, configuration or data differ); run that job again to finish it, or delete the folder"
                )
            for leftover in self.directory.rglob("*.tmp"):
                leftover.unlink()
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(manifest, json.dumps({"fingerprint": fingerprint}).encode())

    def _path(self, key: str) -> Path:
        readable = "".join(c if c.isalnum() or c in "._-" else "_" for c in key)[:80]
        return self.directory / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.safetensors"

    def count(self) -> int:
        """Number of finished pieces and of checkpoints in folders below. (No `__len__`: an empty one is not false.)"""
        return len(list(self.directory.rglob("*.safetensors")))

    def get(self, key: str) -> Entry | None:
        """The entry stored under `key`, or None when that piece is not finished."""
        path = self._path(key)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["tinycomp"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        edits = [edit_from_dict(edit) for edit in header["edits"]]
        return Entry(edits, tensors, header["records"], header["details"])

    def put(self, key: str, entry: Entry) -> None:
        """Commit one finished piece; a second `put` of the same key replaces the first."""
        edits = [edit.to_dict() for edit in entry.edits]
        header = {"key": key, "edits": edits, "records": entry.records, "details": entry.details}
        # every tensor gets storage of its own: safetensors refuses views that share one
        data = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in entry.tensors.items()}
        write_atomic(self._path(key), save(data, metadata={"tinycomp": json.dumps(header)}))

    def delete(self) -> None:
        """Remove the journal: the job is finished and its output is in place."""
        shutil.rmtree(self.directory)
