"""Choosing and building the loader of a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastlt.names import unknown
from loaders.order.crop import CropSpec
from loaders.order.plan import EpochPlan
from loaders.protocol import BatchLoader, StoredSplit
from loaders.readers.dali_augment import build_dali_augment
from loaders.readers.memory import free_share, readable
from loaders.readers.resident_loader import ResidentLoader, check_pixels, is_ragged, resident_bytes
from loaders.readers.torch_loader import TorchLoader
from loaders.stored.beton import Beton
from loaders.stored.damage import DamageError
from loaders.stored.source_dataset import SourceDataset
from loaders.stored.tar_shards import TarShards

if TYPE_CHECKING:
    from loaders.stored.dataset import ConvertedDataset


def _ffcv(*args, **kwargs) -> BatchLoader:
    from loaders.readers.ffcv_loader import (
        FfcvLoader,  # here, for numba takes seconds to import and the others need none of it
    )

    return FfcvLoader(*args, **kwargs)


def _dali(*args, **kwargs) -> BatchLoader:
    from loaders.readers.dali_loader import DaliLoader  # here, for a machine without DALI has the other backends

    return DaliLoader(*args, **kwargs)


def _resident_jpeg(*args, **kwargs) -> BatchLoader:
    from loaders.readers.resident_jpeg_loader import ResidentJpegLoader  # as above

    return ResidentJpegLoader(*args, **kwargs)


def _check_resident(stored: StoredSplit, plan: EpochPlan, device: torch.device) -> None:
    check_pixels(stored, plan, device, plan.world_size)


def _check_resident_jpeg(stored: StoredSplit, plan: EpochPlan, device: torch.device) -> None:
    from loaders.readers.resident_jpeg_loader import check_files  # as above

    check_files(stored, plan.world_size)


def _check_dali(stored: StoredSplit, plan: EpochPlan, device: torch.device) -> None:
    import loaders.readers.dali_loader  # noqa: F401  (refuses to be imported where DALI is absent)


BACKENDS = {
    "resident": ResidentLoader,
    "resident_jpeg": _resident_jpeg,
    "ffcv": _ffcv,
    "torch": TorchLoader,
    "dali": _dali,
}
# What a backend needs besides a split that can be opened, asked before any process has filled memory.
CHECKS = {"resident": _check_resident, "resident_jpeg": _check_resident_jpeg, "dali": _check_dali}
READS = {"ffcv": ("ffcv",), "dali": ("dali",), "resident_jpeg": ("dali", "ffcv")}  # the others: .beton files first
NEED_CONVERSION = ("ffcv", "resident_jpeg")
AUGMENT_BACKENDS = ("dali", "resident_jpeg")  # those whose pipeline can do DALI's automatic augmentation
RESIDENT_SHARE = 0.4  # of the memory that is free now; model, activations and the other splits need the rest


def make_loader(
    dataset: ConvertedDataset | SourceDataset,
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
    view: int = 0,
    num_workers: int | None = None,
    memory_budget_bytes: int | None = None,
    classes: np.ndarray | None = None,
    dali_augment: str | Mapping | None = None,
) -> BatchLoader:
    """The loader of one split of a converted data set, or of a source that is read without converting it.

    backend: "resident", "resident_jpeg", "ffcv", "torch", "dali", or "auto": resident when the split's pixels fit in
        `memory_budget_bytes` (default: 40 % of the device's free memory, of which each process on a CPU takes its
        share), but for random crops of images of many sizes on a CPU; else ffcv, or dali when the data set has no other
        format, or torch for a source. `loader.reason` says why. "ffcv" reads .beton files and "dali" shards; of the
        others "resident_jpeg" reads shards first, which hold the original JPEGs, and "resident" and "torch" .beton
        files. A source's own files are read by "resident", "torch" and "dali".
    batch_size: images a batch of this process.
    train: True shuffles by (seed, epoch), gives each process equally many full batches and allows random crops; False
        keeps split order and gives each image exactly once over all processes.
    view: another one has the same images in the same order under other random crops.
    num_workers: decoding threads or processes; None shares the job's cores among its processes.
    classes: bool (C,), the classes whose images are read, as if the split held no others; None for all of them.
    dali_augment: what DALI does to training images after the crop (`dali_augment.build_dali_augment`).

    In evaluation all backends give the same pixels of the same stored images. Two formats of one data set differ where
    the source is JPEGs, whose shards are the original files: from raw .beton files, which hold Pillow's pixels, by 1
    level of 255 on average, and from those of mode jpg, which are encoded anew, by 2 at quality 90 (photographs cut to
    224 pixels; single pixels by up to 20 and 100).

    Raises ValueError for an unknown backend, one whose format the data set lacks, an augmentation by DALI without
    DALI, a split that is damaged or disagrees with the data set's labels, mixed image sizes without a crop, a training
    batch that the split cannot fill, and a split that a resident backend has no memory for.
    """
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(unknown("loader backend", backend, [*BACKENDS, "auto"]))
    options = {}
    if dali_augment is not None:
        if backend not in AUGMENT_BACKENDS:
            raise ValueError(f"dali_augment is for the backends {' and '.join(AUGMENT_BACKENDS)}, not for {backend!r}")
        options["augment"] = build_dali_augment(dali_augment)
    stored = _open(dataset, split, backend)
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
    )
    device = torch.device(device)
    reason = f"{backend}: asked for"
    if backend == "auto":
        backend, reason = choose_backend(plan, device, memory_budget_bytes, _streaming(dataset))
    return BACKENDS[backend](stored, plan, device=device, num_workers=num_workers, reason=reason, **options)


def check_loader(
    dataset: ConvertedDataset | SourceDataset,
    split: str,
    *,
    backend: str,
    device: torch.device | str,
    train: bool,
    crop: CropSpec,
    world_size: int = 1,
) -> tuple[int, int]:
    """(H, W) of the images that `make_loader` would cut; raises what it would raise, and reads no image.

    Batches are taken to be of one image: whether a split fills larger ones is not asked.
    """
    stored, device = _open(dataset, split, backend), torch.device(device)
    plan = EpochPlan(stored.labels, stored.heights, stored.widths, crop, 1, train, world_size=world_size)
    if backend == "auto":
        backend, _ = choose_backend(plan, device, reader=_streaming(dataset))
    if backend in CHECKS:
        CHECKS[backend](stored, plan, device)
    return plan.output_shape


def _open(dataset: ConvertedDataset | SourceDataset, split: str, backend: str) -> StoredSplit:
    """The split in the first of the formats that `backend` reads.

    ValueError when the data set has none of them, or its labels are others.
    """
    stored = _open_format(dataset, split, backend)
    if not np.array_equal(stored.labels, dataset.labels(split)):
        raise DamageError(f"{stored.path} and the data set's labels of {split!r} disagree: convert the data set again")
    return stored


def _open_format(dataset: ConvertedDataset | SourceDataset, split: str, backend: str) -> StoredSplit:
    if isinstance(dataset, SourceDataset):
        if backend in NEED_CONVERSION:
            raise ValueError(f"the {backend!r} backend reads converted data sets: convert {dataset.root} first")
        return dataset.stored(split)
    wanted = READS.get(backend, ("ffcv", "dali"))
    kind = next((kind for kind in wanted if kind in dataset.formats), wanted[0])
    return TarShards.open(dataset.shards(split)) if kind == "dali" else Beton.open(dataset.beton(split))


def _streaming(dataset: ConvertedDataset | SourceDataset) -> str:
    """The backend for what is read epoch by epoch."""
    if isinstance(dataset, SourceDataset):
        return "torch"
    return "ffcv" if "ffcv" in dataset.formats else "dali"


def choose_backend(
    plan: EpochPlan, device: torch.device, memory_budget_bytes: int | None = None, reader: str = "ffcv"
) -> tuple[str, str]:
    """("resident" or `reader`, one line that says why); `reader` is the backend for what is read epoch by epoch."""
    if device.type == "cpu" and is_ragged(plan.crop, plan.heights, plan.widths):
        return reader, f"{reader}: images differ in size, and to cut random crops out of them in memory is a GPU's work"
    needed = resident_bytes(plan.crop, plan.heights, plan.widths)
    if memory_budget_bytes is None:
        budget, origin = (
            int(RESIDENT_SHARE * free_share(device, plan.world_size)),
            f"{RESIDENT_SHARE:.0%} of the memory free on {device}{_shared(device, plan.world_size)}",
        )
    else:
        budget, origin = memory_budget_bytes, "the memory budget"
    backend, relation = ("resident", "fits in") if needed <= budget else (reader, "is more than")
    return backend, f"{backend}: the split's {readable(needed)} of pixels {relation} {readable(budget)}, {origin}"


def _shared(device: torch.device, world_size: int) -> str:
    return f" for each of {world_size} processes" if device.type == "cpu" and world_size > 1 else ""
