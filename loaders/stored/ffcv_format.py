"""Writing a split as an FFCV file (.beton), in a process of its own that cannot hang.

FFCV's writer waits for ever when one of its workers raises or dies. So images are decoded once before (`image_check`),
and the writer runs in a child process whose workers, errors and progress are watched; a stuck one is ended, with the
reason.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from fastlt.names import unknown
from loaders.sources.split import Split
from loaders.stored.encode import JPEG_OVER_PIXELS, jpeg_file, scaled_image, stored_sizes
from loaders.stored.forked_workers import Advance, available_cores, counted, end_with_parent, signals_held
from loaders.stored.image_check import BadImage, ImageCheck, check_images

MODES = ("raw", "jpg", "proportion")
MIN_PAGE_BYTES, DEFAULT_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 21, 1 << 23, 1 << 31  # FFCV: powers of two from 2 MiB
PAGE_MEMORY_BYTES = 1 << 31  # each of FFCV's workers holds a page
CHUNK = 100  # images a worker takes at a time, FFCV's default
SHARED_MEMORY = Path("/dev/shm")
SAMPLE_BYTES = 32  # of it, at least what FFCV takes for the metadata of an image
POLL_S = 0.1
GRACE_S = 5.0  # for the writer's process to report before it is killed


@dataclass(frozen=True)
class FfcvOptions:
    """How images are stored; for the dali format, `dali_format.write_shards` says what it makes of these.

    mode: "raw" pixels, "jpg", or "proportion": half of the images (FFCV draws which) as JPEG, the others raw. FFCV's
        "smart" is not offered: without a threshold it stores everything raw.
    max_resolution: longer sides are scaled down to this many pixels (area interpolation, aspect ratio kept).
    jpeg_quality: 1..100.
    num_workers: processes, None for one a core.
    """

    mode: str = "raw"
    max_resolution: int | None = None
    jpeg_quality: int = 90
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(unknown("mode", self.mode, MODES))
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ValueError(f"max_resolution is {self.max_resolution}: it must be at least 1, or left out")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}: it must be 1 to 100")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}: it must be at least 1")

    def parameters(self) -> dict:
        """What determines the stored bytes, for the manifest: all but the number of workers."""
        return {name: value for name, value in asdict(self).items() if name != "num_workers"}


def write_beton(
    path: Path,
    split: Split,
    options: FfcvOptions,
    *,
    check: ImageCheck | None = None,
    advance: Advance = lambda n: None,
    timeout_s: float = 300.0,
) -> list[BadImage]:
    """Write the images of `split` that can be decoded, and their labels, to `path`; return those that cannot.

    Sample i of the file is the i-th good image. The fields are "image" (RGB) and "label" (int).
    check: what `check_images(split)` gave; without it, every image is decoded here first.
    advance: called with the number of images written since the last call.
    timeout_s: a writer without progress for so long is ended.
    Written under a temporary name and renamed when whole. Raises ValueError when no image is good or the writer fails,
    OSError when the disk is full.
    """
    check = check or check_images(split, num_workers=options.num_workers)
    if not len(check.good):
        raise ValueError(f"{path.name}: none of the {len(split)} images can be decoded")
    sizes = stored_sizes(check.sizes[check.good], options.max_resolution)
    page_bytes, workers = _page_and_workers(sizes, options.num_workers or available_cores())
    _check_shared_memory(len(sizes))
    partial = path.with_name(path.name + ".partial")
    try:
        samples = _Samples(split, check.good, check.sizes[check.good], sizes, options)
        _run_writer(partial, samples, options, page_bytes, workers, advance, timeout_s)
        _check_written(partial, split.labels[check.good])
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return list(check.bad)


def _check_shared_memory(count: int) -> None:
    """ValueError when FFCV's table of samples has no room there: its workers would be killed when they write to it."""
    needed = (1 << 20) + SAMPLE_BYTES * count
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else needed
    if free < needed:
        raise ValueError(
            f"shared memory, {SHARED_MEMORY}, has {free / 2**20:.1f} MiB free, and FFCV's writer needs "
            f"{needed / 2**20:.1f} MiB for {count:,} images: make it larger (docker run --shm-size=1g), or convert to "
            "--format dali"
        )


def _check_written(path: Path, labels: np.ndarray) -> None:
    """ValueError when a file that FFCV has written lacks something.

    FFCV does not look at how many bytes of a page the system took: on a full disk it may be fewer, without an error.
    """
    from loaders.stored.beton import Beton  # lazily: usage errors must not wait for torch

    if not np.array_equal(Beton.open(path).labels, labels):
        raise ValueError(f"{path.name.removesuffix('.partial')} was not written whole: its labels are not the split's")


def _page_and_workers(sizes: np.ndarray, cores: int) -> tuple[int, int]:
    """The page size, which the largest image must fit into, and how many workers have something to do.

    Every worker writes at least one page, so a small data set takes small pages and few workers: 4 MiB and not
    8 MiB times the cores.
    """
    image_bytes = 3 * sizes.prod(axis=1)
    largest = int(image_bytes.max()) + JPEG_OVER_PIXELS
    page = DEFAULT_PAGE_BYTES if image_bytes.sum() > 8 * DEFAULT_PAGE_BYTES else MIN_PAGE_BYTES
    while page < largest:
        page *= 2
    if page > MAX_PAGE_BYTES:
        raise ValueError(f"an image of {largest / 2**30:.1f} GiB is more than FFCV can store: set max_resolution")
    busy = min(-(-int(image_bytes.sum()) // page), -(-len(sizes) // CHUNK), max(PAGE_MEMORY_BYTES // page, 1))
    return page, max(min(cores, busy), 1)


class _Jpeg(NamedTuple):
    """A JPEG file on its way to FFCV's writer."""

    data: bytes
    height: int
    width: int


class _Samples:
    """What FFCV's workers read: (image, label) by position; `done` counts those read, `abort` ends it.

    An image is its pixels, resized, and in mode "jpg" its file.
    original, sizes: int64 (N, 2), (height, width) of the images, and of what is stored.
    """

    def __init__(
        self, split: Split, good: np.ndarray, original: np.ndarray, sizes: np.ndarray, options: FfcvOptions
    ) -> None:
        self.split, self.good, self.original, self.sizes, self.options = split, good, original, sizes, options
        context = multiprocessing.get_context("fork")
        self.done = context.Value("q", 0)
        self.abort = context.Event()

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, position: int) -> tuple[np.ndarray | _Jpeg, int]:
        i, size = int(self.good[position]), self.sizes[position]
        if self.options.mode == "jpg":
            data = jpeg_file(self.split, i, self.original[position], size, self.options.jpeg_quality)
            image = _Jpeg(data, int(size[0]), int(size[1]))
        else:
            image = np.ascontiguousarray(scaled_image(self.split, i, size))
        with self.done.get_lock():
            self.done.value += 1
        return image, int(self.split.labels[i])


def _run_writer(
    path: Path,
    samples: _Samples,
    options: FfcvOptions,
    page_bytes: int,
    workers: int,
    advance: Advance,
    timeout_s: float,
) -> None:
    """Run FFCV's writer in a child process and watch it: a ValueError with the reason when it fails or is stuck."""
    # Lazily, as FFCV itself: usage errors must not wait for it.
    from loaders.stored.ffcv_kernels import keep_torch_threads

    with keep_torch_threads():
        import ffcv.writer  # noqa: F401  (here and not in the child: it takes seconds, and there is a child a split)
    context = multiprocessing.get_context("fork")  # forked: the pixels of a split in memory are shared, not copied
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as errors:
        arguments = (path, samples, options, page_bytes, workers, sender, errors.fileno(), os.getpid())
        process = context.Process(target=_writer_process, args=arguments, name="ffcv-writer")
        try:
            with signals_held():
                process.start()
            sender.close()
            problem = _watch(process, receiver, samples, advance, timeout_s)
            if problem is None:
                process.join(GRACE_S)
        finally:
            with signals_held():
                _end(process, samples)
            receiver.close()
        if problem:
            errors.seek(0)
            reason = _last_error(errors.read().decode(errors="replace")) or "it left no message"
            if os.strerror(errno.ENOSPC) in reason:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise ValueError(f"{path.name.removesuffix('.partial')} was not written: {problem}: {reason}")
    advance(0)


def _watch(
    process: BaseProcess, receiver: Connection, samples: _Samples, advance: Advance, timeout_s: float
) -> str | None:
    """Wait until the writer reports; None when it is done, else what went wrong."""
    seen, changed = 0, time.monotonic()
    while True:
        reported = receiver.poll(POLL_S)
        count = min(counted(samples.done), len(samples))  # an image that did not fit its page is not read again
        if count != seen:
            advance(count - seen)
            seen, changed = count, time.monotonic()
        if reported:
            try:
                return receiver.recv()
            except EOFError:
                process.join(GRACE_S)
                return f"FFCV's writer died (exit code {process.exitcode})"
        if time.monotonic() - changed > timeout_s:
            return f"FFCV's writer made no progress for {timeout_s:g} s"


def _end(process: BaseProcess, samples: _Samples) -> None:
    """End the writer's process and its workers, if they still run; they are one process group."""
    if process.pid is None:  # never started
        return
    if process.is_alive():
        samples.abort.set()
        process.join(GRACE_S)
    # SIGTERM ends those that a killed writer has left, and spares Python's process that then frees their shared memory.
    for number in (signal.SIGTERM, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    process.kill()
    process.join()


def _writer_process(
    path: Path,
    samples: _Samples,
    options: FfcvOptions,
    page_bytes: int,
    workers: int,
    sender: Connection,
    errors: int,
    parent: int,
) -> None:
    """The child: FFCV's writer, with a thread that watches its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and what the parent does when it is terminated is not for this one
    os.setpgrp()  # one group to kill
    os.dup2(errors, 2)  # the workers' tracebacks are the reason that is reported
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)  # the parent's may not write to descriptor 2
    np.random.seed(0)  # FFCV draws from it in mode "proportion"
    import cv2
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    cv2.setNumThreads(0)  # its threads do not survive a fork
    progress_bar = ffcv.writer.tqdm
    ffcv.writer.tqdm = lambda total: progress_bar(total=total, disable=True)  # the parent shows the progress
    made: list[multiprocessing.Process] = []

    def make(target: Callable, args: tuple) -> multiprocessing.Process:
        made.append(multiprocessing.Process(target=_ffcv_worker, args=(target, args)))
        return made[-1]

    ffcv.writer.Process = make
    field = RGBImageField(write_mode=options.mode, jpeg_quality=options.jpeg_quality)
    if options.mode == "jpg":
        field.encode = _encode_jpeg  # of the object: FFCV knows a field by its class
    fields = {"image": field, "label": IntField()}
    writer = ffcv.writer.DatasetWriter(str(path), fields, page_size=page_bytes, num_workers=workers)
    threading.Thread(target=_guard, args=(writer, made, samples, sender, parent), daemon=True).start()
    try:
        writer.from_indexed_dataset(samples, chunksize=CHUNK)
    except Exception:
        traceback.print_exc()
        _give_up(writer, made, sender, "FFCV's writer failed")
    sender.send(None)


def _encode_jpeg(destination: np.ndarray, image: _Jpeg, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
    """What `RGBImageField.encode` does, with a file that is there already."""
    from loaders.stored.beton import JPEG  # lazily, as above

    destination["mode"] = JPEG
    destination["height"], destination["width"] = image.height, image.width
    destination["data_ptr"], storage = malloc(len(image.data))
    storage[:] = np.frombuffer(image.data, dtype=np.uint8)


def _ffcv_worker(target: Callable, args: tuple) -> None:
    end_with_parent()
    target(*args)


def _guard(
    writer: object, workers: list[multiprocessing.Process], samples: _Samples, sender: Connection, parent: int
) -> None:
    """Watch from inside the writer's process; when a worker fails, or the parent is gone or says so, end everything.

    workers: those that FFCV has made; `multiprocessing.active_children` forgets one that dies before it is looked at.
    """
    while True:
        failed = [worker.exitcode for worker in workers if worker.exitcode not in (None, 0)]
        if failed:
            how = f"was killed by signal {-failed[0]} (out of memory?)" if failed[0] < 0 else "failed"
            _give_up(writer, workers, sender, f"a worker of FFCV's writer {how}")
        if samples.abort.is_set() or os.getppid() != parent:
            _give_up(writer, workers, None, "")
        time.sleep(POLL_S)


def _give_up(
    writer: object, workers: list[multiprocessing.Process], sender: Connection | None, problem: str
) -> NoReturn:
    """End the workers and this process, leaving nothing behind; FFCV's own process would wait for them for ever."""
    for worker in workers:
        if worker.pid is not None:  # else not started yet
            worker.kill()
    shared = getattr(writer, "metadata_sm", None)
    if isinstance(shared, SharedMemory):
        shared.close()
        shared.unlink()  # else the shared memory would stay after the process
    if sender is not None:
        sender.send(problem)
    os._exit(1)


def _last_error(text: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line.strip() for line in text.splitlines() if line and not line.startswith((" ", "\t"))]
    named = [line for line in lines if ": " in line and not line.startswith(("Process ", "Traceback"))]
    return (named or lines or [""])[-1]
