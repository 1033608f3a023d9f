"""The loaders of a run, and the crops and augmentations that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlt.augment import Augment, Unchanged, build_augment, normalise
from fastlt.recipe import DataRecipe, StageRecipe
from fastlt.run.context import RunContext
from fastlt.run.features import FeatureLoader
from fastlt.state import Batch
from fastlt.steps import STEPS
from loaders.factory import RESIDENT_SHARE, check_loader, make_loader, streaming_backend
from loaders.order.crop import CropSpec
from loaders.order.shard_order import ShardOrder
from loaders.protocol import BatchLoader
from loaders.readers import AUTO
from loaders.readers.free_memory import free_share
from loaders.readers.two_views import TwoViewLoader
from loaders.sources.messages import readable_bytes

EVALUATION_BATCH = 512
# Pixels up to which a share of the meta set may come through a loader that keeps them, too, for a moment: others take
# seconds to begin.
RESIDENT_BYTES = 256 << 20
# The streams of random augmentations of one process.
STREAMS = ("train", "meta", "second")


@dataclass(frozen=True)
class StageLoaders:
    """The training batches of this process in a stage, and its meta batches where the method wants them.

    slices: of the meta set, where its accuracies are decoded slice by slice.
    backends: by split, the backend that `auto` chose. Random crops of images of one size are made by some backends and
        left to the augmentation by others, so a run that is resumed has to keep its backends.
    """

    train: BatchLoader
    meta: BatchLoader | None
    backends: dict[str, str]
    slices: BatchLoader | None = None

    def close(self) -> None:
        """Close all."""
        for loader in (self.train, self.meta, self.slices):
            if loader is not None:
                loader.close()


def open_stage_loaders(
    context: RunContext, stage: StageRecipe, backends: Mapping[str, str] | None = None
) -> StageLoaders:
    """The loaders of a stage. backends: `StageLoaders.backends` of before the run was stopped."""
    chosen = dict(backends or {})
    kind = STEPS[stage.method]
    options: dict[str, Any] = {"sampling": stage.sampling, "classes": stage_classes(context, stage)}
    train = _open_training(context, stage, "train", chosen, **options)
    if kind.needs.second_view and context.recipe.data.train_crop == "random_resized" and train.crops:
        train = TwoViewLoader(train, _open_training(context, stage, "train", chosen, view=1, **options))
    meta = _open_training(context, stage, "meta", chosen) if kind.takes_meta_batches(stage.options) else None
    return StageLoaders(train, meta, chosen)


def _open_training(
    context: RunContext, stage: StageRecipe, split: str, chosen: dict[str, str], **options: Any
) -> BatchLoader:
    """A shuffled, cropped split, by the backend in `chosen`, which gets the one that `auto` chooses."""
    before = chosen.get(split)
    size = batch_size(stage, split) // context.reducer.world_size
    loader = open_loader(context, split, size, train=True, backend=before, **options)
    if context.recipe.data.loader == "auto":
        chosen[split] = loader.backend
        if before is not None:
            loader.reason = f"{before}: chosen when the stage began"
    return loader


def open_evaluation_loader(context: RunContext, split: str) -> BatchLoader:
    """This process's share of a split in order, cropped as for evaluation."""
    size = min(EVALUATION_BATCH, max(1, len(context.dataset.labels(split)) // context.reducer.world_size))
    return open_loader(context, split, size, train=False)


def whole_split(context: RunContext, split: str) -> Batch:
    """All images of a split on every process, in order, cropped as for evaluation."""
    size = min(EVALUATION_BATCH, len(context.dataset.labels(split)))
    loader = open_loader(context, split, size, train=False, whole=True)
    try:
        parts = list(loader.epoch(0))
    finally:
        loader.close()
    return Batch(*(torch.cat([getattr(p, key) for p in parts]) for key in ("images", "labels", "index")))


def read_share(context: RunContext, split: str, order: Tensor) -> Tensor:
    """This process's share of a split on the device, cropped as for evaluation: uint8 (n, 3, H, W), channels_last.

    order: int64 (M,), places in the split; the share is every `world_size`-th of them, from the rank on. Each image is
    read once and goes to its place: there is one copy, beside a batch of the loader. Features: float32 (n, D, 1, 1).
    """
    mine = order[context.reducer.rank :: context.reducer.world_size]
    if context.features is not None:
        return context.features.of(split, train=False)[0][mine][:, :, None, None]
    side = evaluation_side(context.recipe.data, split)
    images = torch.empty(
        (len(mine), 3, side, side), dtype=torch.uint8, device=context.device, memory_format=torch.channels_last
    )
    size, backend = min(EVALUATION_BATCH, max(1, len(mine))), _streaming_backend(context)
    options: dict[str, Any] = {"backend": backend} if images.numel() > RESIDENT_BYTES else {}
    loader, start = open_loader(context, split, size, train=False, order=order.cpu().numpy(), **options), 0
    try:
        for batch in loader.epoch(0):
            images[start : start + len(batch)] = batch.images
            start += len(batch)
    finally:
        loader.close()
    return images


def open_slices(context: RunContext, index: Tensor, size: int) -> BatchLoader:
    """A loader of the images at these places of the meta set in batches of `size`, all of them for this process.

    No pixels are kept in memory; an epoch is a round.
    """
    backend = _streaming_backend(context)
    return open_loader(context, "meta", size, train=False, whole=True, backend=backend, order=index.cpu().numpy())


def _streaming_backend(context: RunContext) -> str:
    """The recipe's loader, or another one where that would keep pixels in memory."""
    loader = context.recipe.data.loader
    return streaming_backend(context.dataset) if loader in (AUTO, "resident") else loader


def is_streamed(context: RunContext, stage: StageRecipe) -> bool:
    """Whether this process's share of the meta set stays encoded: it is scored in slices and too large for memory."""
    if stage.accuracy.images_per_step is None or context.features is not None:
        return False
    return meta_share_bytes(context) > RESIDENT_SHARE * free_share(context.device, context.local_world_size)


def meta_share_bytes(context: RunContext) -> int:
    """The pixels of this process's share of the meta set."""
    share = -(-len(context.dataset.labels("meta")) // context.reducer.world_size)
    return 3 * share * evaluation_side(context.recipe.data, "meta") ** 2


def check_meta_share(context: RunContext, name: str, stage: StageRecipe) -> None:
    """ValueError where a stage keeps this process's share of the meta set and there is no memory for it."""
    kept = STEPS[stage.method].needs.class_accuracy and stage.accuracy.images_per_step is None
    needed, free = meta_share_bytes(context), free_share(context.device, context.local_world_size)
    if kept and context.recipe.data.cached_views is None and needed > free:
        raise ValueError(
            f"stages.{name}.accuracy.refresh is {stage.accuracy.refresh!r}, for which each process keeps its share of "
            f"the meta set, {readable_bytes(needed)} of pixels, and {readable_bytes(free)} of memory are free on "
            f"{context.device}: set stages.{name}.accuracy.refresh=rolling and stages.{name}.accuracy.images_per_step, "
            "with which images stay encoded that memory has no room for"
        )


def open_loader(
    context: RunContext,
    split: str,
    batch_size: int,
    *,
    train: bool,
    backend: str | None = None,
    sampling: str = "instance",
    whole: bool = False,
    view: int = 0,
    classes: np.ndarray | None = None,
    keep_last: bool = False,
    order: np.ndarray | None = None,
) -> BatchLoader:
    """A loader of this process's share of a split, or of the `whole` of it.

    batch_size: per process. backend: default the recipe's. The other arguments are `make_loader`'s.
    """
    data = context.recipe.data
    rank, world_size = (0, 1) if whole else (context.reducer.rank, context.reducer.world_size)
    if context.features is not None:
        return FeatureLoader(
            context.features.of(split, train=train),
            torch.from_numpy(context.dataset.labels(split)).to(context.device),
            batch_size,
            train=train,
            sampling=sampling,
            seed=context.recipe.seed,
            rank=rank,
            world_size=world_size,
            classes=classes,
        )
    return make_loader(
        context.dataset,
        split,
        backend=backend or data.loader,
        batch_size=batch_size,
        device=context.device,
        train=train,
        crop=crop_spec(data, split, train=train),
        sampling=sampling,
        seed=context.recipe.seed,
        rank=rank,
        world_size=world_size,
        local_world_size=context.local_world_size,
        view=view,
        num_workers=context.processes.cores if data.num_workers is None else data.num_workers,
        classes=classes,
        dali_augment=data.dali_augment if train and (split == "train" or data.meta_augment is None) else None,
        keep_last=keep_last,
        order=order,
        by_shards=shard_order(data) if train and split == "train" else None,
    )


def check_split(context: RunContext, split: str, *, train: bool) -> tuple[str, tuple[int, int]]:
    """The backend by which `open_loader` reads a split, and (H, W) of its images; `check_loader` for a recipe."""
    data = context.recipe.data
    return check_loader(
        context.dataset,
        split,
        backend=data.loader,
        device=context.device,
        train=train,
        crop=crop_spec(data, split, train=train),
        local_world_size=context.local_world_size,
        by_shards=shard_order(data) if train and split == "train" else None,
    )


def shard_order(data: DataRecipe) -> ShardOrder | None:
    """How training images are ordered by shards; None where all of them are shuffled."""
    return ShardOrder(data.stream.parts, data.stream.block) if data.order == "shards" else None


def crop_spec(data: DataRecipe, split: str | None = None, *, train: bool) -> CropSpec:
    """How stored images are cut for training, or for evaluation; those of the test split may be cut larger."""
    if train:
        return CropSpec(data.train_crop, data.image_size, scale=data.crop_scale, aspect=data.crop_aspect)
    return CropSpec(data.eval_crop, evaluation_side(data, split), ratio=data.eval_ratio)


def evaluation_side(data: DataRecipe, split: str | None) -> int:
    """Pixels a side of the images of a split that is evaluated; the test may cut several crops of each."""
    return data.image_size + (data.test_expand if split == "test" and data.test_crops > 1 else 0)


def batch_size(stage: StageRecipe, split: str) -> int:
    """Images of "train" or "meta" an iteration, over all processes."""
    return stage.meta_batch_size or stage.batch_size if split == "meta" else stage.batch_size


def stage_classes(context: RunContext, stage: StageRecipe) -> np.ndarray:
    """The classes whose images a stage trains on: bool (C,)."""
    if stage.classes == "all":
        return np.ones(context.counts.num_classes, dtype=bool)
    return context.counts.shot_masks()[stage.classes]


def iterations_per_epoch(context: RunContext, stage: StageRecipe) -> int:
    """The training batches of an epoch, as many as its loader will have."""
    images = stage_classes(context, stage)[context.dataset.labels("train")].sum()
    return int(images) // batch_size(stage, "train")


def augmentations(data: DataRecipe) -> dict[str, list]:
    """What the recipe asks for on the device, by the names of `STREAMS`."""
    return {
        "train": data.augment,
        "meta": data.augment if data.meta_augment is None else data.meta_augment,
        "second": data.augment if data.second_augment is None else data.second_augment,
    }


def make_augment(context: RunContext, stream: str, loader: BatchLoader) -> Augment:
    """The device part of an augmentation: with crops, where the loader delivers whole stored images."""
    data = context.recipe.data
    if context.features is not None:
        return Unchanged(context.device)
    specs = augmentations(data)[stream]
    if data.train_crop == "random_resized" and not loader.crops:
        specs = [{"random_resized_crop": {"scale": list(data.crop_scale), "ratio": list(data.crop_aspect)}}, *specs]
    # Every process and each kind of batch draws from a stream of its own.
    seed = 1_000_003 * context.recipe.seed + 3 * context.reducer.rank + STREAMS.index(stream)
    return build_augment(
        specs, image_size=data.image_size, mean=data.mean, std=data.std, seed=seed, device=context.device
    )


def normaliser(context: RunContext) -> Callable[[Tensor], Tensor]:
    """Takes uint8 images to the float32 that the network sees, without augmentation; features stay as they are."""
    if context.features is not None:
        return Unchanged(context.device)
    data = context.recipe.data
    return partial(normalise, mean=data.mean, std=data.std, dtype=torch.float32)


def endless(loader: BatchLoader, start: int) -> Iterator[Batch]:
    """Batch after batch over all epochs, from batch number `start` counted from the first epoch."""
    epoch, first = divmod(start, len(loader))
    while True:
        yield from loader.epoch(epoch, first)
        epoch, first = epoch + 1, 0
