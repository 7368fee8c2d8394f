"""What is in a model folder: every changed module, its stored numbers and bytes. Reads headers, never weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from tinycomp.edits import Plan, Replace
from tinycomp.io.save import RECIPE, REPORT


def _json(file: Path, text: str | bytes) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"inspect: {file} is damaged, its JSON does not parse ({error}); repair it") from error


def stored_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """{name: (dtype, shape, bytes)} over all safetensors files of the folder, from their headers."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = _json(file, handle.read(length) if length <= file.stat().st_size else b"")
        header.pop("__metadata__", None)
        if 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0) > file.stat().st_size:
            raise ValueError(f"inspect: {file} is cut short; copy or download it again")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            out[name] = (entry["dtype"], tuple(entry["shape"]), end - begin)
    return out


def _sizes(tensors: dict[str, tuple[str, tuple[int, ...], int]], path: str) -> tuple[int, int]:
    """Stored numbers and bytes at or below the module `path`."""
    own = [entry for name, entry in tensors.items() if name.startswith(path + ".")]
    return sum(math.prod(shape) for _, shape, _ in own), sum(size for _, _, size in own)


def inspect_folder(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What was done to the model in a folder, per module, with sizes.

    Raises:
        ValueError: not a model folder.
    """
    folder = Path(source)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"inspect: {folder} has no config.json; give a model folder that save_pretrained wrote")
    config = _json(config_file, config_file.read_text())
    tensors = stored_tensors(folder)
    stored = config.get("quantization_config") or {}
    plan = Plan.from_dict(stored) if stored.get("quant_method") == "tinycomp" else Plan()
    report = _json(folder / REPORT, (folder / REPORT).read_text()) if (folder / REPORT).is_file() else {}
    before = {row["path"]: row for row in report.get("records", [])}
    modules = []
    for edit in plan.edits:
        numbers, size = _sizes(tensors, edit.path) if isinstance(edit, Replace) else (None, None)
        modules.append(
            edit.to_dict()
            | {"numbers": numbers, "bytes": size, "size_before": before.get(edit.path, {}).get("size_before")}
        )
    return {
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "plain": not plan.edits,
        "numbers": sum(math.prod(shape) for _, shape, _ in tensors.values()),
        "bytes_weights": sum(size for _, _, size in tensors.values()),
        "bytes_folder": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "methods": plan.methods or report.get("methods", []),
        "modules": modules,
        "report": {key: value for key, value in report.items() if key != "records"},
        "records": report.get("records", []),
        "recipe": str(folder / RECIPE) if (folder / RECIPE).is_file() else None,
    }
