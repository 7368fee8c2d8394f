"""Packed formats of a sparse weight: what `masked_linear` reads, described in its docstring."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycomp.ops.quant_linear import pack_int4, unpack_int4

FORMATS = ("bitmask", "index", "2:4", "block32")
BLOCK = 32


class Packed(NamedTuple):
    """A packed sparse weight; which fields are present depends on the format, see `masked_linear`."""

    values: Tensor
    mask: Tensor
    offsets: Tensor | None
    scales: Tensor | None


def pack_masked(w: Tensor, keep: Tensor | None = None, format: str = "bitmask", value_bits: int = 0) -> Packed:
    """Pack a weight for `masked_linear`; with value_bits, values are rounded symmetrically with one scale per row.

    Args:
        w: (N, K) floating.
        keep: bool (N, K), None: where w is not zero. For "block32" a block is kept if any of its entries is.
        format: one of FORMATS.
        value_bits: 0 keeps the dtype of w, else 8 or 4.

    Raises:
        ValueError: unknown format or value_bits, keep of another shape, or more than 2 of 4 kept for "2:4".
    """
    check_format("pack_masked", format, value_bits, w.shape[1])
    keep = w != 0 if keep is None else keep
    if keep.shape != w.shape or keep.dtype != torch.bool:
        raise ValueError(
            f"pack_masked: keep is {keep.dtype} {tuple(keep.shape)}, allowed bool {tuple(w.shape)}; match w"
        )
    w, scales = w * keep, None
    if value_bits:
        largest = 2 ** (value_bits - 1) - 1
        scales = w.abs().amax(1, keepdim=True) / largest if w.shape[1] else w.new_zeros(w.shape[0], 1)
        scales = torch.where(scales == 0, 1.0, scales)
        w = (w.float() / scales.float()).round().clamp(-largest, largest).to(torch.int8)
    n, k = w.shape
    if format == "2:4":
        values, mask = _pack_two_of_four(w, keep)
        offsets = None
    elif format == "block32":
        tiles = F.pad(w, (0, -k % BLOCK, 0, -n % BLOCK)).reshape(-(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK)
        kept = F.pad(keep, (0, -k % BLOCK, 0, -n % BLOCK)).reshape(tiles.shape).any(3).any(1)
        values, mask, offsets = tiles.permute(0, 2, 1, 3)[kept], _pack_bits(kept), _offsets(kept)
    else:
        values, offsets = w[keep], _offsets(keep)
        mask = _pack_bits(keep) if format == "bitmask" else keep.nonzero()[:, 1].to(torch.int16)
    return Packed(pack_int4(values) if value_bits == 4 else values, mask, offsets, scales)


def unpack_masked(
    packed: Packed, out_features: int, in_features: int, format: str = "bitmask", value_bits: int = 0
) -> Tensor:
    """The dense (out_features, in_features) weight, in the dtype of values, or of scales where values are rounded."""
    values, mask, offsets, scales = packed
    if value_bits and scales is None:
        raise ValueError(f"unpack_masked: scales is None with value_bits {value_bits}, allowed (N, 1); pass them")
    if value_bits == 4:
        values = unpack_int4(values, _stored(values, mask, offsets, format))
    if scales is not None:
        values = values.to(scales.dtype)
    w = place(values, mask, offsets, out_features, in_features, format)
    return w if scales is None else w * scales


def _stored(values: Tensor, mask: Tensor, offsets: Tensor | None, format: str) -> int:
    """Size of the last dimension of values before packing two per byte."""
    if format == "index":
        return mask.shape[0]
    # An odd number of bitmask values leaves one padding value, which no bit of the mask asks for.
    return 2 * values.shape[-1]


def place(values: Tensor, mask: Tensor, offsets: Tensor | None, n: int, k: int, format: str) -> Tensor:
    """The dense (n, k) matrix with the stored values at their positions and zeros elsewhere."""
    if format == "bitmask":
        return values.new_zeros(n, k).masked_scatter(unpack_bits(mask, k), values)
    if format == "index":
        assert offsets is not None
        row_of = torch.arange(n, device=mask.device).repeat_interleave(offsets.diff().long(), output_size=mask.shape[0])
        return values.new_zeros(n, k).index_put((row_of, mask.long() & 0xFFFF), values)
    if format == "2:4":
        groups = values.shape[1] // 2
        codes = torch.stack([mask & 15, mask >> 4], -1).reshape(n, -1)[:, :groups].long()
        base = 4 * torch.arange(groups, device=mask.device)
        index = torch.stack([base + (codes & 3), base + (codes >> 2)], -1).reshape(n, -1)
        return values.new_zeros(n, 4 * groups).scatter(1, index, values)[:, :k]
    rows, columns = mask.shape[0], -(-k // BLOCK)
    kept = unpack_bits(mask, columns)[:, :, None, None].expand(-1, -1, BLOCK, BLOCK)
    tiles = values.new_zeros(rows, columns, BLOCK, BLOCK).masked_scatter(kept, values)
    return tiles.permute(0, 2, 1, 3).reshape(rows * BLOCK, columns * BLOCK)[:n, :k]


def _pack_two_of_four(w: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    n, k = w.shape
    w, keep = (F.pad(t, (0, -k % 4)).reshape(n, -1, 4) for t in (w, keep))
    most = int(keep.sum(2).amax()) if keep.numel() else 0
    if most > 2:
        raise ValueError(f"pack_masked: {most} of 4 consecutive inputs are kept, allowed 2 for '2:4'; prune further")
    # Stable sort brings kept positions to the front, so that fewer than two are completed with zeros.
    index = (~keep).to(torch.uint8).sort(dim=2, stable=True).indices[..., :2].sort(2).values
    codes = (index[..., 0] | (index[..., 1] << 2)).to(torch.uint8)
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return w.gather(2, index).reshape(n, -1), codes[:, 0::2] | (codes[:, 1::2] << 4)


def _offsets(kept: Tensor) -> Tensor:
    return F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def _pack_bits(bits: Tensor) -> Tensor:
    """bool (n, k) -> uint8 (n, ceil(k / 8)), bit j of byte b is column 8b + j."""
    grouped = F.pad(bits, (0, -bits.shape[1] % 8)).reshape(bits.shape[0], -1, 8).to(torch.uint8)
    return (grouped << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(2).to(torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """uint8 (n, ceil(columns / 8)) -> bool (n, columns)."""
    bits = (packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(packed.shape[0], -1)[:, :columns].bool()


def check_format(where: str, format: str, value_bits: int, in_features: int) -> None:
    """Raise unless the format is known and can hold `in_features` inputs."""
    if format not in FORMATS:
        raise ValueError(f"{where}: format is {format!r}, allowed {', '.join(FORMATS)}; choose one")
    if value_bits not in (0, 4, 8):
        raise ValueError(f"{where}: value_bits is {value_bits}, allowed 0, 4 or 8; choose one")
    if format == "index" and in_features > 65536:
        raise ValueError(f"{where}: format 'index' with {in_features} inputs, allowed at most 65536; use 'bitmask'")
