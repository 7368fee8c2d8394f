"""The bundled State of the Union addresses (public domain; see NOTICE in this folder)."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files

EVALUATION_TEXTS = ("sotu-2013-2014",)
SEPARATOR = "\n\f\n"


@cache
def _speeches(name: str) -> tuple[str, ...]:
    data = (files("tinycomp.data") / name).read_bytes()
    return tuple(gzip.decompress(data).decode("utf-8").split(SEPARATOR))


def calibration_text() -> list[str]:
    """The 46 addresses of 1960 to 2004, oldest first; disjoint from every evaluation text."""
    return list(_speeches("sotu_calibration.txt.gz"))


def evaluation_text(name: str = "sotu-2013-2014") -> str:
    """The evaluation text that a perplexity protocol names: the 2013 and 2014 addresses joined by one space.

    Raises:
        ValueError: no bundled text has this name.
    """
    if name not in EVALUATION_TEXTS:
        raise ValueError(
            f"evaluation text: got {name!r}, bundled are {list(EVALUATION_TEXTS)}; "
            "pass your own text to perplexity(..., text=...) with the protocol that names it"
        )
    return " ".join(_speeches("sotu_evaluation.txt.gz"))
