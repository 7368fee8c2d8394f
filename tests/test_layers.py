"""Every layer computes what its dense weight says, fused or not, compiled or not, and keeps working with adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinycomp.layers import (
    LAYERS,
    CompressedLinear,
    CURLinear,
    ElasticLinear,
    LowRankLinear,
    MaskedLinear,
    QuantLinear,
    QuantLowRankLinear,
    QuantSWSCLinear,
    SWSCLinear,
)

IN, OUT = 33, 41  # 41 outputs and 33 inputs: odd, and neither a multiple of the other's groups
CASES: dict[str, tuple[str, dict]] = {
    "lowrank": ("LowRankLinear", {"rank": 7}),
    "lowrank-pivoted": ("LowRankLinear", {"rank": 7, "pivoted": True}),
    "lowrank-pivoted-full": ("LowRankLinear", {"rank": 33, "pivoted": True}),
    "cur": ("CURLinear", {"rank": 7}),
    "cur-rectangular": ("CURLinear", {"rank": 7, "rank_rows": 5}),
    "swsc-outputs": ("SWSCLinear", {"clusters": 6, "rank": 3}),
    "swsc-outputs-scaled": ("SWSCLinear", {"clusters": 6, "rank": 0, "scaled": True}),
    "swsc-inputs": ("SWSCLinear", {"clusters": 5, "rank": 2, "axis": 1, "scaled": True}),
    "int8-swsc-outputs": ("QuantSWSCLinear", {"clusters": 6, "rank": 3, "scaled": True}),
    "int4-swsc-outputs": ("QuantSWSCLinear", {"clusters": 6, "rank": 3, "bits": 4, "group_size": 4}),
    "int4-swsc-inputs": (
        "QuantSWSCLinear",
        {"clusters": 5, "rank": 3, "axis": 1, "bits": 4, "group_size": 2, "scaled": True},
    ),
    "int8-swsc-inputs": ("QuantSWSCLinear", {"clusters": 5, "rank": 0, "axis": 1}),
    "int8": ("QuantLinear", {"bits": 8}),
    "int4": ("QuantLinear", {"bits": 4, "group_size": 8}),
    "int4-zeros": ("QuantLinear", {"bits": 4, "group_size": 8, "symmetric": False}),
    "int8-lowrank": ("QuantLowRankLinear", {"rank": 7, "bits": 8}),
    "int4-lowrank": (
        "QuantLowRankLinear",
        {"rank": 7, "bits": 4, "group_size": 4, "pivoted": True, "symmetric": False},
    ),
    "bitmask": ("MaskedLinear", {"nnz": 500}),
    "index": ("MaskedLinear", {"nnz": 500, "format": "index"}),
    "2:4": ("MaskedLinear", {"format": "2:4"}),
    "block32": ("MaskedLinear", {"nnz": 2048, "format": "block32"}),
    "bitmask-int4": ("MaskedLinear", {"nnz": 501, "value_bits": 4}),
    "elastic": ("ElasticLinear", {}),
}


def build(case: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The layer of a case, with random contents."""
    name, kwargs = CASES[case]
    generator = torch.Generator().manual_seed(1)
    if name == "MaskedLinear":
        return _masked(kwargs, bias, dtype, generator)
    layer = LAYERS[name](IN, OUT, bias=bias, dtype=dtype, **kwargs)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(*tensor.shape[-1:], 1) ** 0.5)
            elif tensor.dtype == torch.int32:
                tensor.copy_(torch.randperm(tensor.numel(), generator=generator))
            else:
                high = layer.clusters if tensor.dtype == torch.uint8 and hasattr(layer, "clusters") else 127
                tensor.copy_(torch.randint(high, tensor.shape, generator=generator))
        if isinstance(layer, QuantLowRankLinear):
            layer.r_scales.div_(64)  # else float16 overflows
        if isinstance(layer, QuantSWSCLinear) and layer.rank:
            layer.b_scales.div_(64)
    return layer


def _masked(kwargs: dict, bias: bool, dtype: torch.dtype, generator: torch.Generator) -> MaskedLinear:
    dense = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    keep = torch.zeros(OUT, IN, dtype=torch.bool)
    form = kwargs.get("format", "bitmask")
    if form == "2:4":
        keep[:, 1::4] = keep[:, 3::4] = True
    elif form == "block32":
        keep[0, 0] = keep[40, 32] = True
    else:
        keep.view(-1)[torch.randperm(OUT * IN, generator=generator)[: kwargs["nnz"]]] = True
    return MaskedLinear.from_linear(dense, keep, form, kwargs.get("value_bits", 0))


def expected(layer: CompressedLinear, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), layer.dense_weight().double(), bias)


def close(got: Tensor, want: Tensor) -> bool:
    """Relative error below a few roundings of the dtype over a short sum."""
    error = (got.double() - want).norm() / want.norm()
    return bool(error < 8 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_the_dense_weight(case: str, dtype: torch.dtype) -> None:
    layer = build(case, dtype=dtype)
    x = torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = layer(x)
    assert y.shape == (2, 5, OUT)
    assert y.dtype == dtype
    assert close(y, expected(layer, x))
    assert tuple(layer.dense_weight().shape) == (OUT, IN)


@pytest.mark.parametrize("case", CASES)
def test_kwargs_rebuild_the_layer_on_meta_and_its_state_fills_it(case: str) -> None:
    layer = build(case, bias=False)
    name, kwargs = CASES[case]
    empty = LAYERS[name](IN, OUT, bias=False, device="meta", **kwargs)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in layer.state_dict().items()
    }
    assert all(t.device.type == "meta" for t in empty.state_dict().values())
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, IN)
    assert torch.equal(empty(x), layer(x))
    assert layer.state_dict()["weight"].numel() == 0
    assert not [n for n, _ in layer.named_buffers() if n not in layer.state_dict()]  # nothing is left to recompute


ROUNDED = ("QuantLinear", "QuantLowRankLinear", "QuantSWSCLinear", "MaskedLinear")


@pytest.mark.parametrize("case", [c for c, (name, _) in CASES.items() if name not in ROUNDED])
def test_children_give_the_same_when_something_is_attached(case: str) -> None:
    layer = build(case)
    x = torch.randn(4, IN)
    fused = layer(x)
    calls = []
    for child in layer.children():
        child.register_forward_hook(lambda *_: calls.append(1))
    assert close(layer(x), expected(layer, x))
    assert len(calls) == len(list(layer.children()))
    assert close(fused, expected(layer, x))


@pytest.mark.parametrize("case", CASES)
def test_a_bias_that_is_not_there_is_found_as_quickly_as_one_that_is(case: str) -> None:
    """`buffers_and_bias` looks where parameters are."""
    for bias in (False, True):
        assert (build(case, bias)._parameters["bias"] is not None) == bias


@pytest.mark.parametrize("case", CASES)
def test_compiles_whole(case: str) -> None:
    layer = build(case).eval()
    x = torch.randn(4, IN)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_what_trains(case: str) -> None:
    layer = build(case)
    x = torch.randn(4, IN, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert isinstance(layer, CURLinear)
            assert name in ("r.weight", "c.weight")


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        ("lowrank", 7 * (IN + OUT)),
        ("lowrank-pivoted", 7 * (IN + OUT - 7)),
        ("cur", 7 * (IN + OUT + 7)),
        ("swsc-outputs", 6 * IN + 3 * (IN + OUT)),
        ("swsc-outputs-scaled", 6 * IN + OUT),
        ("swsc-inputs", 5 * OUT + 2 * (IN + OUT) + IN),
        ("int8-swsc-outputs", 6 * IN + 3 * (IN + OUT) + 6 + 3 + OUT + OUT),
        ("int8-swsc-inputs", 5 * OUT + OUT),
        ("int8", IN * OUT + OUT),
        ("int4", IN * OUT + OUT * 5),
        ("bitmask", 500),
        ("bitmask-int4", 501 + OUT),
        ("elastic", IN * OUT),
    ],
)
def test_stored_numbers(case: str, numbers: int) -> None:
    assert build(case).stored_numbers == numbers


def test_small_label_tensors_are_bytes() -> None:
    assert SWSCLinear(300, 300, 256, 0).labels.dtype == torch.uint8
    assert SWSCLinear(300, 300, 257, 0).labels.dtype == torch.int32


@pytest.mark.parametrize("case", ["cur", "cur-rectangular"])
def test_cur_folds_into_two_factors(case: str) -> None:
    layer = build(case).double()
    folded = layer.fold()
    assert isinstance(folded, LowRankLinear)
    assert folded.rank == min(layer.rank, layer.rank_rows)
    x = torch.randn(4, IN, dtype=torch.float64)
    assert torch.allclose(folded(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["lowrank", "lowrank-pivoted", "lowrank-pivoted-full"])
def test_low_rank_becomes_cur_and_comes_back_exactly(case: str) -> None:
    layer = build(case)
    cur = layer.to_cur()
    kept = torch.equal(cur.dense_weight(), layer.dense_weight())
    assert kept or close(cur.dense_weight(), layer.dense_weight().double())
    assert torch.equal(cur.fold().dense_weight(), cur.dense_weight())
    assert torch.equal(cur.r.weight, layer.down.weight)
    if layer.pivoted:
        rows = layer.order[: layer.rank].long()
        assert torch.equal(layer.dense_weight()[rows], layer.down.weight)  # the kept rows are stored as they are


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_a_linear_moves_it_by_half_a_step_at_most(bits: int) -> None:
    dense = nn.Linear(IN, OUT)
    layer = QuantLinear.from_linear(dense, bits, group_size=8)
    step = layer.scales.repeat_interleave(8, 1)[:, :IN]
    assert ((layer.dense_weight() - dense.weight).abs() <= 0.5 * step + 1e-6).all()
    assert layer.bias is not None
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("pivoted", [False, True])
def test_rounding_the_factors_of_a_low_rank_layer(pivoted: bool) -> None:
    layer = build("lowrank-pivoted" if pivoted else "lowrank")
    rounded = QuantLowRankLinear.from_low_rank(layer, 8)
    for got, want in zip(rounded.factors(), (layer.down.weight, layer.up.weight), strict=True):
        assert ((got - want).abs() <= 0.51 * want.abs().amax(1, keepdim=True) / 127).all()
    x = torch.randn(3, IN)
    exact = QuantLowRankLinear.from_low_rank(layer, 8, activation_bits=8)(x)
    for y in (rounded(x), exact):
        assert (y - layer(x)).norm() < 0.03 * layer(x).norm()
    assert rounded.stored_numbers == layer.stored_numbers + layer.rank + layer.up.out_features


def test_rounded_activations_follow_the_layer() -> None:
    dense = nn.Linear(IN, OUT)
    x = torch.randn(3, IN)
    y = QuantLinear.from_linear(dense, 8, activation_bits=8)(x)
    plain = QuantLinear.from_linear(dense, 8)(x)
    assert 0 < (y - plain).norm() < 0.02 * plain.norm()


def test_elastic_prefix_is_the_corner_of_the_weight() -> None:
    layer = build("elastic")
    layer.set_active_(20, 11)
    x = torch.randn(3, 20)
    want = nn.functional.linear(x, layer.full.weight[:11, :20], layer.bias[:11])
    assert close(layer(x), want.double())
    with pytest.raises(ValueError, match=r"active_in is 34, allowed 0\.\.33"):
        layer.set_active_(34)


def test_integer_tensors_survive_a_change_of_dtype() -> None:
    for case in ("lowrank-pivoted", "swsc-outputs", "int4", "bitmask"):
        layer = build(case)
        kinds = {n: t.dtype for n, t in layer.state_dict().items() if not t.is_floating_point()}
        assert kinds
        half = copy.deepcopy(layer).half().state_dict()
        assert {n: half[n].dtype for n in kinds} == kinds
        assert all(t.dtype == torch.float16 for n, t in half.items() if n not in kinds)


@pytest.mark.parametrize("target", ["down", "up"])
@pytest.mark.parametrize("pivoted", [False, True])
def test_lora_on_a_factor_changes_the_output_and_trains(target: str, pivoted: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(build("lowrank-pivoted" if pivoted else "lowrank"))
    x = torch.randn(4, IN)
    before = model(x).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
    adapted.eval()
    after = adapted(x)
    assert not torch.allclose(after, before, atol=1e-3)
    after.square().sum().backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_" in n]
    assert grads
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(x), after, atol=1e-5)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "rank": (lambda: LowRankLinear(8, 6, 7), r"LowRankLinear: rank is 7, allowed 1\.\.6"),
    "rank_rows": (lambda: CURLinear(8, 6, 2, rank_rows=7), r"CURLinear: rank_rows is 7, allowed 1\.\.6"),
    "clusters": (lambda: SWSCLinear(8, 6, 0, 1), r"SWSCLinear: clusters is 0, allowed 1\.\.6"),
    "axis": (lambda: SWSCLinear(8, 6, 2, 1, axis=2), r"axis is 2, allowed 0\.\.1"),
    "bits": (lambda: QuantLinear(8, 6, 3), "bits is 3, allowed 4 or 8"),
    "group": (lambda: QuantLinear(8, 6, 4, group_size=3), "group_size is 3"),
    "activations": (lambda: QuantLinear(8, 6, 8, activation_bits=4), "activation_bits is 4, allowed 0 or 8"),
    "factor bits": (lambda: QuantLowRankLinear(8, 6, 2, 3), "bits 3, group_size 0, allowed 4 or 8"),
    "format": (lambda: MaskedLinear(8, 6, 4, format="csr"), "format is 'csr', allowed bitmask"),
    "two-of-four": (lambda: MaskedLinear(8, 6, 4, format="2:4"), "nnz is 4, allowed for format '2:4' are None"),
    "size": (lambda: ElasticLinear(0, 6), "in_features is 0, allowed 1 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_sizes_are_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match=r"rank is 2\.0, allowed is an integer"):
        LowRankLinear(8, 6, 2.0)  # type: ignore[arg-type]


def test_partial_elastic_layer_refuses_an_adapter() -> None:
    layer = ElasticLinear(8, 6)
    layer.set_active_(4)
    layer.full.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="only a part of it is active"):
        layer(torch.randn(2, 4))


def test_layers_name_themselves() -> None:
    text = str(build("lowrank-pivoted"))
    assert "in_features=33, out_features=41, bias=True, rank=7, pivoted=True" in text
    assert set(LAYERS) == {type(build(case)).__name__ for case in CASES}
