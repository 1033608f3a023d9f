"""Images that grow are interpolated between pixels, as torch does, whichever way they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loaders.stored.ffcv_kernels import resize_crop


def interpolated(image: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """The rectangle (top, left, height, width) by torch's bilinear interpolation, in float64."""
    top, left, height, width = box
    cut = torch.from_numpy(image[top : top + height, left : left + width].copy()).permute(2, 0, 1)[None].double()
    return F.interpolate(cut, size=size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(96, 96), (61, 47), (33, 200), (1000, 3)])
@pytest.mark.parametrize("box", [(0, 0, 32, 32), (3, 5, 20, 27), (31, 0, 1, 32), (4, 9, 1, 1)])
def test_what_grows_is_interpolated_as_by_torch(box, size):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = np.empty((*size, 3), dtype=np.uint8)
    resize_crop(image, box, out)
    assert np.abs(out - interpolated(image, box, size)).max() <= 0.501


def test_an_image_at_three_times_its_size_repeats_no_pixels():
    """OpenCV's area interpolation, by which FFCV enlarges, would give steps of three pixels."""
    ramp = np.repeat(np.arange(0, 160, 5, dtype=np.uint8)[None, :, None], 32, axis=0).repeat(3, axis=2)
    out = np.empty((96, 96, 3), dtype=np.uint8)
    resize_crop(np.ascontiguousarray(ramp), (0, 0, 32, 32), out)
    steps = np.diff(out[48, :, 0].astype(int))
    assert (steps[2:-2] > 0).all()
    assert steps.max() <= 2
