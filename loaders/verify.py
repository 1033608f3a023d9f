"""Reading a converted data set back, every byte and every image, and saying what is wrong with it."""

from __future__ import annotations

import numpy as np

from loaders.beton import Beton
from loaders.dataset import SPLITS, ConvertedDataset, file_sha256
from loaders.image_check import CHUNK, map_chunks
from loaders.progress import progress_bar

SHOWN = 5  # damaged images named per split


def verify(dataset: ConvertedDataset, *, num_workers: int | None = None, progress: bool = True) -> list[str]:
    """What is wrong with a data set, one line each; empty when each checksum holds and each image decodes."""
    problems = []
    for name, expected in dataset.manifest["files"].items():
        if file_sha256(dataset.root / name) != expected["sha256"]:
            problems.append(f"{name}: its sha256 is not what the manifest says; it was changed or damaged")
    if problems:
        return problems  # what the files hold is not ours any more: nothing is gained from decoding it
    for split in SPLITS:
        problems += _verify_split(dataset, split, num_workers, progress)
    return problems


def _verify_split(dataset: ConvertedDataset, split: str, num_workers: int | None, progress: bool) -> list[str]:
    labels, described = dataset.labels(split), dataset.manifest["splits"][split]
    try:
        beton = Beton.open(dataset.beton(split))
    except ValueError as error:
        return [str(error)]
    problems = []
    if not np.array_equal(beton.labels, labels):
        problems.append(f"{split}: the labels in {beton.path.name} and labels.npz disagree")
    if np.bincount(labels, minlength=dataset.num_classes).tolist() != described["class_counts"]:
        problems.append(f"{split}: the labels and the manifest's class_counts disagree")
    sizes = np.stack([beton.heights, beton.widths], axis=1)
    if [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()] != [
        described["image_size"]["min"],
        described["image_size"]["max"],
    ]:
        problems.append(f"{split}: the image sizes in {beton.path.name} and the manifest disagree")
    damaged: list[str] = []
    chunks = [range(start, min(start + CHUNK, len(beton))) for start in range(0, len(beton), CHUNK)]
    with progress_bar(f"verify {split}", len(beton), progress) as advance:
        for chunk, errors in map_chunks(_decode, beton, chunks, num_workers=num_workers):
            damaged += errors
            advance(len(chunk))
    more = [f"{split}: … and {len(damaged) - SHOWN} more damaged images"] if len(damaged) > SHOWN else []
    return problems + sorted(damaged)[:SHOWN] + more


def _decode(beton: Beton, chunk: range) -> list[str]:
    errors = []
    for i in chunk:
        try:
            image = beton.image(i)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert image.shape == (beton.heights[i], beton.widths[i], 3), image.shape
    return errors
