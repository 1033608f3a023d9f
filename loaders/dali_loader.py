"""Decoding through a DALI pipeline, with our order and our crops: on the GPU where there is one, else on CPU threads.

DALI's own readers shuffle within a buffer and draw crops from a generator of theirs. Here it is fed: each image's
compressed bytes, straight from the mapped shards and in the plan's order, and its rectangle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

import numpy as np
import torch
from torch import Tensor

from fastlt.state import Batch
from loaders.host_loader import HostLoader, default_workers
from loaders.plan import EpochPlan
from loaders.tar_shards import TarShards

try:
    from nvidia import dali
    from nvidia.dali import fn, types
except ImportError as error:
    raise ValueError(
        f"the 'dali' backend needs NVIDIA DALI, which cannot be imported ({error}): install "
        "nvidia-dali-cuda130 (or nvidia-dali-cuda120), as `make setup` does, or choose another data.loader"
    ) from error

BATCHES_AHEAD = 2  # decoded while the consumer works
Fed = tuple[list[np.ndarray], np.ndarray, np.ndarray]


class DaliLoader(HostLoader):
    """BatchLoader over a DALI pipeline that decodes, cuts and resizes what it is handed.

    On a CPU JPEGs decode to the very pixels of the other backends; on a GPU nvJPEG's accurate DCT may differ by some
    levels. Cut-outs are resized with DALI's antialiased triangular filter, which is Pillow's and torchvision's
    "bilinear" (to one level, but for the outermost pixels), and not FFCV's area interpolation: on photographs cut to
    224 pixels the two differ by 1 level of 255 on average. Only what the rectangle needs of a JPEG is decoded.

    num_workers: DALI's CPU threads; None takes the cores of this job over its processes.
    A damaged image raises RuntimeError naming it, unless the damage lies beyond the rectangle.
    """

    backend = "dali"

    def __init__(
        self,
        shards: TarShards,
        plan: EpochPlan,
        *,
        device: torch.device | str,
        num_workers: int | None = None,
        reason: str = "asked for",
    ) -> None:
        super().__init__(shards, plan, device=device, reason=reason)
        self.shards = shards
        self._threads = default_workers(plan.world_size) if num_workers is None else num_workers
        if self._threads < 1:
            raise ValueError(f"num_workers {num_workers} for the 'dali' backend: give 1 or more threads")
        self._decoder: _Decoder | None = None

    def close(self) -> None:
        """Ends the running epoch and DALI's threads."""
        super().close()
        self._decoder = None

    def _batches(self, index: np.ndarray, boxes: np.ndarray) -> Generator[Batch, None, None]:
        """Unlike other host backends' batches these are decoded where they are needed: nothing is uploaded."""
        with contextlib.closing(self._decoded(index, boxes)) as images:
            yield from self._labelled(images, index)

    def _decoded(self, index: np.ndarray, boxes: np.ndarray) -> Generator[Tensor, None, None]:
        """Each batch's images uint8 (N, H, W, 3) on the device."""
        if not len(index):
            return
        if self._decoder is None:
            self._decoder = self._new_decoder()
        # DALI reads these where they are: they outlive `decoded`, which ends only when nothing is in flight.
        starts, sizes = np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:])
        done = 0
        with contextlib.closing(self._decoder.run(self._fed(index, starts, sizes))) as decoded:
            try:
                for images in decoded:
                    done += len(images)
                    yield images
            except RuntimeError as error:
                self._decoder = None  # DALI says that it is no longer valid
                raise self._failure(index[done:], error) from error
        assert done == len(index), (done, len(index))

    def _new_decoder(self) -> _Decoder:
        crop = self.plan.crop
        shape = None if crop.kind == "none" else self.plan.output_shape
        return _Decoder(shape, self.batch_size, self.device, self._threads)

    def _fed(self, index: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Iterator[Fed]:
        for first in range(0, len(index), self.batch_size):
            batch = slice(first, first + self.batch_size)
            yield [self.shards.encoded(i) for i in index[batch]], starts[batch], sizes[batch]

    def _failure(self, ahead: np.ndarray, error: RuntimeError) -> RuntimeError:
        """What to tell of DALI's error, which names no image: the first one of those in flight that is damaged."""
        suspects = ahead[: (1 + BATCHES_AHEAD) * self.batch_size]
        for i in suspects:
            try:
                self.shards.image(i)
            except ValueError as damage:
                return RuntimeError(str(damage))
        reason = [line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()]
        return RuntimeError(
            f"{self.shards.path}: DALI failed on one of the images {suspects[0]} to {suspects[-1]}, which other "
            f"decoders take ({reason[0] if reason else 'no reason given'}); the 'torch' backend reads them without DALI"
        )


class _Feed:
    """What a pipeline asks for its next input; apart from `_Decoder`, for a circle would keep pipelines alive."""

    def __init__(self) -> None:
        self.batches: Iterator[Fed] = iter(())

    def next(self) -> Fed:
        """The next batch; StopIteration is how DALI learns of the epoch's end."""
        return next(self.batches)


class _Decoder:
    """A DALI pipeline for batches of up to `batch_size` images.

    shape: (H, W) that rectangles are resized to; None leaves them as they are, which needs them of one size.
    """

    def __init__(self, shape: tuple[int, int] | None, batch_size: int, device: torch.device, threads: int) -> None:
        self.device = device
        self._feed = _Feed()
        gpu = device.type == "cuda"
        if gpu and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._pipeline = dali.Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=self.device.index if gpu else None,
            prefetch_queue_depth=BATCHES_AHEAD,
            exec_dynamic=True,  # outputs own their memory, so that a batch which is handed out stays valid
        )
        with self._pipeline:
            # Not copied: the bytes are pages of the mapped shards, and DALI's threads are the first to touch them.
            encoded, start, size = fn.external_source(source=self._feed.next, num_outputs=3, no_copy=True)
            images = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=size,
                axis_names="HW",
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,  # stored upright
                # The two that make libjpeg-turbo's pixels FFCV's.
                jpeg_fancy_upsampling=True,
                use_fast_idct=True,
            )
            if shape is not None:
                images = fn.resize(images, size=shape, interp_type=types.INTERP_LINEAR, antialias=True)
            self._pipeline.set_outputs(images)
        self._pipeline.build()

    def run(self, fed: Iterator[Fed]) -> Generator[Tensor, None, None]:
        """Images uint8 (N, H, W, 3) on the device for each of `fed`; RuntimeError when DALI fails, and for good then.

        On CUDA they are made on DALI's streams, and torch's current one waits for them.
        """
        self._feed.batches = fed
        self._pipeline.reset()
        try:
            while True:
                (images,) = self._run_once()
                yield torch.from_dlpack(images.as_tensor())
        except StopIteration:
            return
        except GeneratorExit:
            self._drain()
            raise

    def _drain(self) -> None:
        """Finish the batches in flight, so that the pipeline is ready for another epoch."""
        self._feed.batches = iter(())
        with contextlib.suppress(StopIteration):
            while True:
                self._run_once()

    def _run_once(self) -> tuple:
        if self.device.type != "cuda":
            return self._pipeline.run()
        with torch.cuda.device(self.device):
            return self._pipeline.run(torch.cuda.current_stream())
