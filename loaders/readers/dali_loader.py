"""Decoding through a DALI pipeline, with our order and our crops: on the GPU where there is one, else on CPU threads.

DALI's own readers shuffle within a buffer and draw crops from a generator of theirs. Here it is fed: each image's
compressed bytes, straight from the mapped shards and in the plan's order, and its rectangle.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fastlt.state import Batch
from loaders.order.plan import Boxes, EpochPlan
from loaders.protocol import EncodedSplit
from loaders.readers.dali_augment import DaliAugment
from loaders.readers.host_loader import HostLoader, upload_ahead
from loaders.stored.damage import DamageError, NoRoomError, ReaderError
from loaders.stored.ffcv_kernels import resize_crop
from loaders.stored.image_header import encoded_size

try:
    from nvidia import dali
    from nvidia.dali import fn, types
    from nvidia.dali.tensors import TensorCPU, TensorListCPU, TensorListGPU
except ImportError as error:
    raise ValueError(
        f"the 'dali' and 'resident_jpeg' backends need NVIDIA DALI, which cannot be imported ({error}): install "
        "nvidia-dali-cuda130 (or nvidia-dali-cuda120), as `make setup` does, or choose another data.loader"
    ) from error

BATCHES_AHEAD = 2  # in flight while the consumer waits for one; while it works, the other
# Images of a split whose tensors are kept, at 700 bytes each. To make them anew takes 13 microseconds an image, a tenth
# of decoding one of 32 pixels, and half a percent of a photograph: larger splits hold these.
KEPT_TENSORS = 1 << 17
AUGMENT_STREAM = 2  # keeps DALI's random numbers apart from other uses of (seed, epoch)
TINY = 16  # side of the image that stands in for those of batches that are passed over
Images = TensorListCPU | TensorListGPU
Fed = tuple[TensorListCPU | np.ndarray, ...]  # files; where they are cut: starts, sizes; what they become: sizes


class DaliLoader(HostLoader):
    """BatchLoader over a DALI pipeline that decodes, cuts and resizes what it is handed.

    On a CPU JPEGs decode to the very pixels of the other backends; on a GPU nvJPEG's accurate DCT may differ by some
    levels. In training, cut-outs are resized with DALI's antialiased triangular filter, which is Pillow's and
    torchvision's "bilinear" (to one level, but for the outermost pixels), and not FFCV's area interpolation: on
    photographs cut to 224 pixels the two differ by 1 level of 255 on average. For evaluation they are resized on the
    host, with the other backends' own kernel. Only what the rectangle needs of a JPEG is decoded.

    num_workers: DALI's CPU threads; None takes all cores that it may use.
    augment: DALI's automatic augmentation of training images after the crop. Its random numbers come from (seed,
        epoch), so an epoch that is resumed first passes over the batches before it, with tiny images in their place.
    A damaged image raises DamageError naming it, unless the damage lies beyond the rectangle.
    """

    backend = "dali"

    def __init__(
        self,
        stored: EncodedSplit,
        plan: EpochPlan,
        device: torch.device | str,
        num_workers: int | None = None,
        augment: DaliAugment | None = None,
    ) -> None:
        super().__init__(plan, device, num_workers)
        self.stored = stored
        self._encoded = _EncodedTensors(stored, self.workers)
        self._augment = augment if plan.train else None
        self._cuts = plan.crop.kind != "none"
        self._on_host = self._cuts and not plan.train
        self._decoder: _Decoder | None = None
        self._epoch = 0

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader."""
        self._epoch = epoch
        return super().epoch(epoch, first_batch)

    def close(self) -> None:
        """Ends the running epoch and DALI's threads."""
        super().close()
        self._decoder = None

    def _batches(self, index: np.ndarray, boxes: Boxes) -> Generator[Batch, None, None]:
        """Unlike other host backends' training batches these are decoded where they are needed: nothing is uploaded."""
        with contextlib.closing(self._decoded(index, boxes)) as decoded:
            if not self._on_host:
                yield from self._labelled((torch.from_dlpack(images.as_tensor()) for images in decoded), index)
                return
            with ThreadPoolExecutor(self.workers) as pool:
                resized = (self._resized(images, pool) for images in decoded)
                yield from self._labelled(upload_ahead(resized, self.device), index)

    def _decoded(self, index: np.ndarray, boxes: Boxes) -> Generator[Images, None, None]:
        """Each batch's images, DALI's list of uint8 (H, W, 3)."""
        if not len(index):
            return
        if self._augment is not None:
            self._decoder = None  # random numbers begin anew, so that they do not depend on the epochs before
        if self._decoder is None:
            self._decoder = self._new_decoder()
        # DALI reads these where they are: they outlive `decoded`, which ends only when nothing is in flight.
        starts, sizes = map(np.ascontiguousarray, np.split(boxes[:], 2, axis=1))
        done = 0
        with contextlib.closing(self._decoder.run(self._fed(index, starts, sizes))) as decoded:
            try:
                for _ in range(self._passed_over(index)):
                    next(decoded)
                for images in decoded:
                    done += len(images)
                    yield images
            except (ReaderError, NoRoomError):
                self._decoder = None
                raise  # of a file that did not come: the reason is known
            except RuntimeError as error:
                self._decoder = None  # DALI says that it is no longer valid
                raise self._failure(index[done:], error) from error
        assert done == len(index), (done, len(index))

    def _resized(self, images: Images, pool: ThreadPoolExecutor) -> Tensor:
        """Evaluation's cut-outs in host memory, resized as the other backends do: uint8 (N, h, w, 3)."""
        images = images.as_cpu()
        out = np.empty((len(images), *self.plan.output_shape, 3), dtype=np.uint8)

        def resize(i: int) -> None:
            cut = np.asarray(images[i])
            resize_crop(cut, (0, 0, *cut.shape[:2]), out[i])

        list(pool.map(resize, range(len(out))))
        return torch.from_numpy(out)

    def _new_decoder(self) -> _Decoder:
        shape = None if self._on_host or not self._cuts else self.plan.output_shape
        if self._augment is None:
            return _Decoder(self._cuts, shape, self.batch_size, self.device, self.workers)
        seeds = np.random.default_rng([self.plan.seed, self._epoch, AUGMENT_STREAM, self.plan.rank, self.plan.view])
        augment = functools.partial(
            self._augment.apply, shape=self.plan.output_shape, seed=int(seeds.integers(1 << 31))
        )
        return _Decoder(self._cuts, shape, self.batch_size, self.device, self.workers, augment)

    def _fed(self, index: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> Iterator[Fed]:
        whole = np.full((self.batch_size, 2), TINY, dtype=np.int32)
        for _ in range(self._passed_over(index)):
            tiny = _listed([_tiny_image()] * self.batch_size)
            boxes = np.zeros_like(whole), whole, np.ones(whole.shape, np.float32)
            yield (tiny, *boxes) if self._cuts else (tiny,)
        outputs = np.tile(np.array(self.plan.output_shape, dtype=np.float32), (self.batch_size, 1))
        for first in range(0, len(index), self.batch_size):
            batch = slice(first, first + self.batch_size)
            files = self._encoded.of(index[batch])
            cut = (starts[batch], sizes[batch]) if self._cuts else ()
            yield (files, *cut, outputs[: len(files)]) if self._cuts and not self._on_host else (files, *cut)

    def _passed_over(self, index: np.ndarray) -> int:
        """Batches before those of `index` whose random numbers DALI has to draw all the same."""
        return 0 if self._augment is None else (self.num_samples - len(index)) // self.batch_size

    def _failure(self, ahead: np.ndarray, error: RuntimeError) -> RuntimeError:
        """What to tell of DALI's error, which names no image: the first one of those in flight that is damaged."""
        suspects = ahead[: (1 + BATCHES_AHEAD) * self.batch_size]
        for i in suspects:
            try:
                self.stored.image(i)
            except DamageError as damage:
                return damage
        reason = [line.strip() for line in str(error).split("encountered:")[-1].splitlines() if line.strip()]
        return ReaderError(
            f"{self.stored.path}: DALI failed on one of the images {suspects[0]} to {suspects[-1]}, which other "
            f"decoders take ({reason[0] if reason else 'no reason given'}); the 'torch' backend reads them without DALI"
        )


class _EncodedTensors:
    """The images' compressed bytes as DALI's tensors.

    Of files that are mapped, or in memory, they are made once and kept, of up to KEPT_TENSORS images. The bytes are not
    copied; they are pages of the files, and DALI's threads are the first to touch them. Other files are read when they
    are asked for, several at a time.
    """

    def __init__(self, stored: EncodedSplit, threads: int) -> None:
        self.stored, self._threads = stored, threads
        self._tensors: list[TensorCPU | None] = [None] * len(stored) if len(stored) <= KEPT_TENSORS else []

    def of(self, index: np.ndarray) -> TensorListCPU:
        """Those of the images at `index`."""
        return _listed(self._each(index))

    def _each(self, index: np.ndarray) -> list[TensorCPU]:
        tensors, places = self._tensors, index.tolist()
        if not self.stored.in_memory:
            with ThreadPoolExecutor(self._threads) as pool:
                return [TensorCPU(data) for data in pool.map(self._checked, places)]
        if not tensors:
            return [TensorCPU(self._checked(i)) for i in places]
        found = [tensors[i] for i in places]
        if None in found:
            for k, i in enumerate(places):
                if tensors[i] is None:
                    tensors[i] = TensorCPU(self._checked(i))
                found[k] = tensors[i]
        return found

    def _checked(self, i: int) -> np.ndarray:
        """The bytes of image `i`; DamageError when it is not of the size for which its rectangle was drawn."""
        stored = self.stored
        data, expected = stored.encoded(i), (stored.heights[i], stored.widths[i])
        found = encoded_size(data.data)
        if found != expected:
            raise DamageError(
                f"{stored.path}, image {i}: damaged (its header says {found[0]}x{found[1]}, it should be "
                f"{expected[0]}x{expected[1]})"
            )
        return data


def _listed(tensors: list[TensorCPU]) -> TensorListCPU:
    """DALI's own list, which its Python does not look into once more."""
    return TensorListCPU(tensors, contiguous=False)  # pyright: ignore[reportCallIssue]  DALI's stub lacks `contiguous`


@functools.cache
def _tiny_image() -> TensorCPU:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (TINY, TINY)).save(file, "JPEG")
    return TensorCPU(np.frombuffer(file.getvalue(), dtype=np.uint8))


class _Feed:
    """The source of a pipeline's inputs; apart from `_Decoder`, since a cycle would keep pipelines alive."""

    def __init__(self) -> None:
        self.batches: Iterator[Fed] = iter(())

    def next(self) -> Fed:
        """The next batch; StopIteration is how DALI learns of the epoch's end."""
        return next(self.batches)


class _Decoder:
    """A DALI pipeline for batches of up to `batch_size` images.

    cuts: whether rectangles are cut out, and fed; an image that is taken whole is spared what each input costs.
    shape: (H, W) that rectangles are resized to; None leaves them as they are.
    augment: adds to the pipeline what is done to the images at last; it takes and gives DALI's node.
    """

    def __init__(
        self,
        cuts: bool,
        shape: tuple[int, int] | None,
        batch_size: int,
        device: torch.device,
        threads: int,
        augment: functools.partial | None = None,
    ) -> None:
        self.device = device
        self._feed = _Feed()
        gpu = device.type == "cuda"
        if gpu and device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        # DALI's stubs: an operator may give several nodes, or none.
        define = dali.pipeline_def(enable_conditionals=augment is not None)(self._define)  # pyright: ignore[reportArgumentType]
        self._pipeline = define(
            cuts,
            shape,
            augment,
            batch_size=batch_size,
            num_threads=threads,
            device_id=self.device.index if gpu else None,
            prefetch_queue_depth=BATCHES_AHEAD,
            exec_dynamic=True,  # outputs own their memory, so that a batch which is handed out stays valid
        )
        self._pipeline.build()

    def _define(self, cuts: bool, shape: tuple[int, int] | None, augment: functools.partial | None):
        """The pipeline's graph."""
        num_inputs = 1 + 2 * cuts + (shape is not None)
        fed = fn.external_source(source=self._feed.next, num_outputs=num_inputs, no_copy=True)
        decoding = {
            "device": "mixed" if self.device.type == "cuda" else "cpu",
            "output_type": types.DALIImageType.RGB,
            "adjust_orientation": False,  # stored upright
            # The two that make libjpeg-turbo's pixels FFCV's.
            "jpeg_fancy_upsampling": True,
            "use_fast_idct": True,
        }
        if cuts:
            encoded, start, size = fed[:3]
            images = fn.decoders.image_slice(encoded, start=start, shape=size, axis_names="HW", **decoding)
        else:
            images = fn.decoders.image(fed[0], **decoding)
        if shape is not None:
            # The size is fed, too, because the images of batches that are passed over stay small.
            images = fn.resize(images, size=fed[3], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
        return images if augment is None else augment(images)

    def run(self, fed: Iterator[Fed]) -> Generator[Images, None, None]:
        """DALI's list of images for each of `fed`, on the device.

        RuntimeError when DALI fails; the pipeline cannot be used again then.

        On CUDA they are made on DALI's streams, and torch's current one waits for them.
        """
        self._feed.batches = fed
        self._pipeline.reset()
        try:
            while True:
                (images,) = self._run_once()
                yield images
        except StopIteration:
            return
        except GeneratorExit:
            self._drain()
            raise

    def _drain(self) -> None:
        """Finish the batches in flight, so that the pipeline is ready for another epoch."""
        self._feed.batches = iter(())
        # Nobody waits for these images: that one of them cannot be decoded is told when its turn comes.
        with contextlib.suppress(StopIteration, RuntimeError):
            while True:
                self._run_once()

    def _run_once(self) -> tuple:
        if self.device.type != "cuda":
            return self._pipeline.run()
        with torch.cuda.device(self.device):
            return self._pipeline.run(torch.cuda.current_stream())
