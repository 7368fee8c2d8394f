"""What the generic suite of ops cannot say: known answers, independent implementations, packed formats, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from matrices import normal
from tolerance import assert_close
from torch import Tensor

from tinycomp import ops
from tinycomp.ops import _registry
from tinycomp.ops._registry import OPS
from tinycomp.ops.masked_formats import FORMATS
from tinycomp.ops.sample_without_replacement import _minus_log, _philox

# ---- low rank


def test_pivoted_storage_equals_the_dense_product(backend: str) -> None:
    r, t, x = normal(7, 33), normal(20, 7, seed=1), normal(5, 33, seed=2)
    order = torch.randperm(27, generator=torch.Generator().manual_seed(3)).int()
    dense = torch.empty(27, 33)
    dense[order.long()] = torch.cat([r, t @ r])
    reference = x.double() @ dense.double().t()
    assert_close(ops.lowrank_linear(x, r, t, order), x @ dense.t(), reference, "pivoted")
    assert torch.equal(ops.lowrank_linear(x, r, t, order)[:, order[:7].long()], ops.lowrank_linear(x, r, torch.eye(7)))


@pytest.mark.parametrize("axis", [0, 1])
def test_swsc_equals_the_rebuilt_weight(backend: str, axis: int) -> None:
    centroids = normal(6, 33) if axis == 0 else normal(41, 6)
    labels = torch.arange(41 if axis == 0 else 33) % 6
    scales, b, a, x = normal(labels.numel(), seed=1), normal(3, 33), normal(41, 3), normal(5, 33, seed=2)
    shared = centroids[labels] * scales[:, None] if axis == 0 else centroids[:, labels] * scales
    weight = (shared + a @ b).double()
    got = ops.swsc_linear(x, centroids, labels.to(torch.uint8), b, a, scales, None, axis)
    assert_close(got, x @ weight.float().t(), x.double() @ weight.t(), f"axis {axis}")


# ---- selection


def test_qr_pivots_are_those_of_lapack(backend: str) -> None:
    for seed, shape in enumerate([(40, 30), (12, 50), (64, 64)]):
        a = normal(*shape, seed=seed).double()
        k = min(shape) // 2
        expected = scipy.linalg.qr(a.numpy().T, mode="r", pivoting=True)[1][:k]
        assert ops.select_pivots(a, k, "qr").tolist() == expected.tolist()


def test_qr_pivots_after_the_rank_is_exhausted(backend: str) -> None:
    a = normal(20, 4) @ normal(4, 30, seed=1)
    pivots = ops.select_pivots(a, 9, "qr")
    assert len(set(pivots.tolist())) == 9
    assert torch.linalg.matrix_rank(a[pivots[:4]]) == 4
    zeros = torch.zeros(5, 3)
    zeros[3] = 1
    assert ops.select_pivots(zeros, 4, "qr").tolist() == [3, 0, 1, 2]
    assert ops.select_pivots(torch.zeros(4, 3), 3, "lu").tolist() == [0, 1, 2]


def deim(u: np.ndarray) -> list[int]:
    """The greedy loop of Chaturantabut and Sorensen, solved anew in each step."""
    chosen = [int(np.abs(u[:, 0]).argmax())]
    for j in range(1, u.shape[1]):
        c = np.linalg.solve(u[chosen, :j], u[chosen, j])
        chosen.append(int(np.abs(u[:, j] - u[:, :j] @ c).argmax()))
    return chosen


def test_lu_pivots_are_deim_indices(backend: str) -> None:
    for seed in range(3):
        u = np.linalg.svd(normal(50, 30, seed=seed).double().numpy(), full_matrices=False)[0][:, :12]
        assert ops.select_pivots(torch.from_numpy(u), 12, "lu").tolist() == deim(u)


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    a = torch.eye(4)[[1, 0, 1, 0]]
    assert ops.select_pivots(a, 2, "qr").tolist() == [0, 1]
    assert ops.kmeans_assign(torch.ones(3, 2), torch.ones(4, 2))[0].tolist() == [0, 0, 0]


# ---- sampling


def test_philox_known_answer() -> None:
    word0, word1 = _philox(torch.tensor([0]), 0)
    assert (int(word0), int(word1)) == (0x6627E8D5, 0xE169C58D)
    # A seed is its 64 bits, whatever its sign.
    assert torch.equal(_philox(torch.arange(9), -1)[0], _philox(torch.arange(9), 2**64 - 1)[0])


def test_logarithm_is_accurate() -> None:
    u = torch.cat(
        [torch.rand(1000, dtype=torch.float64), torch.tensor([2.0**-53, 1 - 2.0**-53, 0.5], dtype=torch.float64)]
    )
    assert torch.allclose(_minus_log(u), -u.log(), rtol=1e-15, atol=0)


def test_sampling_is_the_same_on_every_backend() -> None:
    if "cpu" not in {r["backend"] for r in ops.status() if r["available"]}:
        pytest.skip("the native library is not built")
    p = normal(5000).abs()
    for seed in (0, 1, -1, 2**63 - 1):
        native = ops.sample_without_replacement(p, 500, seed)
        assert torch.equal(native, OPS["sample_without_replacement"].reference(p, 500, seed))
        assert native.unique().numel() == 500
    assert not torch.equal(ops.sample_without_replacement(p, 9, 0), ops.sample_without_replacement(p, 9, 1))


def test_first_draw_follows_the_probabilities(backend: str) -> None:
    p = torch.tensor([1.0, 2.0, 0.0, 5.0])
    draws = torch.stack([ops.sample_without_replacement(p, 2, seed) for seed in range(1500)])
    frequency = torch.bincount(draws[:, 0], minlength=4) / 1500
    deviation = (p / 8 * (1 - p / 8) / 1500).sqrt()
    assert ((frequency - p / 8).abs() <= 4 * deviation).all()
    assert not (draws == 2).any()
    # Second draw given that the first was item 3: 1 to 2.
    rest = draws[draws[:, 0] == 3, 1]
    assert abs(float((rest == 1).float().mean()) - 2 / 3) < 4 * (2 / 9 / rest.numel()) ** 0.5


# ---- clustering and moments


def test_kmeans_against_all_distances(backend: str) -> None:
    x, mu = normal(60, 9), normal(7, 9, seed=1)
    labels, distances = ops.kmeans_assign(x, mu)
    all_distances = (x[:, None] - mu[None]).double().square().sum(2)
    assert torch.equal(labels.long(), all_distances.argmin(1))
    assert torch.allclose(distances.double(), all_distances.amin(1), rtol=1e-6)
    centroids, counts = ops.kmeans_update(x, labels, 8)
    for c in range(8):
        members = x[labels == c]
        assert counts[c] == members.shape[0]
        expected = members.mean(0) if members.shape[0] else torch.zeros(9)
        assert torch.allclose(centroids[c], expected, atol=1e-6)


def test_gram_adds_up_in_its_own_precision(backend: str) -> None:
    x = normal(5000, 20).bfloat16()
    gram = torch.zeros(20, 20, dtype=torch.float64)
    for part in x.split(1700):
        ops.gram_accumulate_(gram, part.reshape(10, -1, 20))
    assert torch.allclose(gram, x.double().t() @ x.double(), rtol=1e-13, atol=1e-10)


def test_column_norms_of_large_half_values(backend: str) -> None:
    # The square of 60000 overflows float16, its sum over many rows float32 in a narrower accumulation.
    assert torch.equal(ops.column_norms(torch.full((4, 3), 60000.0, dtype=torch.float16)), torch.full((3,), 120000.0))


# ---- rounding


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_to_the_nearest_level(bits: int, group_size: int, symmetric: bool) -> None:
    w = normal(9, 33)
    w[3] = 0
    q = ops.quantize(w, bits, group_size, symmetric)
    back = ops.dequantize(*q, 33, bits, group_size)
    steps = q.scales.repeat_interleave(group_size, 1)[:, :33] if group_size else q.scales
    # Clamping at the ends of an asymmetric range may add half a step to the half step of rounding.
    assert ((back - w).abs() <= (0.5 if symmetric else 1.0) * steps + 1e-6).all()
    assert torch.equal(back[3], torch.zeros(33))
    again = ops.quantize(back, bits, group_size, symmetric)
    assert torch.allclose(ops.dequantize(*again, 33, bits, group_size), back, atol=1e-6)


def test_int4_packing_is_exact() -> None:
    for size in (16, 15, 1, 0):
        q = torch.arange(-8, 8, dtype=torch.int8)[:size].repeat(2, 1)
        packed = ops.pack_int4(q)
        assert packed.shape == (2, (size + 1) // 2)
        assert torch.equal(ops.unpack_int4(packed, size), q)
    with pytest.raises(ValueError, match=r"values 8\.\.8, allowed -8\.\.7"):
        ops.pack_int4(torch.tensor([8], dtype=torch.int8))


def masked_weight(format: str, n: int, k: int) -> tuple[Tensor, Tensor]:
    w, keep = normal(n, k), normal(n, k, seed=1) > 0.5
    if format == "2:4":
        keep = torch.zeros(n, k, dtype=torch.bool)
        keep[:, 1::4] = True
        keep[::2, 3::4] = True
    if format == "block32":
        keep = torch.zeros(n, k, dtype=torch.bool)
        keep[:32, 32:64] = True
        keep[64:, :32] = True
    return w, keep


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value_bits", [0, 8, 4])
def test_packed_formats_round_trip(format: str, value_bits: int) -> None:
    w, keep = masked_weight(format, 70, 77)
    packed = ops.pack_masked(w, keep, format, value_bits)
    back = ops.unpack_masked(packed, 70, 77, format, value_bits)
    if value_bits == 0:
        assert torch.equal(back, w * keep)
    else:
        assert packed.scales is not None
        assert ((back - w * keep).abs() <= 0.5 * packed.scales + 1e-6).all()
        assert not back[~keep].any()
    again = ops.pack_masked(back, keep, format, 0)
    assert torch.equal(ops.unpack_masked(again, 70, 77, format), back)


def test_packed_sizes() -> None:
    w, keep = masked_weight("2:4", 64, 64)
    bits = ops.pack_masked(w, keep, "bitmask")
    assert bits.values.numel() == int(keep.sum())
    assert bits.mask.nbytes == 64 * 64 / 8
    two = ops.pack_masked(w, keep, "2:4", 4)
    assert (two.values.nbytes, two.mask.nbytes) == (64 * 64 / 2 / 2, 64 * 64 / 8)
    with pytest.raises(ValueError, match="4 of 4 consecutive inputs are kept, allowed 2"):
        ops.pack_masked(w, torch.ones_like(keep), "2:4")
    assert ops.pack_masked(torch.zeros(3, 9)).values.numel() == 0


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_bits_beyond_the_last_column_are_ignored(backend: str, rows: int) -> None:
    w, keep = masked_weight("bitmask", 70, 77)
    x, packed = normal(rows, 77, seed=2).bfloat16(), ops.pack_masked(w.bfloat16(), keep)
    expected = ops.masked_linear(x, *packed, None, 70)
    stray = packed._replace(mask=packed.mask.clone())
    stray.mask[:, -1] |= 0xE0
    assert torch.equal(ops.masked_linear(x, *stray, None, 70), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value_bits", [0, 8, 4])
def test_more_inputs_than_go_through_a_masked_weight_together(backend: str, format: str, value_bits: int) -> None:
    w, keep = masked_weight(format, 70, 1060)
    if format == "block32":  # more blocks than go through a panel together
        keep = (normal(3, 34, seed=3) > -0.5).repeat_interleave(32, 0).repeat_interleave(32, 1)[:70, :1060]
    x, packed = normal(300, 1060, seed=2), ops.pack_masked(w, keep, format, value_bits)
    got = ops.masked_linear(x, *packed, None, 70, format, value_bits)
    dense = ops.unpack_masked(packed, 70, 1060, format, value_bits)
    assert_close(got, x @ dense.t(), x.double() @ dense.double().t(), format)


# ---- bad input

ONES = torch.ones
STEP = (ONES(6), ONES(6), None, ONES(6).int(), ONES(6), None, 0, 0.1, 1.0, 1.0, 1.0, 0.0, True, False)
BAD = [
    ("split_bregman_step_", (*STEP, ONES(6)), ValueError, "got second without momentum, allowed both"),
    ("split_bregman_step_", (*STEP, None, 1.0), ValueError, "beta2 1.0, .*allowed 0 <= beta, beta2 < 1"),
    ("split_bregman_step_", (*STEP, None, 0.9, 0.0), ValueError, "eps is 0.0, allowed above 0"),
    ("split_bregman_step_", (*STEP, None, 0.9, 1e-8, 4), ValueError, "group_size is 4, allowed 0 or a divisor of 6"),
    (
        "split_bregman_step_",
        (*STEP, None, 0.9, 1e-8, 0, ONES(2).byte()),
        ValueError,
        r"support has shape \(2,\), allow",
    ),
    ("lowrank_linear", ([1.0], ONES(2, 1), ONES(2, 2)), TypeError, "x is a list, allowed is a tensor"),
    ("lowrank_linear", (ONES(3).int(), ONES(2, 3), ONES(2, 2)), TypeError, "x has dtype torch.int32, allowed float32"),
    ("lowrank_linear", (ONES(1, 3), ONES(2, 4), ONES(2, 2)), ValueError, r"r has shape \(2, 4\), allowed \(any, 3\)"),
    ("lowrank_linear", (ONES(1, 3), ONES(2, 3), ONES(2, 3)), ValueError, r"t has shape \(2, 3\), allowed \(any, 2\)"),
    ("lowrank_linear", (ONES(1, 3), ONES(2, 3).half(), ONES(2, 2)), TypeError, "r has dtype torch.float16, allowed"),
    (
        "lowrank_linear",
        (ONES(1, 3), ONES(2, 3), ONES(1, 2), torch.tensor([0, 1, 3]).int()),
        ValueError,
        r"indices 0\.\.3",
    ),
    ("lowrank_linear", (ONES(1, 3), ONES(2, 3), ONES(1, 2), torch.tensor([0, 1, 1]).int()), ValueError, "repeats"),
    ("lowrank_linear", (ONES(1, 3), ONES(2, 3), ONES(1, 2), None, ONES(2)), ValueError, "bias has shape"),
    ("cur_linear", (ONES(1, 3), ONES(2, 3), ONES(4, 3), ONES(5, 4)), ValueError, "u has shape"),
    (
        "swsc_linear",
        (ONES(1, 3), ONES(2, 3), torch.tensor([0, 2]), ONES(0, 3), ONES(2, 0)),
        ValueError,
        r"labels .*0\.\.2",
    ),
    (
        "swsc_linear",
        (ONES(1, 3), ONES(2, 3), ONES(2).int(), ONES(0, 3), ONES(2, 0), None, None, 2),
        ValueError,
        "axis is 2",
    ),
    ("quant_linear", (ONES(1, 4), ONES(2, 4).to(torch.int8), ONES(2, 1), None, None, 3), ValueError, "bits is 3"),
    ("quant_linear", (ONES(1, 4), ONES(2, 4).to(torch.int8), ONES(2, 2)), ValueError, "scales of qweight has shape"),
    ("kmeans_assign", (ONES(3, 2), ONES(0, 2)), ValueError, "centroids has 0 rows"),
    ("kmeans_update", (ONES(3, 2), torch.tensor([0, 1, 5]), 2), ValueError, r"labels holds indices 0\.\.5"),
    ("select_pivots", (ONES(3, 2), 4), ValueError, r"k is 4, allowed 0\.\.3"),
    ("select_pivots", (ONES(3, 2), 3, "lu"), ValueError, r"k is 3, allowed 0\.\.2"),
    ("select_pivots", (ONES(3, 2), 1, "svd"), ValueError, "method is 'svd', allowed 'qr' or 'lu'"),
    ("select_pivots", (ONES(3, 2) * float("nan"), 1), ValueError, "a holds NaN or infinity"),
    ("sample_without_replacement", (torch.tensor([1.0, 0.0]), 2, 0), ValueError, r"k is 2, allowed 0\.\.1"),
    ("sample_without_replacement", (torch.tensor([1.0, -1.0]), 1, 0), ValueError, "negative"),
    ("column_norms", (ONES(3),), ValueError, r"w has shape \(3,\), allowed \(any, any\)"),
    ("gram_accumulate_", (ONES(2, 2), ONES(4, 3)), ValueError, r"gram has shape \(2, 2\), allowed \(3, 3\)"),
    ("gram_accumulate_", (ONES(3, 3).half(), ONES(4, 3)), TypeError, "gram has dtype torch.float16, allowed float32"),
    ("sliced_linear", (ONES(1, 3), ONES(2, 3), None, 4, 2), ValueError, r"in_features is 4, allowed 0\.\.3"),
    ("masked_linear", (ONES(1, 3), ONES(1), ONES(2, 1), None, None, None, 2, "csr"), ValueError, "format is 'csr'"),
]


@pytest.mark.parametrize(("name", "args", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(backend: str, name: str, args: tuple, error: type, message: str) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=f"{name}: .*{message}"):
            getattr(ops, name)(*args)


def test_masked_linear_refuses_a_mask_that_disagrees() -> None:
    packed = ops.pack_masked(normal(3, 9))
    wrong = packed._replace(mask=packed.mask & 254)
    with pytest.raises(ValueError, match="offsets disagree with mask"):
        ops.masked_linear(ONES(1, 9), *wrong, None, 3)


@pytest.mark.parametrize("inputs", [1, 2, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_linear_refuses_a_column_that_is_not_there(inputs: int, dtype: torch.dtype) -> None:
    weight = normal(3, 9).to(dtype)
    packed = ops.pack_masked(weight, weight > 0, "index")
    for column in (9, 65535):
        mask = packed.mask.clone()
        mask[1] = torch.tensor(column).to(torch.int16)
        with pytest.raises(ValueError, match="masked_linear: "):
            ops.masked_linear(normal(inputs, 9).to(dtype), *packed._replace(mask=mask), None, 3, "index")
    # A row of more kept weights than there are columns.
    long = packed._replace(values=torch.ones(12).to(dtype), mask=torch.zeros(12, dtype=torch.int16))
    offsets = torch.tensor([0, 12, 12, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="masked_linear: "):
        ops.masked_linear(normal(inputs, 9).to(dtype), *long._replace(offsets=offsets), None, 3, "index")


def test_an_op_is_defined_once() -> None:
    with pytest.raises(ValueError, match="column_norms' is already defined"):
        _registry.define(OPS["column_norms"])
