"""Room for tokens to come in transformers' dynamic cache, which copies all keys and values for every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tinycomp.fused._base import MARK

_LEAST = 64  # tokens


class _Room:
    """Larger tensors of which a cache's keys and values are the beginning."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = (_with_room(t) for t in (keys, values))
        self.seen: tuple[Tensor, Tensor] = keys, values  # what the cache had when this was last used

    def serves(self, keys: Tensor, values: Tensor) -> bool:
        """Whether nobody else has changed the cache since, and one more token fits."""
        seen = self.seen[0] is keys and self.seen[1] is values
        return seen and keys.shape[2] < self.keys.shape[2] and values.shape[2] < self.values.shape[2]


def _with_room(t: Tensor) -> Tensor:
    tokens = t.shape[2]
    larger = t.new_empty(*t.shape[:2], tokens + max(_LEAST, tokens // 4), t.shape[3])
    larger[:, :, :tokens] = t
    return larger


def one_more(cache: Any, layer_idx: int) -> tuple[Tensor, Tensor] | None:
    """A layer's keys and values and, uninitialised, those of one more token; `keep` makes them the cache's.

    None where a cache is not transformers' own dynamic one or does not hold this layer yet: `update` is for those.
    """
    if type(cache) is not DynamicCache or cache.offloading or layer_idx >= len(cache.layers):
        return None
    layer = cache.layers[layer_idx]
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    if keys is None or values is None or keys.dim() != 4:
        return None
    room = layer.__dict__.get(MARK)
    if room is None or not room.serves(keys, values):
        room = _Room(keys, values)
        setattr(layer, MARK, room)
    tokens = keys.shape[2] + 1
    return room.keys.narrow(2, 0, tokens), room.values.narrow(2, 0, tokens)


def keep(cache: DynamicCache, layer_idx: int, keys: Tensor, values: Tensor) -> None:
    """Make what `one_more` gave, the last token filled in, the cache's."""
    layer: Any = cache.layers[layer_idx]
    layer.keys, layer.values = getattr(layer, MARK).seen = keys, values
