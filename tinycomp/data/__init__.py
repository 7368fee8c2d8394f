"""Calibration and evaluation inputs: bundled public-domain speeches, and every form of `data` a user may pass."""

from __future__ import annotations

from tinycomp.data.inputs import batches, check_labels, for_model
from tinycomp.data.sotu import calibration_text, evaluation_text
from tinycomp.data.tokens import token_ids

__all__ = ["batches", "calibration_text", "check_labels", "evaluation_text", "for_model", "token_ids"]
