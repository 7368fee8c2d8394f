"""Linear layer with a sparse weight in a packed format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.layers._base import CompressedLinear, buffers_and_bias, check_size
from tinycomp.layers.grouped import Grouped
from tinycomp.ops.masked_formats import BLOCK, Packed, check_format, pack_masked, unpack_masked

_BUFFERS = ("values", "mask", "offsets", "scales")


class MaskedLinear(Grouped, CompressedLinear):
    """A weight of which only the kept entries and their positions are stored: y = x wᵀ + bias.

    `values`, `mask`, `offsets` and `scales` are those of `ops.masked_linear`, whose docstring gives their shapes.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        nnz: stored values: kept weights ("bitmask", "index"), 1024 for each kept block ("block32"); None for "2:4".
        bias: whether a bias is added.
        format: "bitmask", "index", "2:4" or "block32".
        value_bits: 0 for values in the layer's dtype, which train, or 8 or 4 for rounded ones.
        device: where the tensors are.
        dtype: dtype of values, scales and bias.
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor | None
    scales: Tensor | None

    op, group_op = "masked_linear", "masked_linears"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nnz: int | None = None,
        bias: bool = True,
        format: str = "bitmask",
        value_bits: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_format("MaskedLinear", format, value_bits, in_features)
        rows, bytes_per_row = out_features, -(-in_features // 8)
        if format == "block32":
            rows, bytes_per_row = -(-out_features // BLOCK), -(-in_features // (8 * BLOCK))
        pairs = 2 * -(-in_features // 4)
        nnz = out_features * pairs if format == "2:4" and nnz is None else nnz
        check_size("MaskedLinear", "nnz", nnz, 0)
        assert nnz is not None
        if (format == "2:4" and nnz != out_features * pairs) or (format == "block32" and nnz % BLOCK**2):
            allowed = "None" if format == "2:4" else f"multiples of {BLOCK**2}"
            raise ValueError(f"MaskedLinear: nnz is {nnz}, allowed for format {format!r} are {allowed}; change it")
        self.nnz, self.format, self.value_bits = nnz, format, value_bits
        per_byte = 2 if value_bits == 4 else 1
        shape: tuple[int, ...] = (-(-nnz // per_byte),)
        if format == "2:4":
            shape = (out_features, pairs // per_byte)
        elif format == "block32":
            shape = (nnz // BLOCK**2, BLOCK, BLOCK // per_byte)
        mask_shape, mask_dtype = ((nnz,), torch.int16) if format == "index" else ((rows, bytes_per_row), torch.uint8)
        if value_bits:
            integer = torch.int8 if value_bits == 8 else torch.uint8
            self.register_buffer("values", torch.zeros(shape, device=device, dtype=integer))
        else:
            self.values = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("mask", torch.zeros(mask_shape, device=device, dtype=mask_dtype))
        offsets = None if format == "2:4" else torch.zeros(rows + 1, device=device, dtype=torch.int32)
        self.register_buffer("offsets", offsets)
        scales = torch.ones(out_features, 1, device=device, dtype=dtype) if value_bits else None
        self.register_buffer("scales", scales)

    @classmethod
    def from_linear(
        cls, module: nn.Linear, keep: Tensor | None = None, format: str = "bitmask", value_bits: int = 0
    ) -> MaskedLinear:
        """Pack the entries of an nn.Linear where `keep` (bool, out x in) is true, by default those that are not 0."""
        w = module.weight.detach()
        packed = pack_masked(w, keep, format, value_bits)
        nnz = packed.values.numel() * (2 if value_bits == 4 else 1)
        if format in ("bitmask", "index"):
            nnz = int(w.count_nonzero() if keep is None else keep.sum())
        layer = cls(
            *(module.in_features, module.out_features, nnz, module.bias is not None, format, value_bits),
            device="meta",
            dtype=w.dtype,
        )
        layer.values = packed.values if value_bits else nn.Parameter(packed.values)
        layer.mask, layer.offsets, layer.scales = packed.mask, packed.offsets, packed.scales
        layer.bias = None if module.bias is None else nn.Parameter(module.bias.detach())
        layer.weight = w.new_empty(0)
        return layer

    @property
    def stored_numbers(self) -> int:
        """Stored values, rounded or not, and scales; positions are not counted."""
        return self.nnz + (0 if self.scales is None else self.scales.numel())

    def group_tensors(self) -> list[Any]:
        return [*buffers_and_bias(self, _BUFFERS), self.out_features]

    def as_call(self) -> tuple[str, list[Any], tuple[int | str, ...]]:
        return self.op, buffers_and_bias(self, _BUFFERS), (self.out_features, self.format, self.value_bits)

    def group_numbers(self) -> tuple[int | str, ...]:
        return self.format, self.value_bits

    def dense_weight(self) -> Tensor:
        packed = Packed(self.values, self.mask, self.offsets, self.scales)
        return unpack_masked(packed, self.out_features, self.in_features, self.format, self.value_bits)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nnz={self.nnz}, format={self.format!r}, value_bits={self.value_bits}"
