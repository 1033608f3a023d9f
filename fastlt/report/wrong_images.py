"""The test images of rare classes that were most confidently taken for another class, with small pictures of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fastlt.recipe import DataRecipe
from fastlt.run.dataset import open_converted, open_data_source
from fastlt.run.predictions import Predictions
from fastlt.state import ClassCounts
from loaders.stored import FORMATS

SIDE = 112  # pixels of the longer side of a picture
PIXELATED = 32  # images up to this size are shown as they are and enlarged by the browser


@dataclass(frozen=True)
class WrongImage:
    """index: in the test split. true, taken_for: classes. probability: of `taken_for`, the mean over seeds.

    seeds: under how many of them the image was taken for that class.
    """

    index: int
    true: int
    taken_for: int
    probability: float
    seeds: int


def rare_classes(counts: ClassCounts) -> tuple[np.ndarray, str]:
    """Which classes are rare, bool (C,), and what to call them: the few-shot ones, or else the smallest quarter."""
    few = counts.shot_masks()["few"]
    if few.any():
        return few, "few-shot classes"
    smallest = np.zeros(counts.num_classes, dtype=bool)
    smallest[np.argsort(counts.counts, kind="stable")[: max(1, counts.num_classes // 4)]] = True
    return smallest, "quarter of classes with the fewest training images (none is few-shot)"


def most_confidently_wrong(
    predictions: Sequence[Predictions], rare: np.ndarray, at_most: int = 24, of_one_class: int = 3
) -> list[WrongImage]:
    """The images of rare classes with the highest mean probability of a wrong class, at most so many of one class.

    rare: bool (C,). A seed counts where the image was taken for that class; elsewhere its probability counts as 0.
    """
    labels = predictions[0].labels
    code_of, sums, seeds = len(rare), {}, {}
    for of_seed in predictions:
        for row in np.flatnonzero(rare[labels] & ~of_seed.right):
            code = int(row) * code_of + int(of_seed.predicted[row])
            sums[code] = sums.get(code, 0.0) + float(of_seed.confidence[row])
            seeds[code] = seeds.get(code, 0) + 1
    found: list[WrongImage] = []
    taken: dict[int, int] = {}
    shown: set[int] = set()
    for code in sorted(sums, key=lambda code: (-sums[code], code)):
        row, taken_for = divmod(code, code_of)
        true = int(labels[row])
        if row in shown or taken.get(true, 0) == of_one_class:
            continue
        shown.add(row)
        taken[true] = taken.get(true, 0) + 1
        index = int(predictions[0].index[row])
        found.append(WrongImage(index, true, taken_for, sums[code] / len(predictions), seeds[code]))
        if len(found) == at_most:
            break
    return found


def test_images(data: DataRecipe, labels: np.ndarray) -> Callable[[int], np.ndarray]:
    """What reads test image i as RGB uint8 (H, W, 3): of the converted data set, or else of the source's own files.

    labels: int64 (N,), of the test split when the run was tested. ValueError when neither is there any more, or it
    holds other images.
    """
    place = data.source
    try:
        dataset = open_converted(data)
    except ValueError as not_converted:
        try:
            split = open_data_source(replace(data, download=False)).splits["test"]
        except ValueError as error:
            raise ValueError(f"{not_converted}; nor can the source's own files be read: {error}") from None
        found, image = split.labels, split.image
    else:
        place = dataset.place
        kind = next(kind for kind in FORMATS if kind in dataset.formats)
        found, image = dataset.labels("test"), dataset.stored("test", kind).image
    if not np.array_equal(found, labels):
        raise ValueError(f"{place} holds other test images than the run was tested on")
    return image


def picture(image: np.ndarray) -> tuple[str, bool]:
    """A small copy of an RGB image, uint8 (H, W, 3), as a data URL, and whether a browser is to enlarge its pixels."""
    small = Image.fromarray(image)
    tiny = max(small.size) <= PIXELATED
    file = io.BytesIO()
    if tiny:
        small.save(file, "PNG")
    else:
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(file, "JPEG", quality=80)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", tiny
