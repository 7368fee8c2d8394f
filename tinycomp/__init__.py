"""tinycomp makes Hugging Face transformers smaller and measurably faster.

Importing it registers the transformers plug-in that loads compressed checkpoints, and nothing heavier: the methods
and the calibration code are imported when one of their names is first used.
"""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import Any

try:
    __version__ = metadata.version("tinycomp")
except metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_LAZY = {
    "compress": "tinycomp.pipeline",
    "compress_": "tinycomp.pipeline",
    "plan": "tinycomp.pipeline",
    "recover_": "tinycomp.train",
    "cache_teacher": "tinycomp.train",
    "Distill": "tinycomp.train",
    "evaluate": "tinycomp.measure",
    "make_elastic_": "tinycomp.elastic",
    "set_ratio_": "tinycomp.layers",
    "export": "tinycomp.elastic",
    "unit_groups": "tinycomp.models",
    "UnitPath": "tinycomp.models",
    "unit_costs": "tinycomp.layer_times",
    "load_model": "tinycomp.io",
    "save_model": "tinycomp.io",
    "fuse_": "tinycomp.fused",
    "huge_pages_": "tinycomp.pages",
    "CUR": "tinycomp.methods",
    "SWSC": "tinycomp.methods",
    "SVD": "tinycomp.methods",
    "WidthPrune": "tinycomp.methods",
    "Wanda": "tinycomp.methods",
    "RIA": "tinycomp.methods",
    "Magnitude": "tinycomp.methods",
    "Random": "tinycomp.methods",
    "Rounding": "tinycomp.methods",
    "StrategicFusion": "tinycomp.methods",
    "SPP": "tinycomp.methods",
    "SPPMask": "tinycomp.methods",
    "Auto": "tinycomp.methods",
}

__all__ = [  # noqa: RUF022 (the order of the documentation)
    "compress",
    "compress_",
    "plan",
    "recover_",
    "cache_teacher",
    "Distill",
    "evaluate",
    "make_elastic_",
    "set_ratio_",
    "export",
    "unit_groups",
    "UnitPath",
    "unit_costs",
    "load_model",
    "save_model",
    "fuse_",
    "huge_pages_",
    "CUR",
    "SWSC",
    "SVD",
    "WidthPrune",
    "Wanda",
    "RIA",
    "Magnitude",
    "Random",
    "Rounding",
    "StrategicFusion",
    "SPP",
    "SPPMask",
    "Auto",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tinycomp' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_plugin() -> str | None:
    """Register with transformers. Returns None, or why this transformers cannot load compressed checkpoints."""
    try:
        from tinycomp import hf

        hf.register()
    except (ImportError, AttributeError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"tinycomp: this transformers release has another quantizer interface ({reason}). Compressing plain models "
            "works; compressed checkpoints can be neither saved nor loaded. Install transformers>=5.22,<6.",
            RuntimeWarning,
            stacklevel=3,
        )
        return reason
    return None


plugin_error = _register_plugin()
