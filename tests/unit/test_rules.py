"""What the rules compute by kernels that a CPU does not have, with these written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastlt.autograd import rules


def reduce(dy: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight, *wanted: bool) -> tuple:
    """torch.batch_norm_backward_reduce, which only GPUs have: the sums of dy and of dy (x - mean) over each channel."""
    assert wanted == (True, False, False)
    over = [d for d in range(x.dim()) if d != 1]
    return dy.sum(over), (dy * (x - channels(mean, x))).sum(over), None, None


def elemt(dy, x, mean, inverse_std, weight, total, along, count) -> Tensor:
    """torch.batch_norm_backward_elemt: the gradient in x from these sums."""
    total, along = (channels(s / count.sum(), x) for s in (total, along))
    mean, inverse_std = channels(mean, x), channels(inverse_std, x)
    scaled = inverse_std if weight is None else inverse_std * channels(weight, x)
    return (dy - total - (x - mean) * inverse_std**2 * along) * scaled


def channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (9, 3)])
@pytest.mark.parametrize("directions", ["weight and bias", "weight", "bias", "without a weight"])
def test_batch_norms_tangent_by_a_gpus_kernels(monkeypatch, shape, directions):
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduce)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", elemt)
    draw = torch.Generator().manual_seed(0)
    x, dx = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    w, dw, b, db = (torch.randn(3, generator=draw, dtype=torch.float64) for _ in range(4))
    w[1] = 0  # as the last BatchNorm of a residual block may begin
    if directions == "without a weight":
        w = b = dw = db = None
    elif directions != "weight and bias":
        dw, db = (dw, torch.zeros_like(db)) if directions == "weight" else (torch.zeros_like(dw), db)

    def normalise(x, *rest):
        weight, bias = rest or (None, None)
        return torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)

    primals, tangents = ((x,), (dx,)) if w is None else ((x, w, b), (dx, dw, db))
    _, expected = torch.func.jvp(normalise, primals, tangents)
    _, mean, inverse_std = torch.native_batch_norm(x, w, b, None, None, True, 0.0, 1e-5)
    given = (None if d is None or not d.any() else d for d in (dw, db))
    found = rules._batch_norm_tangent_on_gpu(x, dx, w, *given, mean, inverse_std)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * expected.abs().max())
