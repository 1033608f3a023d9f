"""What every loader backend offers to the trainer, and what it reads from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastlt.state import Batch
from loaders.order.plan import EpochPlan


class StoredSplit(Protocol):
    """One split on disk, read image by image; picklable, so that worker processes can open their own.

    path: what to call it in messages.
    labels, heights, widths: int64 (N,).
    """

    path: Path
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray:
        """Image `i` as RGB uint8 (H, W, 3), to be read only; ValueError naming it when it is damaged."""
        ...


class EncodedSplit(StoredSplit, Protocol):
    """A StoredSplit whose images are JPEG or PNG files.

    in_memory: whether `encoded` gives views of mapped files or of memory; otherwise it reads a file.
    """

    in_memory: bool

    def encoded(self, i: int) -> np.ndarray:
        """The file of image `i`, uint8 (n,), to be read only."""
        ...


class StoredDataset(Protocol):
    """The splits of a data set on disk: a converted one, or a source that is read as it is."""

    @property
    def root(self) -> Path:
        """Where it is, for messages."""
        ...

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that its images are there in, of `loaders.stored.FORMATS` and SOURCE_FILES."""
        ...

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 (N,)."""
        ...

    def stored(self, split: str, kind: str, /) -> StoredSplit:
        """The images of a split in the format `kind`; ValueError, with the remedy, when they are not there."""
        ...


class BatchLoader(Protocol):
    """Batches of one split on one device, in an order that depends on (seed, epoch) alone.

    backend: which one this is.
    reason: one line, why it was chosen.
    num_samples: images this process sees in one epoch.
    batch_size: images a batch; only the last batch of an evaluation epoch may be shorter.
    crops: True when batches are already cropped as the CropSpec says; False when they are whole stored images and the
        random-resized crop is left to the device (resident).
    """

    backend: str
    reason: str
    num_samples: int
    batch_size: int
    crops: bool

    def __len__(self) -> int:
        """Batches this process sees in one epoch."""
        ...

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `first_batch` on, exactly those an uninterrupted epoch would have had.

        A yielded batch stays valid. Starting an epoch ends the one before it.
        """
        ...

    def close(self) -> None:
        """Ends worker threads and processes; afterwards the loader yields nothing more. May be called twice."""
        ...


class LoaderClass(Protocol):
    """The class of a backend as the factory uses it: it makes BatchLoaders."""

    backend: str

    def __call__(
        self,
        stored: StoredSplit,
        plan: EpochPlan,
        device: torch.device | str,
        num_workers: int | None = None,
        **options: object,
    ) -> BatchLoader:
        """The loader of a split; it reads `stored`, which is in one of the formats of its row in the table."""
        ...

    def check(self, stored: StoredSplit, plan: EpochPlan, device: torch.device, processes: int) -> None:
        """ValueError when so many processes of this machine could not make the loader; none has filled memory yet."""
        ...
