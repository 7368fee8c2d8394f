"""Low-rank linear layers: two factors, kept rows and their combinations, or rows x link x columns (CUR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinycomp.layers._base import CompressedLinear, check_size, filled, linear, plain_weights, tensors
from tinycomp.layers.grouped import Grouped


class LowRankLinear(Grouped, CompressedLinear):
    """A weight of rank `rank`.

    Plain:    y = up(down(x)) + bias                                  rank (in + out) numbers
    Pivoted:  z = down(x); y[..., order] = [z, up(z)]; y += bias      rank (in + out - rank) numbers

    In pivoted storage the rows of `down` are kept rows of the weight, and `up` gives the others in terms of them.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: 1..min(in_features, out_features).
        bias: whether a bias is added.
        pivoted: storage, see above.
        device: where the tensors are.
        dtype: dtype of the factors.
    """

    order: Tensor | None
    op, group_op = "lowrank_linear", "lowrank_linears"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        pivoted: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_size("LowRankLinear", "rank", rank, 1, min(in_features, out_features))
        self.rank, self.pivoted = rank, pivoted
        self.down = linear(in_features, rank, device, dtype)
        self.up = linear(rank, out_features - rank if pivoted else out_features, device, dtype)
        order = torch.arange(out_features, dtype=torch.int32, device=device) if pivoted else None
        self.register_buffer("order", order)

    @classmethod
    def from_factors(
        cls, r: Tensor, t: Tensor, order: Tensor | None = None, bias: Tensor | None = None
    ) -> LowRankLinear:
        """A layer holding `r` (rank, in) and `t` (out, rank), or (out - rank, rank) with `order` (out,)."""
        out_features = t.shape[0] if order is None else t.shape[0] + r.shape[0]
        layer = cls(
            r.shape[1], out_features, r.shape[0], bias is not None, order is not None, device="meta", dtype=r.dtype
        )
        filled(layer.down, r)
        filled(layer.up, t)
        layer.order = None if order is None else order.to(torch.int32)
        layer.bias = None if bias is None else nn.Parameter(bias.detach())
        layer.weight = r.new_empty(0)
        return layer

    def group_tensors(self) -> tuple[Any, ...] | None:
        children = self._modules
        weights = plain_weights(children["down"], children["up"])  # type: ignore[arg-type]
        return None if weights is None else (*weights, *tensors(self, "order", "bias"))

    def in_parts(self, x: Tensor) -> Tensor:
        z = self.down(x)
        y = self.up(z)
        if self.order is not None:
            rows = torch.cat([z, y], -1)
            y = torch.zeros_like(rows).index_copy(-1, self.order.long(), rows)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        rows = self.up.weight @ self.down.weight
        if self.order is None:
            return rows
        rows = torch.cat([self.down.weight, rows])
        return torch.empty_like(rows).index_copy(0, self.order.long(), rows)

    def to_cur(self) -> CURLinear:
        """The same matrix as rows x identity x columns; exact."""
        c = self.up.weight.detach()
        eye = torch.eye(self.rank, device=c.device, dtype=c.dtype)
        if self.order is not None:
            c = torch.cat([eye, c])
            c = torch.empty_like(c).index_copy(0, self.order.long(), c)
        return CURLinear.from_factors(c, eye, self.down.weight.detach(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, pivoted={self.pivoted}"


class CURLinear(Grouped, CompressedLinear):
    """Columns, a small link and rows of a weight: y = c(u(r(x))) + bias. Only the link trains.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        rank: number of kept columns, 1..in_features.
        bias: whether a bias is added.
        rank_rows: number of kept rows, 1..out_features; None: as many as columns.
        device: where the tensors are.
        dtype: dtype of the factors.
    """

    frozen = ("r", "c")
    op, group_op = "cur_linear", "cur_linears"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        rank_rows: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        rank_rows = rank if rank_rows is None else rank_rows
        check_size("CURLinear", "rank", rank, 1, in_features)
        check_size("CURLinear", "rank_rows", rank_rows, 1, out_features)
        self.rank, self.rank_rows = rank, rank_rows
        self.r = linear(in_features, rank_rows, device, dtype)
        self.u = linear(rank_rows, rank, device, dtype)
        self.c = linear(rank, out_features, device, dtype)
        self.freeze_()

    @classmethod
    def from_factors(cls, c: Tensor, u: Tensor, r: Tensor, bias: Tensor | None = None) -> CURLinear:
        """A layer holding `c` (out, rank), `u` (rank, rank_rows) and `r` (rank_rows, in)."""
        layer = cls(r.shape[1], c.shape[0], c.shape[1], bias is not None, r.shape[0], device="meta", dtype=c.dtype)
        for child, value in ((layer.c, c), (layer.u, u), (layer.r, r)):
            filled(child, value)
        layer.bias = None if bias is None else nn.Parameter(bias.detach())
        layer.weight = c.new_empty(0)
        return layer

    def group_tensors(self) -> tuple[Any, ...] | None:
        children = self._modules
        weights = plain_weights(children["r"], children["u"], children["c"])  # type: ignore[arg-type]
        return None if weights is None else (*weights, *tensors(self, "bias"))

    def in_parts(self, x: Tensor) -> Tensor:
        y = self.c(self.u(self.r(x)))
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        return self.c.weight @ self.u.weight @ self.r.weight

    def fold(self) -> LowRankLinear:
        """The same matrix with the link multiplied into the columns, or into the rows where there are fewer columns."""
        c, u, r = (m.weight.detach() for m in (self.c, self.u, self.r))
        wide = torch.promote_types(u.dtype, torch.float32)
        if self.rank_rows <= self.rank:
            c = (c.to(wide) @ u.to(wide)).to(c.dtype)
        else:
            r = (u.to(wide) @ r.to(wide)).to(r.dtype)
        return LowRankLinear.from_factors(r, c, bias=self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, rank_rows={self.rank_rows}"
