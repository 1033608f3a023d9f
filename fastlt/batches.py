"""The loaders as an iterable for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlt.augment.draws import upload_draws
from fastlt.augment.operations import RandomResizedCrop, Shape
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.order.shard_order import ShardOrder
from loaders.protocol import BatchLoader
from loaders.stored.cached_folder import default_cache
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.remote_folder import is_url
from loaders.stored.streamed import StreamedDataset


class Batches:
    """Batches (images, labels) of one split on the device; every pass over it is the next epoch.

    class_counts: training images of every class of the data set. reason: which reader was chosen, and why.
    crop: gives what is done to each batch of an epoch before `augment`.
    Use it in a `with` statement, or call `close` at the end: readers have threads and processes.
    """

    def __init__(
        self,
        loader: BatchLoader,
        dataset: ConvertedDataset,
        crop: Callable[[int], Callable[[Tensor], Tensor]],
        augment: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.loader, self.class_counts, self.reason = loader, dataset.class_counts(), loader.reason
        self._dataset = dataset  # a streamed one keeps its files in the cache for as long as it lives
        self.crop, self.augment = crop, augment
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of `epoch`, counted from 0: for a run that goes on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        crop = self.crop(epoch)
        for batch in self.loader.epoch(epoch):
            images = crop(batch.images)
            yield (images if self.augment is None else self.augment(images)), batch.labels

    def close(self) -> None:
        """End the reader's threads and processes."""
        self.loader.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def build_loader(
    data: str | Path,
    split: str,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    train: bool | None = None,
    loader: str = "auto",
    crop: str = "none",
    image_size: int | None = None,
    sampling: str = "instance",
    augment: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    cache: str | Path | None = None,
    cache_gb: float = 100.0,
) -> Batches:
    """The batches of a split of a converted data set, as the trainer reads them.

    data: the folder that `fastlt convert` wrote, or its URL. split: "train", "meta" or "test".
    train: whether epochs are shuffled and hold full batches only; None is true of "train" and of no other split.
    loader, crop, sampling, num_workers: as the keys `data.loader`, `data.train_crop` or `data.eval_crop`,
        `stages.NAME.sampling` and `data.num_workers` of a recipe. image_size: side of what is cropped.
    augment: what is done to each uint8 batch (N, 3, H, W) on the device, such as `build_augment([...])`.
    cache, cache_gb: of a URL, as the keys of `data.stream`; it is trained on in the order of shards.
    ValueError for what does not fit together, DamageError for a data set that is not whole.
    """
    remote = is_url(str(data))
    if remote:
        folder = default_cache() if cache is None else Path(cache)
        dataset = StreamedDataset.open_url(str(data), folder, int(cache_gb * 1e9))
    else:
        dataset = ConvertedDataset.open(data)
    train = split == "train" if train is None else train
    if crop != "none" and image_size is None:
        raise ValueError(f"crop is {crop!r}: give image_size too, the side in pixels of what is cut")
    spec = CropSpec(crop, image_size or 0)
    made = make_loader(
        dataset,
        split,
        backend=loader,
        batch_size=batch_size,
        device=device,
        train=train,
        crop=spec,
        sampling=sampling,
        seed=seed,
        num_workers=num_workers,
        by_shards=ShardOrder() if remote and train and split == "train" else None,
    )
    on_device = _random_crop(spec, seed) if crop == "random_resized" and not made.crops else _none
    return Batches(made, dataset, on_device, augment)


def _none(epoch: int) -> Callable[[Tensor], Tensor]:
    return lambda images: images


def _random_crop(spec: CropSpec, seed: int) -> Callable[[int], Callable[[Tensor], Tensor]]:
    """The random crop of an epoch's batches on the device, for loaders that leave it to the device."""
    operation = RandomResizedCrop(spec.size, spec.scale, spec.aspect)

    def of_epoch(epoch: int) -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(int(np.random.default_rng([seed, epoch]).integers(1 << 63)))

        def crop(images: Tensor) -> Tensor:
            shape = Shape(len(images), *images.shape[2:], static=images.device.type != "cpu")
            return operation.apply(images.contiguous(), upload_draws(operation.draw(shape, generator), images.device))

        return crop

    return of_epoch
