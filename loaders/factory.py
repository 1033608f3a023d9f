"""Choosing and building the loader of a split."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fastlt.names import unknown
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.order.shard_order import ShardOrder
from loaders.protocol import BatchLoader, StoredDataset, StoredSplit
from loaders.readers import AUTO, AUTO_READS, BACKENDS, backends_that
from loaders.readers.base_loader import default_workers
from loaders.readers.dali_augment import build_dali_augment
from loaders.readers.free_memory import free_share
from loaders.readers.prefetched_loader import PrefetchedLoader
from loaders.readers.resident_loader import is_ragged, kept_bytes
from loaders.sources.messages import readable_bytes
from loaders.stored import SOURCE_FILES
from loaders.stored.cached_folder import FETCHERS
from loaders.stored.damage import DamageError
from loaders.stored.streamed import StreamedShards
from loaders.stored.tar_shards import TarShards

RESIDENT_SHARE = 0.4  # of the memory that is free now; model, activations and the other splits need the rest


def make_loader(
    dataset: StoredDataset,
    split: str,
    *,
    backend: str,
    batch_size: int,
    device: torch.device | str,
    train: bool,
    crop: CropSpec,
    sampling: str = "instance",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int | None = None,
    view: int = 0,
    num_workers: int | None = None,
    classes: np.ndarray | None = None,
    dali_augment: str | Mapping | None = None,
    keep_last: bool = False,
    order: np.ndarray | None = None,
    by_shards: ShardOrder | None = None,
) -> BatchLoader:
    """The loader of one split of a converted data set, or of a source that is read without converting it.

    backend: a row of BACKENDS, which reads the first of its formats that the data set has, or "auto": resident when the
        split's pixels fit in 40 % of the device's free memory, of which each process on a CPU takes its share, but for
        random crops of images of many sizes on a CPU; else ffcv, or dali when the data set has no other format, or
        torch for a source. `loader.reason` says why.
    batch_size: images a batch of this process.
    train: True shuffles by (seed, epoch), gives each process equally many full batches and allows random crops; False
        keeps split order and gives each image exactly once over all processes.
    local_world_size: how many of the processes share this machine's cores and memory; None is all of them.
    view: another one has the same images in the same order under other random crops.
    num_workers: decoding threads or processes; None shares the cores among the processes of this machine.
    classes: bool (C,), the classes whose images are read, as if the split held no others; None for all of them.
    dali_augment: what DALI does to training images after the crop (`dali_augment.build_dali_augment`).
    keep_last: whether a training epoch, too, gives each image exactly once, the last batch being smaller.
    order: the images of an evaluation over all processes, see `EpochPlan`.
    by_shards: how training shuffles by shards, which the data set then has to have; None shuffles all images.

    In evaluation all backends give the same pixels of the same stored images. Two formats of one data set differ where
    the source is JPEGs, whose shards are the original files: from raw .beton files, which hold Pillow's pixels, by 1
    level of 255 on average, and from those of mode jpg, which are encoded anew, by 2 at quality 90 (photographs cut to
    224 pixels; single pixels by up to 20 and 100).

    Raises ValueError for an unknown backend, one whose format the data set lacks, an augmentation by DALI without
    DALI, a split that is damaged or disagrees with the data set's labels, mixed image sizes without a crop, a training
    batch that the split cannot fill, and a split that a resident backend has no memory for.
    """
    if backend not in (AUTO, *BACKENDS):
        raise ValueError(unknown("loader backend", backend, (AUTO, *BACKENDS)))
    options = {}
    if dali_augment is not None:
        able = backends_that(lambda one: one.can_augment)
        if backend not in able:
            raise ValueError(f"dali_augment is for the backends {' and '.join(able)}, not for {backend!r}")
        options["augment"] = build_dali_augment(dali_augment)
    stored = _open(dataset, split, backend, by_shards is not None)
    plan = EpochPlan(
        labels=stored.labels,
        heights=stored.heights,
        widths=stored.widths,
        crop=crop,
        batch_size=batch_size,
        train=train,
        sampling=sampling,
        seed=seed,
        rank=rank,
        world_size=world_size,
        view=view,
        classes=classes,
        keep_last=keep_last,
        order=order,
        by_shards=by_shards,
        shard_starts=stored.first if isinstance(stored, TarShards) else None,
    )
    device, processes = torch.device(device), local_world_size or world_size
    reason = f"{backend}: asked for"
    if backend == AUTO:
        reader = streaming_backend(dataset, by_shards is not None)
        backend, reason = _choose(stored, plan, device, reader, processes)
    make = BACKENDS[backend].load()
    workers = default_workers(processes) if num_workers is None else num_workers
    if isinstance(stored, StreamedShards):
        stored.open_shards, ahead = _shards_kept(plan)  # before the loader is made: its processes get a copy
        loader = PrefetchedLoader(make(stored, plan, device, workers, **options), stored, plan, ahead)
    else:
        loader = make(stored, plan, device, workers, **options)
    loader.reason = reason
    return loader


def _shards_kept(plan: EpochPlan) -> tuple[int, int]:
    """How many shards each process of a loader keeps open, and how many are kept in the cache for all of them."""
    if plan.by_shards is None or not plan.train:
        return 2, FETCHERS  # in split order
    of_blocks = plan.by_shards.block * -(-plan.by_shards.parts // plan.world_size)
    return of_blocks, 2 * of_blocks


def check_loader(
    dataset: StoredDataset,
    split: str,
    *,
    backend: str,
    device: torch.device | str,
    train: bool,
    crop: CropSpec,
    local_world_size: int = 1,
    by_shards: ShardOrder | None = None,
) -> tuple[str, tuple[int, int]]:
    """The backend that `make_loader` would take, and (H, W) of the images that it would cut.

    Raises what it would raise, and reads no image. Batches are taken to be of one image: whether a
    split fills larger ones is not asked.
    """
    stored, device = _open(dataset, split, backend, by_shards is not None), torch.device(device)
    plan = EpochPlan(stored.labels, stored.heights, stored.widths, crop, 1, train)
    if backend == AUTO:
        reader = streaming_backend(dataset, by_shards is not None)
        backend, _ = _choose(stored, plan, device, reader, local_world_size)
    BACKENDS[backend].load().check(stored, plan, device, local_world_size)
    return backend, plan.output_shape


def _open(dataset: StoredDataset, split: str, backend: str, by_shards: bool = False) -> StoredSplit:
    """The split in the first of the formats that `backend` reads, or in shards.

    ValueError when the data set has none of them, or its labels are others.
    """
    if by_shards and "dali" not in dataset.formats:
        raise ValueError(f"{dataset.root} has no shards to be ordered by: convert it with --format dali or both")
    if by_shards and "dali" not in _reads(backend):
        raise ValueError(f"the {backend!r} backend reads no shards: choose one that does, or the order of images")
    kind = "dali" if by_shards else format_read(dataset, backend)
    if kind is None and SOURCE_FILES in dataset.formats:
        raise ValueError(f"the {backend!r} backend reads converted data sets: convert {dataset.root} first")
    stored = dataset.stored(split, kind or _reads(backend)[0])
    if not np.array_equal(stored.labels, dataset.labels(split)):
        raise DamageError(f"{stored.path} and the data set's labels of {split!r} disagree: convert the data set again")
    if isinstance(stored, StreamedShards) and backend != AUTO and not BACKENDS[backend].remote:
        able = ", ".join((AUTO, *backends_that(lambda one: one.remote)))
        raise ValueError(
            f"the {backend!r} backend reads data sets that are on the disk as a whole: choose one of {able}"
        )
    return stored


def format_read(dataset: StoredDataset, backend: str) -> str | None:
    """The first of the formats that `backend` reads which the data set has; None when it has none of them."""
    return next((kind for kind in _reads(backend) if kind in dataset.formats), None)


def _reads(backend: str) -> tuple[str, ...]:
    return AUTO_READS if backend == AUTO else BACKENDS[backend].reads


def streaming_backend(dataset: StoredDataset, by_shards: bool = False) -> str:
    """The backend for what is read epoch by epoch. by_shards: of what is read in shards."""
    formats = ("dali",) if by_shards else dataset.formats
    return next(name for name, backend in BACKENDS.items() if backend.streams in formats)


def _choose(stored: StoredSplit, plan: EpochPlan, device: torch.device, reader: str, processes: int) -> tuple[str, str]:
    """As `choose_backend`; shards on a server are read epoch by epoch."""
    if isinstance(stored, StreamedShards):
        return reader, f"{reader}: shards are fetched from {stored.files.remote.url}"
    return choose_backend(plan, device, reader, processes)


def choose_backend(plan: EpochPlan, device: torch.device, reader: str = "ffcv", processes: int = 1) -> tuple[str, str]:
    """("resident" or `reader`, one line that says why); `reader` is the backend for what is read epoch by epoch.

    processes: that share this machine's memory.
    """
    if device.type == "cpu" and is_ragged(plan.crop, plan.heights, plan.widths):
        return reader, f"{reader}: images differ in size, and to cut random crops out of them in memory is a GPU's work"
    needed = kept_bytes(plan)
    budget = int(RESIDENT_SHARE * free_share(device, processes))
    backend, relation = ("resident", "fits in") if needed <= budget else (reader, "is more than")
    shared = f" for each of {processes} processes" if device.type == "cpu" and processes > 1 else ""
    return backend, (
        f"{backend}: the split's {readable_bytes(needed)} of pixels {relation} {readable_bytes(budget)}, "
        f"{RESIDENT_SHARE:.0%} of the memory free on {device}{shared}"
    )
