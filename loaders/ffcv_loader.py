"""Reading through FFCV's Loader, with our order and our crops: decoding by numba-compiled threads in this process."""

from __future__ import annotations

import contextlib
import functools
import queue
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from loaders.beton import JPEG, Beton
from loaders.host_loader import STALL_S, HostLoader, default_workers
from loaders.native import keep_torch_threads
from loaders.plan import EpochPlan

with keep_torch_threads():
    import numba
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler

if TYPE_CHECKING:
    from ffcv.pipeline.state import State

BATCHES_AHEAD = 3
STOP_S = 30.0  # longer than any batch takes to decode
ROW = np.dtype(
    [
        ("mode", "<u1"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("data_ptr", "<u8"),
        ("top", "<i8"),
        ("left", "<i8"),
        ("crop_height", "<i8"),
        ("crop_width", "<i8"),
    ]
)


@functools.cache
def _compiled_kernels() -> tuple[Callable, Callable]:
    """JPEG decoding and resizing for compiled code, compiled once a process instead of once a loader."""
    return Compiler.compile(imdecode), Compiler.compile(resize_crop)


class BoxCropDecoder(SimpleRGBImageDecoder):
    """FFCV decoder that cuts a given rectangle out of each image and resizes it to (H, W).

    FFCV's own decoders draw the rectangle inside the compiled threads, from generators no seed reaches. Here it stands
    in the sample's metadata, drawn beforehand from (seed, epoch), so crops are reproducible and equal the other
    backends'.
    Returns (images uint8 (N, H, W, 3), failed uint8 (N, 1): 1 where the JPEG is damaged).
    """

    def __init__(self, shape: tuple[int, int], largest: int) -> None:
        super().__init__()
        self.shape, self.largest = shape, largest

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        pixels = np.dtype(np.uint8)
        shape = (*self.shape, 3)
        memory = AllocationQuery(shape, pixels), AllocationQuery((self.largest,), pixels), AllocationQuery((1,), pixels)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=pixels), memory

    def generate_code(self) -> Callable:
        read = self.memory_read
        decode_c, resize_c = _compiled_kernels()
        batch_range = Compiler.get_iterator()
        jpeg = JPEG

        def decode(rows, memory, metadata, storage):
            images, scratch, failed = memory
            for i in batch_range(len(rows)):
                row = metadata[rows[i]]
                height, width = np.int64(row["height"]), np.int64(row["width"])
                data = read(row["data_ptr"], storage)
                failed[i, 0] = 0
                if row["mode"] == jpeg:
                    image = scratch[i][: 3 * height * width].reshape(height, width, 3)
                    if decode_c(data, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        failed[i, 0] = 1
                else:
                    image = data.reshape(height, width, 3)
                bottom, right = row["top"] + row["crop_height"], row["left"] + row["crop_width"]
                resize_c(image, row["top"], bottom, row["left"], right, images[i])
            return images[: len(rows)], failed[: len(rows)]

        decode.is_parallel = True
        return decode


class _Epoch(EpochIterator):
    """FFCV's producer thread for one epoch, with an end.

    FFCV's own loop dies silently on an exception and leaves its reader blocked, sets torch's thread count from the
    thread, and hands out buffers it writes to again. Here an exception reaches the reader, only numba's count is set,
    and each batch is copied while this thread still owns the buffer.
    """

    def __init__(self, loader: Loader, metadata: np.ndarray, pinned: bool) -> None:
        self.rows, self.pinned = metadata, pinned
        self.ready: queue.Queue = queue.Queue(BATCHES_AHEAD)
        super().__init__(loader, np.arange(len(metadata)))  # starts the thread

    def run(self) -> None:
        numba.set_num_threads(self.loader.num_workers)
        self.metadata = {"f0": self.rows}  # FFCV's name of the first field's records
        try:
            for number, rows in enumerate(self.iter_ixes):
                if self.terminate_event.is_set():
                    return
                ((images, failed),) = self.run_pipeline(number, rows, 0, None)
                self._offer((rows[failed[:, 0] != 0], self._copied(images)))
            self._offer(None)
        except BaseException as error:  # whatever it is, the reader must hear of it
            self._offer(error)

    def _copied(self, images: np.ndarray) -> Tensor:
        return torch.empty(images.shape, dtype=torch.uint8, pin_memory=self.pinned).copy_(torch.from_numpy(images))

    def _offer(self, item: object) -> None:
        while not self.terminate_event.is_set():
            with contextlib.suppress(queue.Full):
                return self.ready.put(item, timeout=0.1)

    def stop(self) -> None:
        """Ends the thread after the batch it is decoding; a stuck one is left behind (it is a daemon)."""
        self.terminate_event.set()
        self.join(STOP_S)


class FfcvLoader(HostLoader):
    """BatchLoader over ffcv.loader.Loader, data read through the operating system's page cache.

    num_workers: decoding threads; None takes the cores of this job over its processes, within numba's maximum.
    The first batch of a process waits some seconds for numba to compile the decoder.
    A damaged image, an exception in the decoder and a decoder silent for ten minutes raise RuntimeError naming the
    file.
    """

    backend = "ffcv"

    def __init__(
        self,
        beton: Beton,
        plan: EpochPlan,
        *,
        device: torch.device | str,
        num_workers: int | None = None,
        reason: str = "asked for",
    ) -> None:
        super().__init__(beton, plan, device=device, reason=reason)
        workers = _numba_workers(num_workers, plan.world_size)
        decoder = BoxCropDecoder(plan.output_shape, 3 * int((beton.heights * beton.widths).max()))
        with keep_torch_threads():
            self._loader: Loader | None = Loader(
                str(beton.path),
                batch_size=plan.batch_size,
                num_workers=workers,
                os_cache=True,
                batches_ahead=1,  # sizes FFCV's own buffers, of which one is used; BATCHES_AHEAD bounds our queue
                pipelines={"image": [decoder], "label": None},
            )
        self._stored = self._loader.reader.metadata["f0"]

    def _read(self, index: np.ndarray, boxes: np.ndarray) -> Generator[tuple[Tensor, Tensor], None, None]:
        if not len(index):
            return
        epoch = _Epoch(self._loader, self._metadata(index, boxes), pinned=self.device.type == "cuda")
        try:
            places = torch.from_numpy(index).split(self.batch_size)
            for batch in places:
                damaged, images = self._next(epoch)
                if len(damaged):
                    raise RuntimeError(
                        f"{self.stored.path}, image {index[damaged[0]]}: damaged JPEG data; convert the data set again"
                    )
                yield images, batch
        finally:
            epoch.stop()

    def _metadata(self, index: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """One record a sample of the epoch, in the epoch's order: FFCV is then asked for records 0, 1, 2, ..."""
        metadata = np.empty(len(index), dtype=ROW)
        for name in self._stored.dtype.names:
            metadata[name] = self._stored[name][index]
        metadata["top"], metadata["left"], metadata["crop_height"], metadata["crop_width"] = boxes.T
        return metadata

    def _next(self, epoch: _Epoch) -> tuple[np.ndarray, Tensor]:
        try:
            item = epoch.ready.get(timeout=STALL_S)
        except queue.Empty:
            raise RuntimeError(
                f"{self.stored.path}: no batch for {STALL_S:.0f} s; is the disk reachable? "
                "The 'torch' backend reads it without FFCV"
            ) from None
        if isinstance(item, BaseException):
            raise RuntimeError(
                f"{self.stored.path}: FFCV's decoder stopped with {type(item).__name__}: {item}; "
                "the 'torch' backend reads the same file without FFCV's threads"
            ) from item
        assert item is not None, "the decoder ended before the epoch"
        return item

    def close(self) -> None:
        """Ends the running epoch with its threads."""
        super().close()
        self._loader = None


def _numba_workers(num_workers: int | None, world_size: int) -> int:
    """A thread count numba accepts; ValueError for one it does not, or when two loaders could not decode at once."""
    most = numba.config.NUMBA_NUM_THREADS
    workers = min(default_workers(world_size), most) if num_workers is None else num_workers
    if not 1 <= workers <= most:
        raise ValueError(
            f"num_workers {num_workers} for the 'ffcv' backend: 1 to {most} on this machine (numba's maximum; "
            "NUMBA_NUM_THREADS in the environment changes it)"
        )
    if workers > 1 and numba.threading_layer() == "workqueue":
        raise ValueError(
            "numba has only its 'workqueue' threads here, which abort the process when two loaders decode at once: "
            "install tbb or libgomp1, set num_workers to 1, or use the 'torch' backend"
        )
    return workers
