"""Crop, flip and cutout against slow references, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastlt.augment import build_augment, geometry
from fastlt.augment.cutout import cutout
from fastlt.augment.operations import Cutout, Flip, RandomCrop, Shape


def pixels(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "width", "size", "padding", "fill"), [(32, 32, 32, 4, 0), (8, 12, 6, 3, 128)])
def test_random_crop_equals_padding_and_slicing_each_image(height, width, size, padding, fill):
    images = pixels(40, height, width)
    operation = RandomCrop(size, padding, fill)
    draws = operation.draw(Shape(40, height, width), torch.Generator().manual_seed(3))
    out = operation.apply(images, draws)
    for n in range(40):
        slow = np.full((3, height + 2 * padding, width + 2 * padding), fill, np.uint8)
        slow[:, padding : padding + height, padding : padding + width] = images[n].numpy()
        top, left = divmod(int(draws[n]), width + 2 * padding)
        np.testing.assert_array_equal(out[n].numpy(), slow[:, top : top + size, left : left + size])


def test_random_crop_offsets_are_uniform_and_independent():
    draws = RandomCrop(32, 4).draw(Shape(81_000, 32, 32), torch.Generator().manual_seed(0))
    top, left = draws // 40, draws % 40
    cells = torch.bincount(top * 9 + left, minlength=81)
    assert cells.numel() == 81
    # Chi-square with 80 degrees of freedom: mean 80, standard deviation 12.6; the seed is fixed.
    assert ((cells - 1000.0) ** 2 / 1000).sum() < 80 + 4 * 12.6


def test_flip_mirrors_the_chosen_images_only():
    images = pixels(200, 5, 7)
    operation = Flip(0.5)
    rows = operation.draw(Shape(200, 5, 7), torch.Generator().manual_seed(0))
    chosen = set(rows.chosen.tolist())
    assert 70 < len(chosen) < 130
    out = operation.apply(images, rows)
    for n in range(200):
        want = images[n].numpy()[:, :, ::-1] if n in chosen else images[n].numpy()
        np.testing.assert_array_equal(out[n].numpy(), want)


@pytest.mark.parametrize(("p", "flipped"), [(0.0, 0), (1.0, 50)])
def test_flip_with_certainty(p, flipped):
    rows = Flip(p).draw(Shape(50, 4, 4), torch.Generator().manual_seed(0))
    assert rows.chosen.numel() == flipped


def test_gather_pixels_takes_each_image_its_own_positions():
    images = pixels(2, 3, 4)
    source = torch.tensor([[[0, 11]], [[5, 5]]])
    out = geometry.gather_pixels(images, source)
    assert out.shape == (2, 3, 1, 2)
    assert torch.equal(out[0, :, 0, 1], images[0, :, 2, 3])
    assert torch.equal(out[1, :, 0, 0], images[1, :, 1, 1])


def slow_cutout(image: np.ndarray, centre_y: int, centre_x: int, length: int) -> np.ndarray:
    """The paper's procedure for one image (C, H, W) and an even side: clip the square's sides, write zeros."""
    out = image.copy()
    _, height, width = image.shape
    y1, y2 = np.clip([centre_y - length // 2, centre_y + length // 2], 0, height)
    x1, x2 = np.clip([centre_x - length // 2, centre_x + length // 2], 0, width)
    out[:, y1:y2, x1:x2] = 0
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("height", "width", "length"), [(10, 10, 6), (7, 12, 4), (9, 5, 20)])
def test_cutout_equals_the_slow_one_at_every_centre(height, width, length, dtype):
    centres = [(y, x) for y in range(height) for x in range(width)]
    images = (torch.randn(len(centres), 3, height, width) - 3).to(dtype)
    out = cutout(images.to(memory_format=torch.channels_last, copy=True), torch.tensor(centres).T, length)
    for n, (y, x) in enumerate(centres):
        want = slow_cutout(images[n].double().numpy(), y, x, length)
        np.testing.assert_array_equal(out[n].double().numpy(), want)
        assert not np.signbit(out[n].double().numpy()[want == 0]).any()


@pytest.mark.parametrize(("size", "image"), [(16, 32), (5, 8), (40, 8)])
def test_cutout_hides_what_the_exact_expectation_says(size, image):
    count = 20_000
    operation = Cutout(size)
    draws = operation.draw(Shape(count, image, image), torch.Generator().manual_seed(0))
    hidden = operation.apply(torch.ones(count, 1, image, image), draws).eq(0).flatten(1).double().mean(1)
    sides = [min(c - size // 2 + size, image) - max(c - size // 2, 0) for c in range(image)]
    expected = (np.mean(sides) / image) ** 2
    assert abs(hidden.mean().item() - expected) < 4 * max(hidden.std().item(), 1e-12) / count**0.5 + 1e-12


def test_cutout_with_probability_leaves_whole_images_whole():
    operation = Cutout(4, 0.25)
    draws = operation.draw(Shape(4000, 8, 8), torch.Generator().manual_seed(0))
    images = torch.ones(4000, 3, 8, 8).to(memory_format=torch.channels_last)
    touched = operation.apply(images, draws).eq(0).flatten(1).any(1)
    assert torch.equal(touched, draws.amax(0) < 8)
    assert 0.22 < touched.double().mean().item() < 0.28


def test_cutout_fills_with_the_mean_of_the_data_set():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    augment = build_augment([{"cutout": {"size": 64}}], image_size=16, mean=mean, std=std, seed=0, device="cpu")
    assert torch.equal(augment(pixels(3, 16, 16)), torch.zeros(3, 3, 16, 16))
