"""All compressed images of a split in memory, decoded batch by batch: for what is too large as pixels.

They lie in the host's memory and not in the GPU's, because DALI's decoders take their input there: headers are parsed
on the host, also where the pixels are then made on the GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from loaders.order.plan import EpochPlan
from loaders.protocol import StoredSplit
from loaders.readers.base_loader import default_workers
from loaders.readers.dali_augment import DaliAugment
from loaders.readers.dali_loader import DaliLoader
from loaders.readers.free_memory import free_share
from loaders.sources.messages import readable_bytes
from loaders.stored.beton import Beton
from loaders.stored.tar_shards import TarShards

FILL_IMAGES = 1024  # a thread copies at a time


class HeldFiles:
    """An EncodedSplit whose files are in memory; what they hold is still read by the split that they come from.

    files: uint8 (n,), all files one after the other.  ends: int64 (N,), where each one ends.
    """

    in_memory = True

    def __init__(self, stored: Beton | TarShards, workers: int) -> None:
        self.stored = stored
        self.path: Path = stored.path
        self.labels, self.heights, self.widths = stored.labels, stored.heights, stored.widths
        self.ends = np.cumsum(stored.sizes)
        self.files = np.empty(self.ends[-1], dtype=np.uint8)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self._copy, range(0, len(self), FILL_IMAGES)))

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, i: int) -> np.ndarray:
        """The file of image `i`, uint8 (n,)."""
        end = self.ends[i]
        return self.files[end - self.stored.sizes[i] : end]

    def image(self, i: int) -> np.ndarray:
        """See StoredSplit."""
        return self.stored.image(i)

    def _copy(self, first: int) -> None:
        for i in range(first, min(first + FILL_IMAGES, len(self))):
            self.encoded(i)[:] = self.stored.encoded(i)


def check_files(stored: Beton | TarShards, processes: int = 1) -> None:
    """ValueError for raw pixels, and when the files do not fit into the memory that is free, once for each process."""
    if isinstance(stored, Beton) and not stored.is_jpeg.all():
        raise ValueError(
            f"{stored.path} holds raw pixels, and the 'resident_jpeg' backend reads compressed images: convert the "
            "data set with --format both, or with --mode jpg, or choose another data.loader"
        )
    needed, free = int(stored.sizes.sum()), free_share(torch.device("cpu"), processes)
    if needed > free:
        raise ValueError(
            f"{stored.path}: its images take {readable_bytes(needed)} as files, and {readable_bytes(free)} of "
            "memory are free: choose data.loader 'dali', which reads them from the disk"
        )


class ResidentJpegLoader(DaliLoader):
    """BatchLoader that holds the files of the split in memory and decodes them as DaliLoader does, pixel for pixel.

    stored: shards, or a .beton file whose images are all JPEGs. Every process holds a copy. Raises as `check_files`.
    """

    backend = "resident_jpeg"

    def __init__(
        self,
        stored: Beton | TarShards,
        plan: EpochPlan,
        device: torch.device | str,
        num_workers: int | None = None,
        augment: DaliAugment | None = None,
    ) -> None:
        check_files(stored)
        workers = default_workers() if num_workers is None else max(1, num_workers)
        super().__init__(HeldFiles(stored, workers), plan, device, num_workers, augment)

    @classmethod
    def check(cls, stored: StoredSplit, plan: EpochPlan, device: torch.device, processes: int) -> None:
        """See BaseLoader; every process holds the files."""
        assert isinstance(stored, Beton | TarShards), stored
        check_files(stored, processes)
