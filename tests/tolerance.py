"""The one tolerance rule: a result may be at most twice as far from the float64 reference as torch in its own dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the float64 reference; NaN or infinity in `got` gives NaN."""
    if got.numel() == 0:
        return 0.0
    wide = reference.double()
    difference = float((got.double() - wide).norm())
    size = float(wide.norm())
    return difference / size if size else difference


def assert_close(got: Tensor, torch_result: Tensor, reference: Tensor, what: str) -> None:
    """Assert err(got) <= 2 err(torch in the same dtype) + 4 machine epsilons, errors against the float64 reference."""
    assert got.shape == reference.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(reference.shape)}"
    assert got.dtype == torch_result.dtype, f"{what}: dtype {got.dtype}, wanted {torch_result.dtype}"
    allowed = 2 * relative_error(torch_result, reference) + 4 * torch.finfo(got.dtype).eps
    error = relative_error(got, reference)
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"
