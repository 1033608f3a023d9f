"""Small data sets for the loader tests: .beton files written by FFCV itself, so that no code under test takes part,
and shards of the same images.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from loaders.protocol import StoredSplit
from loaders.readers import BACKENDS
from loaders.stored.beton import Beton
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.ffcv_kernels import keep_torch_threads
from loaders.stored.piece_writer import write_split
from loaders.stored.tar_shards import TarShards

NUM_CLASSES = 5
SHARD_IMAGES = 20  # the tests' data sets have two or three shards
needs_dali = pytest.mark.skipif(
    not importlib.util.find_spec("nvidia") or not importlib.util.find_spec("nvidia.dali"),
    reason="NVIDIA DALI is not installed",
)
needs_ffcv = pytest.mark.skipif(not importlib.util.find_spec("ffcv"), reason="FFCV is not installed")
DALI_BACKENDS = [name for name, backend in BACKENDS.items() if backend.reads[0] == "dali"]
BETON_BACKENDS = [backend for backend in BACKENDS if backend not in DALI_BACKENDS]
EVERY_BACKEND = [*BETON_BACKENDS, *(pytest.param(backend, marks=needs_dali) for backend in DALI_BACKENDS)]


@dataclass(frozen=True)
class SmallDataset:
    """Answers what make_loader asks a converted data set, for one split; `images` are the pixels before storing."""

    path: Path
    images: list[np.ndarray]
    split_labels: np.ndarray
    formats: tuple[str, ...] = ("ffcv", "dali")

    @property
    def root(self) -> Path:
        return self.path

    def shards(self, split: str) -> Path:
        return self.path.parent / "dali" / f"{self.path.stem}.npz"

    def stored(self, split: str, kind: str) -> StoredSplit:
        return Beton(self.path) if kind == "ffcv" else TarShards(self.shards(split))

    def labels(self, split: str) -> np.ndarray:
        return self.split_labels


def smooth_images(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    """Images with large structures and a little noise, so that JPEG behaves as on photographs."""
    rng = np.random.default_rng(seed)
    images = []
    for height, width in shapes:
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int64)
        images.append(np.clip(image + rng.integers(-4, 5, image.shape), 0, 255).astype(np.uint8))
    return images


def mixed_shapes(count: int, seed: int = 3) -> list[tuple[int, int]]:
    """`count` pairs (H, W) between 40 and 120, wide, tall and square."""
    return [tuple(int(side) for side in pair) for pair in np.random.default_rng(seed).integers(40, 121, (count, 2))]


@dataclass(frozen=True)
class _Images:
    """A split of images in memory, of any sizes."""

    images: list[np.ndarray]
    labels: np.ndarray
    provenance: str = "made for a test"

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> np.ndarray:
        return self.images[i]

    def encoded(self, i: int) -> None:
        return None

    def name(self, i: int) -> str:
        return f"image {i}"

    def stamp(self, i: int) -> tuple[int, int]:
        return i, 0

    def subset(self, indices: np.ndarray) -> _Images:
        return _Images([self.images[i] for i in indices], self.labels[indices])


def write_small(path: Path, shapes: list[tuple[int, int]], mode: str, seed: int = 0) -> SmallDataset:
    """A data set of one image a shape, stored as `mode` ("raw" or "jpg")."""
    return write_images(path, smooth_images(shapes, seed), mode, seed)


def write_images(path: Path, images: list[np.ndarray], mode: str, seed: int = 0) -> SmallDataset:
    """A data set of these images under random labels, stored as `mode`."""
    with keep_torch_threads():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
    labels = np.random.default_rng(seed).integers(0, NUM_CLASSES, len(images))
    fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=90), "label": IntField()}
    samples = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(samples)
    options = FfcvOptions(mode, num_workers=1)
    write_split(path.parent, path.stem, _Images(images, labels), options, ("dali",), shard_images=SHARD_IMAGES)
    return SmallDataset(path, images, labels)
