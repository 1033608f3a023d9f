"""Reading a converted data set back, every byte and every image, and saying what is wrong with it."""

from __future__ import annotations

import numpy as np

from loaders.protocol import StoredSplit
from loaders.sources.split import SPLITS
from loaders.stored.atomic_folder import MANIFEST
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_kernels import kernels
from loaders.stored.forked_workers import chunks_of, image_done, map_chunks
from loaders.stored.manifest import SEAL, file_checksums, manifest_sha256
from loaders.stored.progress import progress_bar
from loaders.stored.tar_shards import TarShards

SHOWN = 5  # damaged images named per split


def verify(dataset: ConvertedDataset, *, num_workers: int | None = None, progress: bool = True) -> list[str]:
    """What is wrong with a data set, one line each; empty when each checksum holds and each image decodes."""
    problems = []
    written = dataset.manifest.get(SEAL)  # data sets that were made before there was one have none
    if written is not None and written != manifest_sha256(dataset.manifest):
        problems.append(f"{MANIFEST}: its content is not what was written; it was edited or damaged")
    files = dataset.manifest["files"]
    paths = [dataset.root / name for name in files]
    with progress_bar("checksums", sum(path.stat().st_size for path in paths), progress, unit="B") as advance:
        checksums = file_checksums(paths, advance)
    for (name, expected), checksum in zip(files.items(), checksums, strict=True):
        if checksum != expected["sha256"]:
            problems.append(f"{name}: its sha256 is not what the manifest says; it was changed or damaged")
    if problems:
        return problems  # what the files hold is not ours any more: nothing is gained from decoding it
    for split in SPLITS:
        for kind in dataset.formats:
            problems += _verify_split(dataset, split, kind, num_workers, progress)
    return problems


def _verify_split(
    dataset: ConvertedDataset, split: str, kind: str, num_workers: int | None, progress: bool
) -> list[str]:
    try:
        labels = dataset.labels(split)
        stored = dataset.stored(split, kind)
    except ValueError as error:
        return [str(error)]
    problems = []
    if not np.array_equal(stored.labels, labels):
        problems.append(f"{split}: the labels in {stored.path.name} and labels.npz disagree")
    if isinstance(stored, TarShards):
        for shard in range(len(stored.tars)):
            problems += stored.problems(shard)
    damaged: list[str] = []
    kernels()  # imported here, and not in each process
    with progress_bar(f"verify {split}" + (" shards" if kind == "dali" else ""), len(stored), progress) as advance:
        for _, errors in map_chunks(_decode, stored, chunks_of(len(stored)), num_workers=num_workers, advance=advance):
            damaged += errors
    more = [f"{split}: … and {len(damaged) - SHOWN} more damaged images"] if len(damaged) > SHOWN else []
    return problems + sorted(damaged)[:SHOWN] + more


def _decode(stored: StoredSplit, chunk: range) -> list[str]:
    errors = []
    for i in chunk:
        try:
            image = stored.image(i)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert image.shape == (stored.heights[i], stored.widths[i], 3), image.shape
        image_done()
    return errors
