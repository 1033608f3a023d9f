"""A_t: the top-1 accuracy of every class on the meta set, kept up to date on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from fastlt.autograd import FoldedForward
from fastlt.device.distributed import Reducer
from fastlt.device.replay import Replayable
from fastlt.models import Classifier

REFRESHES = ("exact", "rolling", "epoch")
# Up to this size the images are kept as the network takes them. CIFAR-100-LT's 1000 are 12 MB, ImageNet-LT's 10,000
# would be 6 GB and are prepared batch by batch.
PREPARED_BYTES = 256 * 2**20
# Up to this size the features of all images are kept, while the backbone stays as it is. 10,000 of ViT-B's are 31 MB.
FEATURE_BYTES = 256 * 2**20
# Images a pass from which folding BatchNorm pays. ResNet-32 on an AMD EPYC core, 32 px, times faster than without:
# NCHW 0.96 with 10 images, 1.07 with 100, 1.11 with 1000; channels_last 0.97, 1.10, 1.08.
FOLD_FROM = 64


@contextmanager
def evaluation_mode(model: nn.Module):
    """Inside, every module is in eval mode and nothing is recorded; afterwards each is in the mode it was in."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _stays(backbone: nn.Module) -> bool:
    """Whether training leaves a backbone as it is: no parameter is trained, and no statistics follow the batches."""
    moves = (isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in backbone.modules())
    return not any(p.requires_grad for p in backbone.parameters()) and not any(moves)


def stratified_order(labels: Tensor) -> Tensor:
    """Indices that go round the classes: the first image of each class, then the second of each, and so on.

    Any contiguous slice then holds every class about equally often. labels: int64 (M,). Returns int64 (M,).
    """
    by_class = torch.argsort(labels, stable=True)
    sorted_labels = labels[by_class]
    start = torch.searchsorted(sorted_labels, sorted_labels)
    rank = torch.arange(len(labels), device=labels.device) - start
    return by_class[torch.argsort(rank, stable=True)]


class ClassAccuracy(Replayable):
    """Scores the meta set with the current network and reports the accuracy of each class.

    images: uint8 (M, 3, H, W) on the device; labels: int64 (M,). Each process keeps a share of them and the counts
    are summed over processes. Per-image results stay on the device; nothing here waits for it. Where nothing below the
    head is trained, the features of the images are computed once.
    prepare: uint8 images -> what the network takes, image by image. autocast: makes the context of the forward passes.

    refresh: how much of the meta set is scored when `update` is called once an iteration.
        exact: all of it (step 2 of Algorithm 1).
        rolling: one class-stratified slice of `window`, after a full pass; no result is older than `window` calls.
        epoch: all of it in the first call after `start_epoch`, as in the authors' release.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        prepare: Callable[[Tensor], Tensor],
        refresh: str = "exact",
        window: int = 10,
        batch_size: int = 1024,
        reducer: Reducer | None = None,
        autocast: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        assert refresh in REFRESHES, refresh
        assert window >= 1, window
        self.reducer = reducer or Reducer()
        total = torch.bincount(labels, minlength=num_classes)
        if (total == 0).any():
            missing = torch.nonzero(total == 0).flatten().tolist()
            raise ValueError(
                f"the meta set has no image of {len(missing)} classes (the first are {missing[:5]}); "
                "every class needs at least one: its accuracy is an input of the method"
            )
        mine = stratified_order(labels)[self.reducer.rank :: self.reducer.world_size]
        self.images = images[mine].contiguous(memory_format=torch.channels_last)
        self.labels = labels[mine]
        self.total = total
        self.num_classes = num_classes
        self.prepare, self.autocast = self._prepared(prepare), autocast or torch.no_grad
        self.folded: FoldedForward | None = None
        self.features: Tensor | None = None  # (M, D), of the backbone in the state that `features_of` names
        self.features_of: Hashable = None
        self.refresh, self.window, self.batch_size = refresh, window, batch_size
        self.correct = torch.zeros(len(mine), dtype=torch.float32, device=images.device)
        self.latest = torch.zeros(num_classes, dtype=torch.float32, device=images.device)
        self.stale = False  # whether `latest` is not what `correct` says
        self.calls = 0
        self.due = True

    def start_epoch(self) -> None:
        """Tell `refresh: epoch` that the next call has to score the meta set again."""
        self.due = True

    def update(self, model: nn.Module) -> Tensor:
        """Score what is due with `model` in eval mode, its buffers untouched, and return A: float32 (C,) in [0, 1]."""
        part = self.due_part()
        if part is not None:
            self._score(model, *part)
        if part is not None or self.stale:
            self.latest.copy_(self.accuracy())
        self.advance()
        return self.latest.clone()

    def due_part(self) -> tuple[int, int] | None:
        """Which images (of this process, in its order) the next `update` scores, from and to; None for none at all."""
        size = len(self.labels)
        if self.refresh == "exact" or self.due:
            return 0, size
        if self.refresh == "epoch":
            return None
        # Slice boundaries k*M/K differ in size by one at most and cover every image once in K calls.
        k = self.calls % self.window
        return k * size // self.window, (k + 1) * size // self.window

    def variant(self) -> Hashable:
        part = self.due_part()
        return part, part is None and self.stale

    def advance(self) -> None:
        """Count one `update`."""
        self.due = self.stale = False
        self.calls += 1

    def counters(self) -> tuple[int, bool, bool]:
        return self.calls, self.due, self.stale

    def set_counters(self, counters: tuple[int, bool, bool]) -> None:
        self.calls, self.due, self.stale = counters

    def of(self, model: nn.Module) -> Tensor:
        """A of another model: float32 (C,). What `accuracy` reports stays the results of the model that is trained."""
        kept = self.correct.clone()
        self._score(model, 0, len(self.labels))
        accuracy = self.accuracy()
        self.correct.copy_(kept)
        return accuracy

    def accuracy(self) -> Tensor:
        """A from the latest result of every image: float32 (C,)."""
        correct = torch.zeros(self.num_classes, device=self.correct.device).index_add_(0, self.labels, self.correct)
        self.reducer.sum_([correct])
        return correct / self.total

    def _prepared(self, prepare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Prepare all images now, if they fit; returns what is left to do with a batch of them.

        On a CPU that saves 0.1 % of a pass (ResNet-32; 1 % with 10 images), on a GPU a few launches a batch.
        """
        one = prepare(self.images[:1])
        if one.numel() * one.element_size() * len(self.labels) > PREPARED_BYTES:
            return prepare
        self.images = prepare(self.images)
        return lambda images: images

    def _score(self, model: nn.Module, start: int, stop: int) -> None:
        if start == stop:
            return
        features = self._frozen_features(model)
        if features is not None:
            assert isinstance(model, Classifier)
            with evaluation_mode(model), self.autocast():
                logits = model.head(model.dropout(features[start:stop]))
                self.correct[start:stop] = (logits.argmax(1) == self.labels[start:stop]).float()
            return
        with evaluation_mode(model), self.autocast(), self._forward(model, stop - start) as forward:
            for first in range(start, stop, self.batch_size):
                part = slice(first, min(first + self.batch_size, stop))
                logits = forward(self.prepare(self.images[part]))
                self.correct[part] = (logits.argmax(1) == self.labels[part]).float()

    def _frozen_features(self, model: nn.Module) -> Tensor | None:
        """The features of all images under a backbone that is not trained; None where one is, or they are too large.

        Computed again whenever anything has written to the backbone since.
        """
        # Experts route images by their logits, so that their features are not all that the head needs.
        if (
            not isinstance(model, Classifier)
            or type(model).forward is not Classifier.forward
            or not _stays(model.backbone)
        ):
            return None
        tensors = [*model.backbone.parameters(), *model.backbone.buffers()]
        state = tuple((id(t), t._version) for t in tensors)
        # What is captured is replayed with the features that are there: they were computed before, in this state.
        captured = self.images.is_cuda and torch.cuda.is_current_stream_capturing()
        if self.features_of == state or (captured and self.features is not None):
            return self.features
        with evaluation_mode(model), self.autocast():
            one = model.features(self.prepare(self.images[:1]))
            if one.numel() * one.element_size() * len(self.images) > FEATURE_BYTES:
                return None
            if self.features is None:
                self.features = one.new_empty(len(self.images), *one.shape[1:])
            # Into the same memory: a captured iteration may read it.
            for start in range(0, len(self.images), self.batch_size):
                part = slice(start, start + self.batch_size)
                self.features[part] = model.features(self.prepare(self.images[part]))
        self.features_of = state
        return self.features

    @contextmanager
    def _forward(self, model: nn.Module, count: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """The eval pass of `model` for `count` images in all, with BatchNorm folded where there are enough of them.

        The plan for it is made once, on one image whose logits are not used: a resumed run gets the same results.
        """
        if count < FOLD_FROM:
            yield model
            return
        if self.folded is None or self.folded.model is not model:
            self.folded = FoldedForward(model, self.prepare(self.images[:1]))
        with self.folded.weights():
            yield self.folded

    def state_dict(self) -> dict:
        """The latest result of every image of this process and the position in the round of slices."""
        return {"correct": self.correct.clone(), "calls": self.calls, "due": self.due}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        self.correct.copy_(state["correct"])
        self.calls, self.due, self.stale = state["calls"], state["due"], True
