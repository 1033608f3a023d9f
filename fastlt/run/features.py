"""Features of a frozen backbone in the place of images: what they are, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastlt.state import Batch, upload
from loaders.order.crop import CropSpec
from loaders.order.plan import CROP_STREAM, EpochPlan

VIEW_STREAM = CROP_STREAM + 1000  # keeps the draws of views apart from other uses of (seed, epoch)


@dataclass(frozen=True)
class Features:
    """The features of every image of a run, float32 on the device.

    training: by split, "train" and "meta", (K, N, D) of K augmented views.
    evaluation: by split, "meta", "test" and, where the head begins as class means, "train": (1, N, D) of the images
        cropped as for evaluation.
    """

    training: dict[str, Tensor]
    evaluation: dict[str, Tensor]

    def of(self, split: str, *, train: bool) -> Tensor:
        """The views of a split for training, or for evaluation."""
        return (self.training if train else self.evaluation)[split]


class FeatureLoader:
    """A BatchLoader over features on the device; each epoch shows a view of each image that is drawn for it.

    views: float32 (K, N, D). labels: int64 (N,), on the same device. The batches have the order that a loader of images
    gives them, and features (n, D, 1, 1) in the place of images.
    """

    backend = "features"
    reason = "features: of the frozen backbone, computed before"
    crops = True

    def __init__(
        self,
        views: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        train: bool,
        sampling: str = "instance",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        classes: np.ndarray | None = None,
    ) -> None:
        one = np.ones(len(labels), dtype=np.int64)
        self.views, self.labels, self.seed = views, labels, seed
        self.plan = EpochPlan(
            labels.cpu().numpy(),
            one,
            one,
            CropSpec("none"),
            batch_size,
            train,
            sampling=sampling,
            seed=seed,
            rank=rank,
            world_size=world_size,
            classes=classes,
        )
        self.batch_size, self.num_samples = batch_size, self.plan.num_samples

    def __len__(self) -> int:
        return self.plan.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader; the order is moved to the device once, and nothing waits for that."""
        count, images, width = self.views.shape
        places = self.plan.index(epoch, first_batch)
        index = upload(torch.from_numpy(places), self.views.device)
        rows = index
        if count > 1:
            drawn = np.random.default_rng([self.seed, epoch, VIEW_STREAM]).integers(count, size=images)
            rows = upload(torch.from_numpy(drawn[places] * images + places), self.views.device)
        flat = self.views.view(count * images, width, 1, 1)
        for row, of_batch in zip(rows.split(self.batch_size), index.split(self.batch_size), strict=True):
            if len(row):
                yield Batch(flat.index_select(0, row), self.labels.index_select(0, of_batch), of_batch)

    def close(self) -> None:
        """See BatchLoader; the features stay for the next loader."""
