"""The fastest backend for a split that fits: all its pixels as one uint8 tensor on the device."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastlt.state import Batch, upload
from loaders.order.crop import CropSpec, common_shape, crop_boxes
from loaders.order.plan import EpochPlan
from loaders.protocol import StoredSplit
from loaders.readers.base_loader import BaseLoader
from loaders.readers.free_memory import free_share
from loaders.readers.ragged_pixels import FILL_BYTES, RaggedPixels, most_taps, shrinking
from loaders.sources.messages import readable_bytes
from loaders.stored.damage import NoRoomError
from loaders.stored.ffcv_kernels import resize_crop


class ResidentLoader(BaseLoader):
    """BatchLoader that holds the split on the device; a batch is one index_select, and nothing waits for the host.

    "none" and "center" crops are applied once, while filling: pixels equal the other backends'. For "random_resized"
    the whole stored images are kept. Where all have one size, `crops` is False and the chain of augmentations crops
    them anew each epoch; where they differ, this class does, by the plan's rectangles: the other backends' pixels, to
    one level of rounding. ValueError when the device has no memory for the pixels.
    """

    backend = "resident"

    def __init__(
        self, stored: StoredSplit, plan: EpochPlan, device: torch.device | str, num_workers: int | None = None
    ) -> None:
        super().__init__(plan, device, None if num_workers is None else max(1, num_workers))
        check_pixels(stored, plan, self.device)
        ragged = is_ragged(plan.crop, plan.heights, plan.widths)
        self.crops = ragged or plan.crop.kind != "random_resized"
        # One of the two, until the loader is closed. Of an evaluation in an order of its own, its images alone.
        self._ragged = RaggedPixels(stored, self.device, self.workers) if ragged else None
        self._pixels = None if ragged else _fill(stored, plan.crop, self.device, self.workers, _kept(plan))

    @classmethod
    def check(cls, stored: StoredSplit, plan: EpochPlan, device: torch.device, processes: int) -> None:
        """See BaseLoader; every process on a CPU holds the pixels."""
        check_pixels(stored, plan, device, processes)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader; the order is moved to the device once, and nothing waits for that."""
        index = upload(torch.from_numpy(self.plan.index(epoch, first_batch)), self.device)
        if self._ragged is not None:
            return self._cut(self._ragged, index, self.plan.boxes(epoch, first_batch)[:])
        assert self._pixels is not None, "the loader is closed"
        rows = index if self.plan.order is None else torch.arange(len(self._pixels), device=self.device)[-len(index) :]
        return self._batches(self._pixels, rows, index)

    def close(self) -> None:
        """Frees the pixels."""
        self._pixels = self._ragged = None

    def _batches(self, pixels: Tensor, rows: Tensor, index: Tensor) -> Iterator[Batch]:
        """The images in these rows of `pixels`, which are at these places of the split."""
        labels = self._labels
        # Flat, because on a CPU torch copies these whole: 0.02 instead of 0.8 ms for 128 images of 32x32.
        flat = pixels.view(len(pixels), -1)
        batches = zip(rows.split(self.batch_size), index.split(self.batch_size), strict=True) if len(index) else ()
        for of_batch, places in batches:
            images = flat.index_select(0, of_batch).view(-1, *pixels.shape[1:]).permute(0, 3, 1, 2)
            yield Batch(images=images, labels=labels.index_select(0, places), index=places)

    def _cut(self, pixels: RaggedPixels, index: Tensor, boxes: np.ndarray) -> Iterator[Batch]:
        labels, size, batch_size = self._labels, self.plan.crop.size, self.batch_size
        # Most crops are made larger in one direction at least, from four pixels each; a few are made smaller and need
        # nine or more. So each batch is cut in two groups, of which the host knows the sizes.
        shrinks, of_batch = shrinking(boxes, size), np.arange(len(boxes)) // batch_size
        rows = np.lexsort((shrinks, of_batch)) - of_batch * batch_size
        few = np.bincount(of_batch[~shrinks], minlength=-(-len(boxes) // batch_size)).tolist()
        taps = most_taps(boxes[shrinks], size)  # of the whole epoch
        parts = (
            upload(torch.from_numpy(rows), self.device),
            upload(torch.from_numpy(boxes.astype(np.int64)), self.device),
        )
        batches = (part.split(batch_size) for part in (index, *parts)) if len(index) else ((),) * 3
        for places, rows_of, boxes_of, larger in zip(*batches, few, strict=True):
            groups = [(rows_of[:larger], None), (rows_of[larger:], taps)]
            images = pixels.crops(places, boxes_of, groups, size).permute(0, 3, 1, 2)
            yield Batch(images=images, labels=labels.index_select(0, places), index=places)


def resident_bytes(crop: CropSpec, heights: np.ndarray, widths: np.ndarray) -> int:
    """Device memory that the pixels of the split take: cropped images, or whole ones when crops are random."""
    if crop.kind == "random_resized":
        return 3 * int((heights * widths).sum())
    height, width = crop.output_shape(heights, widths)
    return 3 * height * width * len(heights)


def kept_bytes(plan: EpochPlan) -> int:
    """`resident_bytes` of the images whose pixels a process keeps for a plan."""
    kept = _kept(plan)
    return resident_bytes(plan.crop, plan.heights[kept], plan.widths[kept])


def check_pixels(stored: StoredSplit, plan: EpochPlan, device: torch.device, processes: int = 1) -> None:
    """NoRoomError when the pixels do not fit into the memory free on `device`, for so many processes at once."""
    needed = kept_bytes(plan)
    free = free_share(device, processes)
    if needed > free:
        raise NoRoomError(
            f"{stored.path}: its pixels take {readable_bytes(needed)}, and {readable_bytes(free)} of memory are "
            f"free on {device}: choose data.loader 'auto', or another one that does not keep them there"
        )


def is_ragged(crop: CropSpec, heights: np.ndarray, widths: np.ndarray) -> bool:
    """Whether whole images of different sizes are kept."""
    return crop.kind == "random_resized" and common_shape(heights, widths) is None


def _kept(plan: EpochPlan) -> np.ndarray:
    """The positions whose pixels are kept, int64 (n,): all of the split, or what a plan with an order visits."""
    return np.arange(len(plan.labels)) if plan.order is None else plan.index(0)


def _fill(stored: StoredSplit, crop: CropSpec, device: torch.device, workers: int, index: np.ndarray) -> Tensor:
    """The images at these positions on `device`, uint8 (n, H, W, 3), read in this order by `workers` threads."""
    kept = CropSpec("none") if crop.kind == "random_resized" else crop
    shape = kept.output_shape(stored.heights, stored.widths)
    boxes = crop_boxes(kept, stored.heights, stored.widths)
    pixels = torch.empty((len(index), *shape, 3), dtype=torch.uint8, device=device)
    chunk = max(1, FILL_BYTES // (3 * shape[0] * shape[1]))

    def read(start: int, out: np.ndarray) -> None:
        for i, image in zip(map(int, index[start : start + len(out)]), out, strict=True):
            resize_crop(stored.image(i), boxes[i], image)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(index), chunk):
            host = np.empty((min(chunk, len(index) - start), *shape, 3), dtype=np.uint8)
            share = -(-len(host) // workers)
            list(pool.map(lambda a, s=start, h=host, n=share: read(s + a, h[a : a + n]), range(0, len(host), share)))
            pixels[start : start + len(host)].copy_(torch.from_numpy(host))
    return pixels
