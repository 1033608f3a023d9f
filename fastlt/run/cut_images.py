"""Single images as evaluation cuts them, without a loader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlt.recipe import DataRecipe
from fastlt.run.dataset import existing_dataset
from loaders.order.crop import CropSpec
from loaders.protocol import StoredDataset
from loaders.sources.decode import decode_image
from loaders.stored import as_stored


def validation_images(data: DataRecipe, count: int, dataset: StoredDataset | None = None) -> Tensor:
    """So many images of the validation split, evenly spaced: uint8 (n, 3, S, S), n <= count.

    dataset: where it is open already. ValueError where it is not there any more, or is damaged.
    """
    dataset = existing_dataset(data) if dataset is None else dataset
    split = dataset.stored("meta", dataset.formats[0])
    chosen = np.unique(np.linspace(0, len(split) - 1, count).round().astype(int))
    return _stacked([cut(split.image(int(i)), data) for i in chosen])


def images_of_files(paths: Sequence[Path], data: DataRecipe) -> Tensor:
    """Images of files: uint8 (n, 3, S, S). ValueError that names a file which is no whole image."""
    images = []
    for path in paths:
        try:
            images.append(cut(decode_image(path), data))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return _stacked(images)


def cut(image: np.ndarray, data: DataRecipe) -> np.ndarray:
    """The part of an image that evaluation looks at, resized: uint8 (H, W, 3) to (S, S, 3)."""
    out = np.empty((data.image_size, data.image_size, 3), dtype=np.uint8)
    as_stored.cut(image, CropSpec(data.eval_crop, data.image_size, ratio=data.eval_ratio), out)
    return out


def _stacked(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
