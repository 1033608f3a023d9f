"""Mixup and CutMix against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlt.augment import cutmix, mixup
from fastlt.augment.mixup import cutmix_box, sample_lam


def batch(count: int = 6, height: int = 10, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Image n holds the value n + 1 throughout and has label n, so that a pixel says where it came from."""
    images = torch.arange(1.0, count + 1).view(-1, 1, 1, 1).repeat(1, 3, height, width)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(count)


@pytest.mark.parametrize("seed", range(20))
def test_mixup_blends_images_as_it_says(seed):
    images, labels = batch()
    mixed, a, b, lam = mixup(images, labels, 1.0, torch.Generator().manual_seed(seed))
    expected = lam.double() * (a + 1) + (1 - lam.double()) * (b + 1)
    assert torch.equal(a, labels)
    assert torch.equal(b.sort().values, labels)
    torch.testing.assert_close(mixed[:, 0, 0, 0].double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(mixed, mixed[:, :1, :1, :1].expand_as(mixed))
    assert torch.equal(images, batch()[0])


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_pastes_one_rectangle_and_lam_is_the_share_that_stays(seed):
    images, labels = batch()
    mixed, a, b, lam = cutmix(images, labels, 1.0, torch.Generator().manual_seed(seed))
    assert torch.equal(a, labels)
    moved = np.flatnonzero((a != b).numpy())
    for n in moved:
        values = mixed[n, 0].numpy()
        pasted = values == float(b[n] + 1)
        assert set(np.unique(values)) <= {float(a[n] + 1), float(b[n] + 1)}
        assert 1 - pasted.mean() == pytest.approx(float(lam), abs=1e-6)
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns)
    assert torch.equal(images, batch()[0])


@pytest.mark.parametrize("mix", [mixup, cutmix])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_the_form_of_the_input(mix, dtype):
    images, labels = batch()
    mixed, _, b, lam = mix(images.to(dtype), labels, 0.2, torch.Generator().manual_seed(1))
    assert mixed.dtype == dtype
    assert mixed.shape == images.shape
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert b.dtype == torch.int64
    assert lam.dtype == torch.float32
    assert lam.ndim == 0


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_alpha_zero_mixes_nothing(mix):
    images, labels = batch()
    mixed, _, _, lam = mix(images, labels, 0, torch.Generator().manual_seed(0))
    assert torch.equal(mixed, images)
    assert float(lam) == 1


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_the_generator_alone_decides(mix):
    images, labels = batch()
    first = mix(images, labels, 1.0, torch.Generator().manual_seed(3))
    torch.manual_seed(9)
    again = mix(images, labels, 1.0, torch.Generator().manual_seed(3))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_batch_of_one_is_mixed_with_itself(mix):
    images, labels = batch(1)
    mixed, _, b, _ = mix(images, labels, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed, images)
    assert b.tolist() == [0]


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 4.0])
def test_lam_follows_beta(alpha):
    generator = torch.Generator().manual_seed(0)
    draws = np.array([sample_lam(alpha, generator) for _ in range(4000)])
    assert ((draws >= 0) & (draws <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(draws.mean() - 0.5) < 4.5 * (variance / len(draws)) ** 0.5
    assert draws.var() == pytest.approx(variance, rel=0.1)


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha is -1"):
        sample_lam(-1, torch.Generator())


def test_the_box_has_the_share_asked_for_before_clipping():
    generator = torch.Generator().manual_seed(0)
    boxes = [cutmix_box(100, 80, 0.75, generator) for _ in range(500)]
    assert max((b - t) * (r - left) for t, b, left, r in boxes) == 50 * 40
    assert all(0 <= t <= b <= 100 and 0 <= left <= r <= 80 for t, b, left, r in boxes)
    top, bottom, left, right = cutmix_box(100, 80, 1.0, generator)
    assert (top, left) == (bottom, right)
