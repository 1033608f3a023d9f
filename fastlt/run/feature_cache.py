"""The features of a frozen backbone, computed once for a data set, its crops and augmentations, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import Classifier
from fastlt.models.frozen_part import content_hash
from fastlt.models.head_init import CLASS_MEAN
from fastlt.run import checkpoint
from fastlt.run.context import RunContext
from fastlt.run.features import Features
from fastlt.run.loading import EVALUATION_BATCH, check_split, make_augment, normaliser, open_loader
from fastlt.state import Batch
from fastlt.typed_yaml import to_tree
from loaders.factory import format_read
from loaders.protocol import BatchLoader
from loaders.readers.free_memory import free_share
from loaders.sources.messages import readable_bytes
from loaders.stored.damage import DamageError

log = logging.getLogger(__name__)

FOLDER = ".features"  # below the folder of runs
DECIDES = (  # keys of `data` on which features depend, beside the content of the data set
    *("image_size", "mean", "std", "train_crop", "eval_crop", "eval_ratio", "crop_scale", "crop_aspect"),
    *("augment", "meta_augment", "dali_augment"),
)
PIXELS = 2  # raised when a version of fastlt makes other pixels of the same image
ABANDONED_S = 3600.0  # since the last byte of a half-written file, after which nobody writes it
MOST_OF_MEMORY = 0.5  # of what is free on the device


def compute_features(context: RunContext, model: Classifier) -> Features:
    """The features of all images, those of training in as many views as the recipe says.

    Each view that is on disk is read; a view that is missing or damaged is computed and, by a run of one process,
    written. A stopped run goes on with the next view. ValueError when the device has no memory for all of them.
    """
    views = context.recipe.data.cached_views
    assert views is not None
    evaluated = ("meta", "test", "train") if context.recipe.model.head_init == CLASS_MEAN else ("meta", "test")
    counts = {split: len(context.dataset.labels(split)) for split in ("train", "meta", "test")}
    width = model.head.in_features
    rows = views * (counts["train"] + counts["meta"]) + sum(counts[split] for split in evaluated)
    needed = 4 * width * rows
    free = free_share(context.device, context.local_world_size)
    if needed > MOST_OF_MEMORY * free:
        raise ValueError(
            f"data.cached_views: is {views}, whose features take {readable_bytes(needed)}, and "
            f"{readable_bytes(free)} of memory are free on {context.device}: take fewer views"
        )
    source = _Source(context, model)
    training = {split: torch.stack([source.view(split, view) for view in range(views)]) for split in ("train", "meta")}
    return Features(training, {split: source.view(split, None)[None] for split in evaluated})


class _Source:
    """Where views come from: the disk, or else the backbone."""

    def __init__(self, context: RunContext, model: Classifier) -> None:
        self.context, self.model = context, model
        data = to_tree(context.recipe.data)
        self.decides = {
            "backbone": content_hash(model.backbone.state_dict()),
            "name": context.recipe.model.name,
            "pixels": PIXELS,
            "precision": context.recipe.precision,
            **{key: data[key] for key in DECIDES},
            "format": format_read(context.dataset, context.recipe.data.loader),
        }
        self.backends: dict[str, str] = {}
        self.folder = Path(context.recipe.runs) / FOLDER
        for part in self.folder.glob("*.part"):  # of a process that was killed
            with suppress(FileNotFoundError):  # another process renames or removes it
                if time.time() - part.stat().st_mtime > ABANDONED_S:
                    part.unlink()

    def view(self, split: str, view: int | None) -> Tensor:
        """One view of a split, float32 (N, D) on the device; None is the view of evaluation."""
        path = self._path(split, view)
        kept = self._read(path) if self.context.reducer.world_size == 1 else None
        if kept is not None:
            return kept
        features = self._compute(split, view)
        if self.context.reducer.world_size == 1:
            checkpoint.save(path, {"features": features.cpu()})
        return features

    def _path(self, split: str, view: int | None) -> Path:
        # Only what is drawn depends on the seed.
        # Backends draw crops of their own, and kinds of devices other augmentations.
        by = None if view is None else [view, self.context.recipe.seed, self._backend(split), self.context.device.type]
        # Data sets that differ in another split share the features of this one.
        contents = {kind: of_kind.get(split) for kind, of_kind in self.context.inputs.inputs.data.contents.items()}
        text = json.dumps([self.decides, contents, split, by], sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pt"

    def _backend(self, split: str) -> str:
        """By which the training images of a split are read."""
        if split not in self.backends:
            self.backends[split], _ = check_split(self.context, split, train=True)
        return self.backends[split]

    def _read(self, path: Path) -> Tensor | None:
        if not path.exists():
            return None
        try:
            return checkpoint.load(path, self.context.device)["features"]
        except DamageError as error:
            log.warning("%s; its features are computed again", error)
            return None

    def _compute(self, split: str, view: int | None) -> Tensor:
        context, train = self.context, view is not None
        size = min(EVALUATION_BATCH, len(context.dataset.labels(split)))
        backend = self._backend(split) if train else None
        with closing(open_loader(context, split, size, train=train, backend=backend, keep_last=True)) as loader:
            prepare = self._augment(split, view, loader) if view is not None else normaliser(context)
            features = torch.zeros(
                len(context.dataset.labels(split)), self.model.head.in_features, device=context.device
            )
            with evaluation_mode(self.model), context.autocast():
                for batch in self._shown(loader.epoch(view or 0), split, view, len(loader)):
                    features[batch.index] = self.model.features(prepare(batch.images)).float()
        context.reducer.sum_([features])  # each row is zero but on the process that has the image
        return features

    def _augment(self, split: str, view: int, loader: BatchLoader) -> Callable[[Tensor], Tensor]:
        augment = make_augment(self.context, split, loader)
        augment.generator.manual_seed(augment.generator.initial_seed() + 7_919 * (view + 1))
        return augment

    def _shown(self, batches: Iterator[Batch], split: str, view: int | None, count: int) -> Iterable[Batch]:
        which = "" if view is None else f", view {view + 1} of {self.context.recipe.data.cached_views}"
        return tqdm(batches, desc=f"features: {split}{which}", total=count, disable=not self.context.main, leave=False)
