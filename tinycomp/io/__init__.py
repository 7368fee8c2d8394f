"""Reading models, writing results, and keeping unfinished work: load, save, journal, provenance."""

from __future__ import annotations

from tinycomp.io.journal import Entry, Journal
from tinycomp.io.load import default_model, load_config, load_model, model_class
from tinycomp.io.provenance import fingerprint, model_fingerprint
from tinycomp.io.save import alone, check_output_dir, save_model

__all__ = [
    "Entry",
    "Journal",
    "alone",
    "check_output_dir",
    "default_model",
    "fingerprint",
    "load_config",
    "load_model",
    "model_class",
    "model_fingerprint",
    "save_model",
]
