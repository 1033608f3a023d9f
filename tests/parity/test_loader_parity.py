"""All backends deliver the same images, and these are what an independent reference says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from small_betons import SmallDataset, mixed_shapes, write_small

from loaders.crop import CropSpec, center_boxes
from loaders.factory import BACKENDS, make_loader
from loaders.native import keep_torch_threads

COUNT = 37
SIZE = 24
# Evaluation pixels from JPEG storage against a decoder with the accurate DCT (OpenCV's), on 0..255.
JPEG_MAX_LEVELS, JPEG_MEAN_LEVELS = 8, 1.5


@pytest.fixture(scope="module")
def raw32(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("raw32") / "train.beton", [(32, 32)] * COUNT, "raw")


@pytest.fixture(scope="module")
def raw_mixed(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("raw_mixed") / "train.beton", mixed_shapes(COUNT), "raw")


@pytest.fixture(scope="module")
def jpg_mixed(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("jpg_mixed") / "train.beton", mixed_shapes(COUNT), "jpg")


def pixels(dataset: SmallDataset, backend: str, crop: CropSpec, *, train: bool = False, epoch: int = 0) -> np.ndarray:
    """All images of an epoch as (N, H, W, 3), in the order they came."""
    loader = make_loader(
        dataset, "train", backend=backend, batch_size=8, device="cpu", train=train, crop=crop, num_workers=1
    )
    images = torch.cat([batch.images for batch in loader.epoch(epoch)])
    loader.close()
    return images.permute(0, 2, 3, 1).numpy()


def reference_center(image: np.ndarray, size: int, ratio: float) -> np.ndarray:
    """Central square of side int(ratio * short side), by OpenCV's area interpolation."""
    height, width = image.shape[:2]
    side = int(ratio * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    return cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_images_without_a_crop_come_back_unchanged(raw32, backend):
    np.testing.assert_array_equal(pixels(raw32, backend, CropSpec("none")), np.stack(raw32.images))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "ratio"), [(SIZE, 224 / 256), (96, 1.0)])
def test_center_crops_of_raw_images_equal_opencv(raw_mixed, backend, size, ratio):
    expected = np.stack([reference_center(image, size, ratio) for image in raw_mixed.images])
    np.testing.assert_array_equal(pixels(raw_mixed, backend, CropSpec("center", size, ratio)), expected)


def test_center_boxes_equal_ffcvs_own():
    with keep_torch_threads():
        from ffcv.fields.rgb_image import get_center_crop
    heights, widths = np.random.default_rng(0).integers(2, 900, (2, 500))
    for ratio in (224 / 256, 0.875, 1.0, 0.5):
        expected = [get_center_crop(h, w, None, ratio) for h, w in zip(heights, widths, strict=True)]
        np.testing.assert_array_equal(center_boxes(heights, widths, ratio), expected)


def test_backends_agree_bit_for_bit_on_jpeg_storage(jpg_mixed):
    reference = pixels(jpg_mixed, "torch", CropSpec("center", SIZE))
    for backend in BACKENDS:
        np.testing.assert_array_equal(pixels(jpg_mixed, backend, CropSpec("center", SIZE)), reference, err_msg=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jpeg_storage_stays_within_the_stated_bound_of_an_accurate_decoder(jpg_mixed, backend):
    expected = []
    for image in jpg_mixed.images:
        _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
        decoded = np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
        expected.append(reference_center(decoded, SIZE, 224 / 256))
    got = pixels(jpg_mixed, backend, CropSpec("center", SIZE))
    error = np.abs(got.astype(np.int64) - np.stack(expected))
    assert error.max() <= JPEG_MAX_LEVELS
    assert error.mean() <= JPEG_MEAN_LEVELS


@pytest.mark.parametrize("dataset", ["raw_mixed", "jpg_mixed"])
def test_random_crops_are_a_function_of_seed_and_epoch_alone(dataset, request):
    dataset, crop = request.getfixturevalue(dataset), CropSpec("random_resized", SIZE)
    first = pixels(dataset, "ffcv", crop, train=True, epoch=2)
    np.testing.assert_array_equal(pixels(dataset, "torch", crop, train=True, epoch=2), first)
    assert (pixels(dataset, "torch", crop, train=True, epoch=3) != first).any()
