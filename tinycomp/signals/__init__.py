"""Per-block importance signals, their fusion, and the search for blocks to remove."""

from tinycomp.signals.collect import SignalTable, collect_signals
from tinycomp.signals.entry import block_entry_times
from tinycomp.signals.fusion import BlockEdit, FusionModel, Transition, training_rows
from tinycomp.signals.quality import Quality, quality
from tinycomp.signals.registry import SIGNALS, TWELVE, Signal
from tinycomp.signals.search import Search, baseline, drops

__all__ = [
    "SIGNALS",
    "TWELVE",
    "BlockEdit",
    "FusionModel",
    "Quality",
    "Search",
    "Signal",
    "SignalTable",
    "Transition",
    "baseline",
    "block_entry_times",
    "collect_signals",
    "drops",
    "quality",
    "training_rows",
]
