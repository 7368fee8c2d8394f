"""Calibration: second moments of every linear's inputs and output gradients, and block-by-block replay."""

from tinycomp.calib.collect import GRADIENT_TOKENS, LinearStats, StatsStore, collect
from tinycomp.calib.replay import Replay, chainable

__all__ = ["GRADIENT_TOKENS", "LinearStats", "Replay", "StatsStore", "chainable", "collect"]
