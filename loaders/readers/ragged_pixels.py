"""Images of many sizes in one tensor on the device, and batches of equally large pieces cut out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from loaders.protocol import StoredSplit

FILL_BYTES = 64 << 20  # host memory used at a time while filling
Groups = Sequence[tuple[Tensor, tuple[int, int] | None]]  # rows int64 (K,), and their taps


class RaggedPixels:
    """The pixels of all images of a split, one image after the other: uint8 (pixels, 3) on the device."""

    def __init__(self, stored: StoredSplit, device: torch.device, workers: int) -> None:
        counts = stored.heights * stored.widths
        first = np.cumsum(counts) - counts
        self.pixels = torch.empty((int(counts.sum()), 3), dtype=torch.uint8, device=device)
        self._first = torch.from_numpy(first).to(device)
        self._widths = torch.from_numpy(stored.widths).to(device)
        with ThreadPoolExecutor(workers) as pool:
            for images in _chunks(3 * counts):
                ends = first[images[-1]] + counts[images[-1]]
                host = np.empty((ends - first[images[0]], 3), dtype=np.uint8)
                places = first[images] - first[images[0]]

                def read(i: int, place: int, host: np.ndarray = host) -> None:
                    host[place : place + counts[i]] = stored.image(i).reshape(-1, 3)

                list(pool.map(read, images.tolist(), places.tolist()))
                self.pixels[first[images[0]] : ends].copy_(torch.from_numpy(host))

    def crops(self, places: Tensor, boxes: Tensor, groups: Groups, size: int) -> Tensor:
        """Each image's rectangle, resized to (size, size): uint8 (N, size, size, 3).

        places: int64 (N,), which images.  boxes: int64 (N, 4) as (top, left, height, width), inside the images.
        groups: the rows of these that are `shrinking`, with `most_taps` of them, at least; and the others, with None.
        The same weights as the backends on the host have, see `resize_crop`, to one level of rounding.
        """
        out = torch.empty((len(places), size, size, 3), dtype=torch.uint8, device=boxes.device)
        for rows, taps in groups:
            if len(rows):
                cut = self._crops(places.index_select(0, rows), boxes.index_select(0, rows), taps, size)
                out.index_copy_(0, rows, cut)
        return out

    def _crops(self, places: Tensor, boxes: Tensor, taps: tuple[int, int] | None, size: int) -> Tensor:
        """`crops` of one group."""
        top, left, height, width = boxes.unbind(1)
        if taps is None:
            (rows, row_weights), (columns, column_weights) = _two_taps(height, size), _two_taps(width, size)
        else:
            (rows, row_weights), (columns, column_weights) = _taps(height, size, taps[0]), _taps(width, size, taps[1])
        starts = self._first.index_select(0, places).view(-1, 1, 1)
        starts = starts + (top.view(-1, 1, 1) + rows) * self._widths.index_select(0, places).view(-1, 1, 1)
        columns = left.view(-1, 1, 1) + columns
        out = torch.zeros((len(places), size, size, 3), dtype=torch.float32, device=boxes.device)
        for a in range(rows.shape[2]):
            for b in range(columns.shape[2]):
                at = starts[:, :, a].unsqueeze(2) + columns[:, :, b].unsqueeze(1)
                weight = row_weights[:, :, a].unsqueeze(2) * column_weights[:, :, b].unsqueeze(1)
                out.addcmul_(self.pixels.index_select(0, at.flatten()).view(out.shape), weight.unsqueeze(3))
        return out.round_().clamp_(0, 255).to(torch.uint8)


def shrinking(boxes: np.ndarray, size: int) -> np.ndarray:
    """bool (N,): boxes (N, 4) that are made smaller in both directions; only these need more than two taps in each."""
    return np.logical_and(boxes[:, 2] >= size, boxes[:, 3] >= size)


def most_taps(boxes: np.ndarray, size: int) -> tuple[int, int]:
    """How many source rows and columns an output pixel needs at most, for boxes (N, 4) that are `shrinking`."""
    height, width = boxes[:, 2:].max(axis=0).tolist() if len(boxes) else (size, size)
    return math.ceil(height / size) + 1, math.ceil(width / size) + 1


def _taps(length: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """Which source positions give to each of `size` outputs, int64 (N, size, taps), and how much, float32.

    Where an image shrinks in both directions: a source gives the share of the output that it covers. Source: the
    INTER_AREA mode of OpenCV's `resize`.
    """
    length, output, _, scale = _scales(length, size)
    low = output * scale
    place = low.floor() + torch.arange(taps, device=length.device)
    covered = (torch.minimum(low + scale, place + 1) - torch.maximum(low, place)).clamp_(min=0) / scale
    return torch.minimum(place, length - 1).long(), covered.float()


def _two_taps(length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`_taps` of other images, (N, size, 2): an output lies between two neighbours, see `enlarging`."""
    length, output, _, scale = _scales(length, size)
    at = torch.minimum(((output + 0.5) * scale - 0.5).clamp_(min=0), length - 1)
    first = at.floor()
    second = (at - first).float()
    place = torch.cat((first, torch.minimum(first + 1, length - 1)), dim=2)
    return place.long(), torch.cat((1 - second, second), dim=2)


def _scales(length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64: the lengths (N, 1, 1), the outputs (1, size, 1), outputs over lengths and the other way (N, 1, 1)."""
    length = length.double().view(-1, 1, 1)
    # Tensors are divided by tensors, because torch takes a number over a tensor times its reciprocal.
    inverse = torch.full_like(length, size) / length
    scale = torch.ones_like(length) / inverse
    return length, torch.arange(size, device=length.device, dtype=torch.float64).view(1, -1, 1), inverse, scale


def _chunks(sizes: np.ndarray) -> list[np.ndarray]:
    """Runs of consecutive images, each of about FILL_BYTES."""
    return np.split(np.arange(len(sizes)), np.flatnonzero(np.diff(np.cumsum(sizes) // FILL_BYTES)) + 1)
