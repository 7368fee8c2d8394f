"""Linear layer made of some rows and columns of a dense one, of which any prefix can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinycomp import ops
from tinycomp.layers._base import CompressedLinear, check_size, is_plain, linear, plain_weights, tensors
from tinycomp.layers.grouped import Grouped

BILLIONTHS = 10**9  # ratios are stored as integers, which casting a model to another dtype leaves alone


class ElasticLinear(Grouped, CompressedLinear):
    """Rows and columns of a dense layer that run as any of their prefixes.

        y[..., outputs] = x[..., inputs] full[:active_out, :active_in]ᵀ + bias[:active_out], zero elsewhere

    With `gather` and `scatter` the layer keeps the sizes around it: a removed feature reads nothing and writes zero,
    which is a mask on a dense layer with fewer multiplications. Without them the prefix of x is read and the output
    has active_out features.

    Args:
        in_features: inputs of the dense layer that this one stands for.
        out_features: outputs of that layer.
        bias: whether a bias is added, one number for each stored row.
        stored_in: columns that are stored, in_features unless given.
        stored_out: rows that are stored, out_features unless given.
        gather: a buffer `inputs`, int64 (stored_in,), says which input each column reads.
        scatter: a buffer `outputs`, int64 (stored_out,), says which output each row writes.
        ranked_in: a buffer `in_enters`, int32 (stored_in,) ascending, says from which ratio on, in billionths, each
            column is active; see `set_ratio_`.
        ranked_out: a buffer `out_enters`, the same for rows.
        device: where the tensors are.
        dtype: dtype of weight and bias.
    """

    inputs: Tensor
    outputs: Tensor
    in_enters: Tensor
    out_enters: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, stored_in: int | None = None,
        stored_out: int | None = None, gather: bool = False, scatter: bool = False, ranked_in: bool = False,
        ranked_out: bool = False, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        stored_in = in_features if stored_in is None else stored_in
        stored_out = out_features if stored_out is None else stored_out
        check_size("ElasticLinear", "stored_in", stored_in, 0, in_features)
        check_size("ElasticLinear", "stored_out", stored_out, 0, out_features)
        self.full = linear(stored_in, stored_out, device, dtype)
        if bias and stored_out != out_features:
            self.bias = nn.Parameter(torch.zeros(stored_out, device=device, dtype=dtype))
        self.gather, self.scatter, self.ranked_in, self.ranked_out = gather, scatter, ranked_in, ranked_out
        for name, wanted, size, kind in (
            ("inputs", gather, stored_in, torch.int64),  # what indexing takes without a conversion
            ("outputs", scatter, stored_out, torch.int64),
            ("in_enters", ranked_in, stored_in, torch.int32),
            ("out_enters", ranked_out, stored_out, torch.int32),
        ):
            if wanted:
                self.register_buffer(name, torch.arange(size, dtype=kind, device=device))
        self.active_in, self.active_out = stored_in, stored_out
        self._one_pass: _OnePass | None = None

    def set_active_(self, active_in: int | None = None, active_out: int | None = None) -> None:
        """Choose how many columns and rows are used from now on; None leaves a number as it is."""
        active_in = self.active_in if active_in is None else active_in
        active_out = self.active_out if active_out is None else active_out
        check_size("ElasticLinear", "active_in", active_in, 0, self.full.in_features)
        check_size("ElasticLinear", "active_out", active_out, 0, self.full.out_features)
        self.active_in, self.active_out = active_in, active_out
        self._one_pass = None

    def sizes_at(self, ratio: float) -> tuple[int, int]:
        """(columns, rows) that are active at a ratio; all of a side that is not ranked."""
        limit = round(ratio * BILLIONTHS)
        return (
            int(self.in_enters.le(limit).sum()) if self.ranked_in else self.full.in_features,
            int(self.out_enters.le(limit).sum()) if self.ranked_out else self.full.out_features,
        )

    @property
    def group_op(self) -> str:  # type: ignore[override]
        return "swsc_linears" if self.scatter else "sliced_linears"

    def group_tensors(self) -> tuple[Any, ...] | None:
        return None if self.gather else self._ready().tensors

    def as_call(self) -> tuple[str, Sequence[Any], tuple[int, ...]] | None:
        if self.gather or self.scatter:
            held = self._ready().tensors
            return None if held is None else ("swsc_linear", held, (int(self.gather),))
        weights = plain_weights(self._modules["full"])  # type: ignore[arg-type]
        active = self.active_in, self.active_out
        return None if weights is None else ("sliced_linear", (*weights, *tensors(self, "bias")), active)

    def group_numbers(self) -> tuple[int, ...]:
        return (0,) if self.scatter else ()

    def group_features(self) -> int:
        return self.out_features if self.scatter else self.active_out

    def _ready(self) -> _OnePass:
        ready = self._one_pass
        if ready is None or not ready.holds(self):
            ready = self._one_pass = _OnePass(self)
        return ready

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is Tensor:
            together = self.from_group(x)
            if together is not None:
                return together
            if (self.gather or self.scatter) and (call := self.as_call()) is not None:
                op, held, numbers = call
                return getattr(ops, op)(*(x, *held, *numbers))
        if self.gather:
            x = x.index_select(-1, self.inputs[: self.active_in])
        y = self._product(x)
        if not self.scatter:
            return y
        whole = y.new_zeros(*y.shape[:-1], self.out_features)
        return whole.index_copy_(-1, self.outputs[: self.active_out], y)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._one_pass = None  # it holds views of what moves now
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_one_pass": None}

    def _product(self, x: Tensor) -> Tensor:
        weights = plain_weights(self._modules["full"])  # type: ignore[arg-type]
        if weights is not None:
            (bias,) = tensors(self, "bias")
            return ops.sliced_linear(x, weights[0], bias, self.active_in, self.active_out)
        if (self.active_in, self.active_out) != (self.full.in_features, self.full.out_features):
            raise RuntimeError(
                "ElasticLinear: `full` has an adapter or a hook and only a part of it is active, "
                "allowed is the whole layer; merge the adapter or call set_active_ with the full sizes"
            )
        y = self.full(x)
        return y if self.bias is None else y + self.bias

    def dense_weight(self) -> Tensor:
        """The active part; with `gather` and `scatter` at its place among zeros."""
        w = self.full.weight[: self.active_out, : self.active_in]
        if self.gather:
            w = w.new_zeros(len(w), self.in_features).index_copy(1, self.inputs[: self.active_in], w)
        if self.scatter:
            zeros = w.new_zeros(self.out_features, w.shape[1])
            w = zeros.index_copy(0, self.outputs[: self.active_out], w)
        return w

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active_in={self.active_in}, active_out={self.active_out}"


class _OnePass:
    """Gather or scatter and the product as one call of `swsc_linear`, for inference.

    Rows are centroids, each output takes its row times 1, or the first row times 0 where it has none; columns likewise.
    With one row of input, indexing by torch operators would cost about as much as the product.

    tensors: what `swsc_linear` takes after x, or `sliced_linears` for a layer that neither gathers nor scatters; None
    where they cannot stand in.
    """

    def __init__(self, layer: ElasticLinear) -> None:
        self.side = "inputs" if layer.gather else "outputs"
        self.weight, self.bias, self.index = layer.full.weight, layer.bias, layer._buffers.get(self.side)
        self.address = self.weight.data_ptr()
        # What is copied: how often it was changed in place. Inference tensors do not count that.
        self.copied = [(t, t._version) for t in (self.bias, self.index) if t is not None and not t.is_inference()]
        self.tensors = self._tensors(layer) if is_plain(layer.full) else None

    def _tensors(self, layer: ElasticLinear) -> tuple[Any, ...] | None:
        if (layer.gather and layer.scatter) or (not layer.gather and layer.active_in != layer.in_features):
            return None
        weight = self.weight.detach()[: layer.active_out, : layer.active_in]
        bias = None if self.bias is None else self.bias.detach()[: layer.active_out]
        if self.index is None:
            return weight, bias
        active = self.index[: layer.active_in if layer.gather else layer.active_out]
        if len(active) == 0:  # nothing to take: one row or column that no output or input wants
            weight = weight.new_zeros(len(weight), 1) if layer.gather else weight.new_zeros(1, layer.in_features)
        features = layer.in_features if layer.gather else layer.out_features
        dtype = torch.uint8 if len(active) <= 256 else torch.int32
        labels = torch.zeros(features, dtype=dtype, device=weight.device)
        labels[active] = torch.arange(len(active), device=weight.device).to(dtype)
        scales = weight.new_zeros(features).index_fill_(0, active, 1)
        if bias is not None and layer.scatter:
            bias = bias.new_zeros(features).index_copy_(0, active, bias)
        b, a = weight.new_empty(0, layer.in_features), weight.new_empty(features if layer.scatter else len(weight), 0)
        return weight, labels, b, a, scales, bias

    def holds(self, layer: ElasticLinear) -> bool:
        """Whether the layer has the same tensors as before, unchanged where they were copied, and nothing attached.

        Runs at every call of one row, hence without the detours of attribute access on modules.
        """
        full = layer._modules["full"]
        assert full is not None
        for tensor, version in self.copied:
            if tensor._version != version:
                return False
        return (
            full._parameters.get("weight") is self.weight
            and layer._parameters.get("bias") is self.bias
            and layer._buffers.get(self.side) is self.index
            and self.weight.data_ptr() == self.address
            and (self.tensors is None or is_plain(full))
        )


def set_ratio_(model: nn.Module, ratio: float) -> None:
    """Run an elastic model at another size from now on: prefixes of its weights, nothing is copied.

    Args:
        model: from `make_elastic_`, or loaded from what that saved.
        ratio: fraction of the parameters of its units that is used, in (0, 1].

    Raises:
        ValueError: the model is not elastic, or the ratio is out of range.
    """
    for layer in require_elastic("set_ratio_", model, ratio).values():
        layer.set_active_(*layer.sizes_at(ratio))
    if hasattr(model, "config"):
        model.config.ratio = float(ratio)  # type: ignore[union-attr]


def require_elastic(where: str, model: nn.Module, ratio: float) -> dict[str, ElasticLinear]:
    """`elastic_layers`; raises unless there are some and `ratio` is one."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0.0 < ratio <= 1.0:
        raise ValueError(f"{where}: got ratio {ratio!r}, allowed above 0 up to 1; change it")
    layers = elastic_layers(model)
    if not layers:
        raise ValueError(
            f"{where}: got a {type(model).__name__} of one size, allowed elastic models; make one with make_elastic_"
        )
    return layers


def elastic_layers(model: nn.Module) -> dict[str, ElasticLinear]:
    """Path -> layer, for the layers whose size follows the model's ratio."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ElasticLinear) and (module.ranked_in or module.ranked_out)
    }
