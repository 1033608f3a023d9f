"""Choosing and building the loader of a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from fastlt.names import unknown
from loaders.beton import Beton
from loaders.crop import CropSpec, common_shape
from loaders.plan import EpochPlan
from loaders.protocol import BatchLoader, StoredSplit
from loaders.resident_loader import ResidentLoader, resident_bytes
from loaders.tar_shards import TarShards
from loaders.torch_loader import TorchLoader

if TYPE_CHECKING:
    from loaders.dataset import ConvertedDataset


def _ffcv(*args, **kwargs) -> BatchLoader:
    from loaders.ffcv_loader import FfcvLoader  # here, for numba takes seconds to import and the others need none of it

    return FfcvLoader(*args, **kwargs)


def _dali(*args, **kwargs) -> BatchLoader:
    from loaders.dali_loader import DaliLoader  # here, for a machine without DALI has the other backends

    return DaliLoader(*args, **kwargs)


BACKENDS = {"resident": ResidentLoader, "ffcv": _ffcv, "torch": TorchLoader, "dali": _dali}
RESIDENT_SHARE = 0.4  # of the memory that is free now; model, activations and the other splits need the rest
CGROUP = Path("/sys/fs/cgroup")


def make_loader(
    dataset: ConvertedDataset,
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
) -> BatchLoader:
    """The loader of one split of a converted data set.

    backend: "resident", "ffcv", "torch", "dali", or "auto": resident when the split's pixels fit in
        `memory_budget_bytes` (default: 40 % of the device's free memory) without approximating the crop, else ffcv, or
        dali when the data set has no other format; `loader.reason` says why. "ffcv" reads .beton files and "dali"
        shards; the others read what there is, .beton files first.
    batch_size: images a batch of this process.
    train: True shuffles by (seed, epoch), gives each process equally many full batches and allows random crops; False
        keeps split order and gives each image exactly once over all processes.
    view: another one has the same images in the same order under other random crops.
    num_workers: decoding threads or processes; None shares the job's cores among its processes.
    classes: bool (C,), the classes whose images are read, as if the split held no others; None for all of them.

    Raises ValueError for an unknown backend, one whose format the data set lacks, a split that is damaged or disagrees
    with the data set's labels, mixed image sizes without a crop, and a training batch that the split cannot fill.
    """
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(unknown("loader backend", backend, [*BACKENDS, "auto"]))
    only_dali = "ffcv" not in dataset.formats
    stored: StoredSplit
    if backend == "dali" or (only_dali and backend != "ffcv"):
        stored = TarShards.open(dataset.shards(split))
    else:
        stored = Beton.open(dataset.beton(split))
    if not np.array_equal(stored.labels, dataset.labels(split)):
        raise ValueError(f"{stored.path} and the data set's labels of {split!r} disagree: convert the data set again")
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
        backend, reason = choose_backend(plan, device, memory_budget_bytes, reader="dali" if only_dali else "ffcv")
    return BACKENDS[backend](stored, plan, device=device, num_workers=num_workers, reason=reason)


def choose_backend(
    plan: EpochPlan, device: torch.device, memory_budget_bytes: int | None = None, reader: str = "ffcv"
) -> tuple[str, str]:
    """("resident" or `reader`, one line that says why); `reader` is the backend for what is read epoch by epoch."""
    if plan.crop.kind == "random_resized" and common_shape(plan.heights, plan.widths) is None:
        return reader, f"{reader}: images differ in size, and random crops of them need the whole image"
    needed = resident_bytes(plan.crop, plan.heights, plan.widths)
    if memory_budget_bytes is None:
        budget, origin = (
            int(RESIDENT_SHARE * free_bytes(device)),
            f"{RESIDENT_SHARE:.0%} of the memory free on {device}",
        )
    else:
        budget, origin = memory_budget_bytes, "the memory budget"
    backend, relation = ("resident", "fits in") if needed <= budget else (reader, "is more than")
    return backend, f"{backend}: the split's {_size(needed)} of pixels {relation} {_size(budget)}, {origin}"


def free_bytes(device: torch.device) -> int:
    """Memory still free on `device`; on a CPU also within the job's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
