"""The ops of `tc.fuse_`, beside what the generic tests of every op say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tinycomp import ops


def test_wrong_arguments_say_what_is_allowed() -> None:
    q, k = torch.ones(1, 4, 1, 8), torch.ones(1, 3, 5, 8)
    with pytest.raises(ValueError, match=r"q has 4 heads and k 3, allowed a multiple of those of k"):
        ops.decode_attention(q, k, k, None, 1.0)
    k = torch.ones(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"v has shape \(1, 2, 4, 8\), allowed \(1, 2, 5, any\)"):
        ops.decode_attention(q, k, k[:, :, :4], None, 1.0)
    with pytest.raises(TypeError, match=r"mask has dtype torch.float32, allowed bool"):
        ops.decode_attention(q, k, k, torch.ones(1, 1, 1, 5), 1.0)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4, 1, 5\), allowed \(1, 1, 1, 5\)"):
        ops.decode_attention(q, k, k, torch.ones(1, 4, 1, 5, dtype=torch.bool), 1.0)
    with pytest.raises(TypeError, match=r"k has dtype torch.float16, allowed torch.float32 as the input"):
        ops.decode_attention(q, k.half(), k, None, 1.0)
    with pytest.raises(ValueError, match=r"q has shape \(4, 8\), allowed \(any, any, any, any\)"):
        ops.decode_attention(q[0, :, 0], k, k, None, 1.0)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    q, k = torch.ones(1, 1, 1, 16), torch.zeros(1, 1, 200, 16)
    for bad in (float("nan"), float("inf")):
        poisoned = k.clone()
        poisoned[0, 0, 150, 3] = bad
        assert ops.decode_attention(q, poisoned, k, None, 1.0).isnan().all()
        assert ops.decode_attention(q, k, poisoned, None, 1.0)[..., 3].isfinite().logical_not().all()
        seen = torch.ones(1, 1, 1, 200, dtype=torch.bool)
        seen[..., 150] = False
        assert ops.decode_attention(q, poisoned, k, seen, 1.0).isfinite().all()
    for dtype in (torch.float32, torch.float64):
        huge = torch.full((1, 1, 1, 16), 1e30 if dtype == torch.float32 else 1e300, dtype=dtype)
        with ops.use_backend("torch"):
            wanted = ops.decode_attention(-huge, huge, huge, None, 1.0)
        assert wanted.count_nonzero() == ops.decode_attention(-huge, huge, huge, None, 1.0).count_nonzero() == 0


def test_a_gradient_is_not_cut_off_in_silence() -> None:
    x, q = torch.ones(2, 8, requires_grad=True), torch.ones(1, 1, 1, 8, requires_grad=True)
    angles = torch.ones(1, 1, 8)
    for call in (
        lambda: ops.rms_norm(x, torch.ones(8), 1e-6),
        lambda: ops.decode_attention(q, q, q, None, 1.0),
        lambda: ops.rotary_embedding(q, q, angles, angles)[1],
        lambda: ops.silu_and_mul(x, x),
    ):
        with pytest.raises(RuntimeError, match=r"an input requires a gradient, allowed are none; call it under"):
            call()
        with torch.no_grad():
            assert call().isfinite().all()


def test_many_queries_of_a_head_and_threads(backend: Any) -> None:
    """More lines than meet keys at once, and the same numbers from one thread and two."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, d, generator=generator) for h, n, d in ((6, 60, 32), (1, 300, 32), (1, 300, 20)))
    reference = ops.OPS["decode_attention"].reference(*(t.double() for t in (q, k, v)), None, 0.2)
    got = ops.decode_attention(q, k, v, None, 0.2)
    torch.testing.assert_close(got, reference.float(), rtol=1e-5, atol=1e-6)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 40):
            torch.set_num_threads(count)
            assert torch.equal(ops.decode_attention(q, k, v, None, 0.2), got)
    finally:
        torch.set_num_threads(threads)


def test_wrong_norms_say_what_is_allowed() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), allowed \(8\)"):
        ops.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(TypeError, match=r"weight has dtype torch.float16, allowed torch.float32 as the input"):
        ops.rms_norm(x, torch.ones(8).half(), 1e-6)
    with pytest.raises(ValueError, match="x has 0 dimensions, allowed at least 1"):
        ops.rms_norm(torch.tensor(1.0), torch.ones(1), 1e-6)
    assert ops.rms_norm(torch.full((1, 8), float("nan")), torch.ones(8), 1e-6).isnan().all()


def test_wrong_angles_and_gates_say_what_is_allowed() -> None:
    q, angles = torch.ones(2, 4, 5, 8), torch.ones(1, 5, 8)
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 4, 8\), allowed \(2, any, 5, 8\)"):
        ops.rotary_embedding(q, q[:, :, :4], angles, angles)
    for wrong in (torch.ones(3, 5, 8), torch.ones(1, 5, 7), torch.ones(1, 5, 10)):
        with pytest.raises(ValueError, match=r"allowed \(2 or 1, 5, an even number up to 8\); check which is which"):
            ops.rotary_embedding(q, q, wrong, wrong)
    with pytest.raises(ValueError, match=r"sin has shape \(1, 5, 6\), allowed \(1, 5, 8\)"):
        ops.rotary_embedding(q, q, angles, angles[..., :6])
    with pytest.raises(TypeError, match=r"cos has dtype torch.float64, allowed torch.float32 as the input"):
        ops.rotary_embedding(q, q, angles.double(), angles.double())
    with pytest.raises(ValueError, match=r"up has shape \(2, 7\), allowed \(2, 8\)"):
        ops.silu_and_mul(torch.ones(2, 8), torch.ones(2, 7))
    with pytest.raises(TypeError, match=r"up has dtype torch.float16, allowed torch.float32 as the input"):
        ops.silu_and_mul(torch.ones(2, 8), torch.ones(2, 8).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gates_of_any_size(dtype: torch.dtype) -> None:
    """Those that are not finite, and those whose exponential is not."""
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, -88, -90, 20, float("inf"), float("-inf"), float("nan")]).to(dtype)
    got, wanted = ops.silu_and_mul(gate, torch.ones_like(gate)), torch.nn.functional.silu(gate)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_many_tokens_in_parts_and_threads() -> None:
    heads = torch.randn(2, 3, 900, 64), torch.randn(2, 1, 900, 64)
    angles, gate = torch.randn(2, 900, 64), torch.randn(31, 5000)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 40):
            torch.set_num_threads(count)
            found.append([*ops.rotary_embedding(*heads, angles, angles), ops.silu_and_mul(gate, gate)])
    finally:
        torch.set_num_threads(threads)
    with ops.use_backend("torch"):
        wanted = [*ops.rotary_embedding(*heads, angles, angles), ops.silu_and_mul(gate, gate)]
    for each in found:
        assert all(map(torch.equal, each, found[0]))
        torch.testing.assert_close(each, wanted)
