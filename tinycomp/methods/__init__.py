"""The compression methods, by the name their config has."""

from __future__ import annotations

from tinycomp.methods import (
    auto,
    cur,
    magnitude,
    random,
    ria,
    rounding,
    spp,
    spp_mask,
    strategic_fusion,
    svd,
    swsc,
    wanda,
    width,
)
from tinycomp.methods._base import Linear, Method, MethodConfig, Option, Result, Unit
from tinycomp.methods.auto import Auto
from tinycomp.methods.cur import CUR
from tinycomp.methods.magnitude import Magnitude
from tinycomp.methods.random import Random
from tinycomp.methods.ria import RIA
from tinycomp.methods.rounding import Rounding
from tinycomp.methods.spp import SPP
from tinycomp.methods.spp_mask import SPPMask
from tinycomp.methods.strategic_fusion import StrategicFusion
from tinycomp.methods.svd import SVD
from tinycomp.methods.swsc import SWSC
from tinycomp.methods.wanda import Wanda
from tinycomp.methods.width import WidthPrune

METHODS: dict[str, Method] = {
    "CUR": cur.METHOD,
    "SWSC": swsc.METHOD,
    "SVD": svd.METHOD,
    "WidthPrune": width.METHOD,
    "Wanda": wanda.METHOD,
    "RIA": ria.METHOD,
    "Magnitude": magnitude.METHOD,
    "Random": random.METHOD,
    "Rounding": rounding.METHOD,
    "StrategicFusion": strategic_fusion.METHOD,
    "SPP": spp.METHOD,
    "SPPMask": spp_mask.METHOD,
    "Auto": auto.METHOD,
}
# The same scores as masks on single matrices instead of whole feed-forward units.
_MASKED = {
    "Wanda": wanda.MASKED,
    "RIA": ria.MASKED,
    "SPPMask": spp_mask.MASKED,
    "Magnitude": magnitude.MASKED,
    "Random": random.MASKED,
}


def method_of(config: MethodConfig) -> Method:
    """The method that a config asks for.

    Raises:
        TypeError: `config` is no method's config.
    """
    name = type(config).__name__
    if name not in METHODS or not isinstance(config, METHODS[name].config):
        raise TypeError(
            f"method: got {config!r}, allowed a config among {', '.join(METHODS)}; e.g. tinycomp.CUR(ratio=0.8)"
        )
    return _MASKED[name] if getattr(config, "structured", True) is False else METHODS[name]


__all__ = [
    "CUR",
    "METHODS",
    "RIA",
    "SPP",
    "SVD",
    "SWSC",
    "Auto",
    "Linear",
    "Magnitude",
    "Method",
    "MethodConfig",
    "Option",
    "Random",
    "Result",
    "Rounding",
    "SPPMask",
    "StrategicFusion",
    "Unit",
    "Wanda",
    "WidthPrune",
    "method_of",
]
