"""All backends deliver the same images, and these are what an independent reference says.

In training, DALI's are the same up to how cut-outs are resized, which has bounds of its own.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from small_betons import DALI_BACKENDS, EVERY_BACKEND, SmallDataset, mixed_shapes, needs_dali, write_images, write_small
from torchvision.transforms import RandomResizedCrop

from fastlt.augment import build_augment
from loaders.factory import make_loader
from loaders.order.crop import CropSpec, center_boxes
from loaders.order.plan import EpochPlan
from loaders.sources import FileSplit, Source
from loaders.stored.convert import convert
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.ffcv_kernels import keep_torch_threads
from loaders.stored.piece_writer import write_split
from loaders.stored.tar_shards import TarShards

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
    """Central square of side int(ratio * short side), by OpenCV's area interpolation, or bilinear where it grows."""
    height, width = image.shape[:2]
    side = int(ratio * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    interpolation = cv2.INTER_AREA if side >= size else cv2.INTER_LINEAR
    return cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=interpolation)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_raw_images_without_a_crop_come_back_unchanged(raw32, backend):
    np.testing.assert_array_equal(pixels(raw32, backend, CropSpec("none")), np.stack(raw32.images))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize(("size", "ratio"), [(SIZE, 224 / 256), (96, 1.0)])
def test_center_crops_of_raw_images_equal_opencv(raw_mixed, backend, size, ratio):
    expected = np.stack([reference_center(image, size, ratio) for image in raw_mixed.images])
    got = pixels(raw_mixed, backend, CropSpec("center", size, ratio))
    grows = np.array([int(ratio * min(image.shape[:2])) < size for image in raw_mixed.images])
    np.testing.assert_array_equal(got[~grows], expected[~grows])
    # Where images grow, OpenCV rounds to whole levels between its two directions.
    np.testing.assert_allclose(got[grows].astype(np.int64), expected[grows], rtol=0, atol=1)


def test_center_boxes_equal_ffcvs_own():
    with keep_torch_threads():
        from ffcv.fields.rgb_image import get_center_crop
    heights, widths = np.random.default_rng(0).integers(2, 900, (2, 500))
    for ratio in (224 / 256, 0.875, 1.0, 0.5):
        expected = [get_center_crop(h, w, None, ratio) for h, w in zip(heights, widths, strict=True)]
        np.testing.assert_array_equal(center_boxes(heights, widths, ratio), expected)


@pytest.mark.filterwarnings("error:The external source node")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_backends_agree_bit_for_bit_on_jpeg_storage(jpg_mixed, backend):
    center = CropSpec("center", SIZE)
    np.testing.assert_array_equal(pixels(jpg_mixed, backend, center), pixels(jpg_mixed, "torch", center))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
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


# Evaluation pixels of photographs from shards, the original JPEGs, against those from a .beton file: on average over
# all, over the worst image, and the worst pixel.
FORMATS_DIFFER = {"raw": (1.25, 2.0, 24), "jpg": (2.25, 5.0, 128)}


@needs_dali
@pytest.mark.parametrize("mode", FORMATS_DIFFER)
def test_formats_of_one_data_set_stay_within_the_stated_bounds(real_data, tmp_path, mode):
    folder = real_data("imagenet_samples")
    paths = sorted(path.name for path in folder.iterdir())[:60]
    split = FileSplit(folder, paths, np.zeros(len(paths), dtype=np.int64), "photographs")
    source = Source("photographs", ("any",), dict.fromkeys(("train", "meta", "test"), split))
    options = FfcvOptions(mode, jpeg_quality=90, num_workers=1)
    formats = ("ffcv", "dali")
    dataset = convert(
        source, tmp_path / "out", options=options, request={}, formats=formats, allow_duplicates=True, progress=False
    )
    error = np.abs(np.subtract(*(pixels(dataset, kind, CropSpec("center", 224)).astype(np.int64) for kind in formats)))
    mean, worst_image, worst_pixel = FORMATS_DIFFER[mode]
    assert error.mean() <= mean
    assert error.mean(axis=(1, 2, 3)).max() <= worst_image
    assert error.max() <= worst_pixel


def boxes_seen(images: np.ndarray) -> np.ndarray:
    """The rectangles that were cut from images whose red is the column and whose green is the row: float64 (N, 4)."""
    size = images.shape[2]
    inner = np.arange(size // 8, size - size // 8)  # off the border, where filters repeat pixels
    sides = []
    for values in (images[..., 1].mean(axis=2), images[..., 0].mean(axis=1)):
        slope, first = np.polyfit(inner, values[:, inner].T, 1)
        sides.append((first + 0.5 - slope / 2, slope * size))
    (top, height), (left, width) = sides
    return np.stack([top, left, height, width], axis=1)


@pytest.fixture(scope="module")
def gradient(tmp_path_factory) -> SmallDataset:
    """120 times one image of 256x256 that says in each pixel where it lies."""
    row, column = np.mgrid[:256, :256]
    image = np.stack([column, row, np.zeros_like(row)], axis=2).astype(np.uint8)
    return write_images(tmp_path_factory.mktemp("gradient") / "train.beton", [image] * 120, "raw")


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_training_crops_have_torchvisions_distribution_in_what_each_backend_delivers(gradient, backend):
    """Area, shape and place, read off the pixels, the device's own crops of `resident` included."""
    size, epochs = 48, range(10)
    arguments = {"backend": backend, "batch_size": 40, "device": "cpu", "train": True, "num_workers": 1}
    loader = make_loader(gradient, "train", crop=CropSpec("random_resized", size), seed=1, **arguments)
    statistics = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    cut = build_augment(["random_resized_crop"], image_size=size, seed=1, device="cpu", **statistics)
    found = []
    for batch in (batch for epoch in epochs for batch in loader.epoch(epoch)):
        images = batch.images if loader.crops else (255 * cut(batch.images)).round()
        found.append(boxes_seen(images.permute(0, 2, 3, 1).double().numpy()))
    loader.close()
    ours = np.concatenate(found)
    assert len(ours) == 1200
    whole = torch.empty(3, 256, 256)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(whole, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)])
    rng = np.random.default_rng(0)
    theirs = theirs + rng.uniform(-0.5, 0.5, theirs.shape)  # whole numbers against measured ones
    features = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "place from the top": lambda box: box[:, 0] / (256 - box[:, 2]).clip(1),
        "place from the left": lambda box: box[:, 1] / (256 - box[:, 3]).clip(1),
    }
    for name, feature in features.items():
        assert ks_2samp(feature(ours), feature(theirs)).pvalue > 1e-3, name


# DALI resizes with Pillow's "bilinear", a triangular filter, and the other backends with OpenCV's area interpolation.
# That is in training; for evaluation all resize alike. In levels of 255: against Pillow on the same rectangle away from
# its border and at it, where DALI repeats the last pixel and Pillow does without; and against the other backends, on
# average over all images and over the worst one.
PILLOW_INSIDE, PILLOW_BORDER = 1, 32
OTHERS_MEAN, OTHERS_WORST_IMAGE = 2.0, 6.0


def pillow_crops(images: list[np.ndarray], boxes: np.ndarray, size: int) -> np.ndarray:
    """Each rectangle (top, left, height, width) cut out and resized with Pillow's bilinear filter."""
    crops = []
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        cut = Image.fromarray(image[top : top + height, left : left + width])
        crops.append(np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR)))
    return np.stack(crops)


def check_against_pillow(got: np.ndarray, expected: np.ndarray) -> None:
    error = np.abs(got.astype(np.int64) - expected)
    assert error[:, 1:-1, 1:-1].max() <= PILLOW_INSIDE
    assert error.max() <= PILLOW_BORDER


def check_against_other_backends(dataset: SmallDataset, crop: CropSpec, *, train: bool) -> None:
    got, expected = (pixels(dataset, backend, crop, train=train, epoch=1) for backend in ("dali", "torch"))
    error = np.abs(got.astype(np.int64) - expected).mean(axis=(1, 2, 3))
    assert error.mean() <= OTHERS_MEAN
    assert error.max() <= OTHERS_WORST_IMAGE  # an image that was cut or ordered differently would be far off


def planned(dataset: SmallDataset, crop: CropSpec, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images a training epoch visits, and their rectangles."""
    shards = TarShards(dataset.shards("train"))
    plan = EpochPlan(shards.labels, shards.heights, shards.widths, crop, 8, train=True)
    return plan.index(epoch), plan.boxes(epoch)[:]


@needs_dali
@pytest.mark.parametrize("size", [SIZE, 96])
def test_dalis_training_crops_equal_pillows(raw_mixed, size):
    crop = CropSpec("random_resized", size)
    index, boxes = planned(raw_mixed, crop, epoch=1)
    expected = pillow_crops([raw_mixed.images[i] for i in index], boxes, size)
    check_against_pillow(pixels(raw_mixed, "dali", crop, train=True, epoch=1), expected)


@pytest.mark.parametrize("size", [SIZE, 70, 150])
def test_resident_random_crops_of_many_sizes_equal_the_other_backends(raw_mixed, size):
    """Rectangles that shrink, that grow, and that do one in one direction and one in the other."""
    crop = CropSpec("random_resized", size)
    sides = planned(raw_mixed, crop, epoch=2)[1][:, 2:] >= size
    assert size == 150 or len({tuple(row) for row in sides.tolist()}) >= 3
    got, expected = (pixels(raw_mixed, backend, crop, train=True, epoch=2) for backend in ("resident", "torch"))
    error = np.abs(got.astype(np.int64) - expected)
    assert error.max() <= 1
    assert error.mean() < 0.25


@needs_dali
@pytest.mark.parametrize("dataset", ["raw_mixed", "jpg_mixed"])
def test_dalis_crops_stay_near_the_other_backends(dataset, request):
    dataset = request.getfixturevalue(dataset)
    check_against_other_backends(dataset, CropSpec("random_resized", SIZE), train=True)


@needs_dali
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_dali_decodes_to_the_very_pixels_of_the_other_backends(tmp_path, mode):
    dataset = write_small(tmp_path / "train.beton", [(45, 61)] * 9, mode)
    reference = pixels(dataset, "torch", CropSpec("none"))
    np.testing.assert_array_equal(pixels(dataset, "dali", CropSpec("none")), reference)


@needs_dali
def test_dali_cuts_real_jpegs_exactly_and_resizes_them_as_pillow_does(real_data, tmp_path):
    """The bytes that were photographed, grayscale ones and odd sizes included; only rectangles of each are decoded."""
    folder = real_data("imagenet_samples")
    paths = sorted(path.name for path in folder.iterdir())
    split = FileSplit(folder, paths, np.zeros(len(paths), dtype=np.int64), "photographs")
    assert write_split(tmp_path, "train", split, FfcvOptions(num_workers=1), ("dali",)) == []
    dataset = SmallDataset(tmp_path / "train.beton", [], split.labels, formats=("dali",))
    stored = TarShards(dataset.shards("train"))
    assert all(stored.encoded(i).tobytes() == split.encoded(i) for i in range(len(split)))
    decoded = [stored.image(i) for i in range(len(stored))]
    crop = CropSpec("random_resized", 160)
    index, boxes = planned(dataset, crop, epoch=0)
    expected = pillow_crops([decoded[i] for i in index], boxes, 160)
    check_against_pillow(pixels(dataset, "dali", crop, train=True), expected)
    check_against_other_backends(dataset, crop, train=True)
    center = CropSpec("center", 160)
    for backend in DALI_BACKENDS:
        np.testing.assert_array_equal(pixels(dataset, backend, center), pixels(dataset, "torch", center))
