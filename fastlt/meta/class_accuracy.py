"""A_t: the top-1 accuracy of every class on the meta set, kept up to date on the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.autograd import FoldedForward
from fastlt.device.distributed import Reducer
from fastlt.device.replay import Replayable
from fastlt.meta.frozen_prefix import FrozenPrefix, find_prefix, moving_statistics

REFRESHES = ("exact", "rolling", "epoch")
Part = slice | Tensor  # images of a process, by their places in its order: int64 (n,) on the device
# Up to this size the images are kept as the network takes them. CIFAR-100-LT's 1000 are 12 MB, ImageNet-LT's 10,000
# would be 6 GB and are prepared batch by batch.
PREPARED_BYTES = 256 * 2**20
# Up to this size the outputs of the part that is not trained are kept. 10,000 images have 31 MB of ViT-B's features,
# 1,000 have 151 MB behind a block of ViT-Tiny.
KEPT_BYTES = 256 * 2**20
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


def stratified_order(labels: Tensor) -> Tensor:
    """Indices that go round the classes: the first image of each class, then the second of each, and so on.

    Any contiguous slice then holds every class about equally often. labels: int64 (M,). Returns int64 (M,).
    """
    by_class = torch.argsort(labels, stable=True)
    sorted_labels = labels[by_class]
    start = torch.searchsorted(sorted_labels, sorted_labels)
    rank = torch.arange(len(labels), device=labels.device) - start
    return by_class[torch.argsort(rank, stable=True)]


def shares(correct: Tensor, total: Tensor, absent: Tensor) -> Tensor:
    """correct / total (C,); classes where `absent`, bool (C,), have the mean of the others."""
    known = correct / total.clamp_min(1)  # 0 for absent classes
    return torch.where(absent, known.sum() / (~absent).sum(), known)


def redistributed_results(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """The `ClassAccuracy.state_dict` of process `rank` of `world_size`, of those that other processes had, by rank.

    Every image keeps its latest result. With `refresh: rolling` an image at the edge of a slice may once be scored one
    call later than the window says.
    """
    found = dict(states[0])
    for name, of_first in states[0].items():
        if isinstance(of_first, Tensor):  # of each image of a process, as its share is taken in ClassAccuracy
            values = of_first.new_empty(sum(len(state[name]) for state in states))
            for place, state in enumerate(states):
                values[place :: len(states)] = state[name]
            found[name] = values[rank::world_size].clone()
    return found


class ClassAccuracy(Replayable):
    """Scores the meta set with the current network and reports the accuracy of each class.

    images: uint8 (M, 3, H, W) on the device, or a function that reads a process's share of them: it is given the order
    int64 (M,) of all, and returns those at every `world_size`-th place, from its rank on. labels: int64 (M,) on the
    device. Each process keeps its share, and the counts are summed over processes. Per-image results stay on the
    device; nothing here waits for it. What the network makes of the images before its first trained parameter is
    computed once.
    A class without an image in the meta set has the mean accuracy of the others: where nothing is known of a class, it
    is taken to be as difficult as the average one.
    prepare: uint8 images -> what the network takes, image by image. autocast: makes the context of the forward passes.
    shown: goes through the batches of a first pass over all images, as `tqdm` does.

    refresh: how much of the meta set is scored when `update` is called once an iteration.
        exact: all of it (step 2 of Algorithm 1).
        rolling: one class-stratified slice of `window`, after a full pass; no result is older than `window` calls.
        epoch: all of it in the first call after `start_epoch`, as in the authors' release.
    """

    def __init__(
        self,
        images: Tensor | Callable[[Tensor], Tensor],
        labels: Tensor,
        num_classes: int,
        *,
        prepare: Callable[[Tensor], Tensor],
        refresh: str = "exact",
        window: int = 10,
        batch_size: int = 1024,
        reducer: Reducer | None = None,
        autocast: Callable[[], AbstractContextManager[object]] | None = None,
        shown: Callable[[Sequence[slice]], Iterable[slice]] = iter,
    ) -> None:
        assert refresh in REFRESHES, refresh
        assert window >= 1, window
        self.reducer = reducer or Reducer()
        total = torch.bincount(labels, minlength=num_classes)
        absent = total == 0
        self.absent = absent if absent.any() else None
        order = stratified_order(labels)
        mine = order[self.reducer.rank :: self.reducer.world_size]  # see `redistributed_results`
        share = images[mine] if isinstance(images, Tensor) else images(order)
        self.images = share.contiguous(memory_format=torch.channels_last)
        self.labels = labels[mine]
        self.total = total
        self.num_classes = num_classes
        self.prepare, self.autocast = self._prepared(prepare), autocast or torch.no_grad
        self.folded: FoldedForward | None = None
        self.searched: nn.Module | None = None  # the model that `prefix` belongs to
        self.tried: nn.Module | None = None  # the model of which `overwrites` is known
        self.overwrites: bool | None = None  # whether it writes into the images that it is given; None: not known
        self.given: Tensor | None = None  # by which that is found out
        self.prefix: FrozenPrefix | None = None
        self.kept: Tensor | None = None  # its outputs for all images, in the state `kept_of`
        self.kept_of: Hashable = None
        self.refresh, self.window, self.batch_size, self.shown = refresh, window, batch_size, shown
        self.correct = torch.zeros(len(mine), dtype=torch.float32, device=labels.device)
        self.latest = torch.zeros(num_classes, dtype=torch.float32, device=labels.device)
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
            batches = self._batches(*part)
            self._score(model, self.shown(batches) if self.due else batches, part[1] - part[0])
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

    def advice(self) -> Sequence[str]:
        """What the user is told of it at the start of a stage."""
        return ()

    def of(self, model: nn.Module) -> Tensor:
        """A of another model: float32 (C,). What `accuracy` reports stays the results of the model that is trained."""
        kept = self.correct.clone()
        self._score(model, self._batches(0, len(self.labels)), len(self.labels), keeps=False)
        accuracy = self.accuracy()
        self.correct.copy_(kept)
        return accuracy

    def accuracy(self) -> Tensor:
        """A from the latest result of every image: float32 (C,)."""
        correct = self._by_class(self.correct)
        self.reducer.sum_([correct])
        return correct / self.total if self.absent is None else shares(correct, self.total, self.absent)

    def _by_class(self, values: Tensor) -> Tensor:
        """The sums over the images of each class (C,) of a value for every image of this process."""
        return values.new_zeros(self.num_classes).index_add_(0, self.labels, values)

    def _prepared(self, prepare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Prepare all images now, if they fit; returns what is left to do with a batch of them.

        On a CPU that saves 0.1 % of a pass (ResNet-32; 1 % with 10 images), on a GPU a few launches a batch.
        """
        one = prepare(self.images[:1])
        if one.numel() * one.element_size() * len(self.labels) > PREPARED_BYTES:
            return prepare
        self.images = prepare(self.images)
        return lambda images: images

    def _batches(self, start: int, stop: int) -> list[slice]:
        firsts = range(start, stop, self.batch_size)
        return [slice(first, min(first + self.batch_size, stop)) for first in firsts]

    def _score(self, model: nn.Module, parts: Iterable[Part], count: int, *, keeps: bool = True) -> None:
        """Keep for each of the `count` images in `parts` whether it is classified right."""
        if not count:
            return
        if self.tried is not model:
            self.tried, self.overwrites = model, None
        kept = self._kept_outputs(model) if keeps else None
        with evaluation_mode(model), self.autocast(), self._forward(model, count, kept) as logits_of:
            for part in parts:
                logits = logits_of(part)
                self.correct[part] = (logits.argmax(1) == self.labels[part]).float()
        if self.overwrites is None and self.given is not None:
            self.overwrites, self.given = self.given._version > 0, None

    def _one_image(self) -> Tensor:
        """A copy of the first image, as the network takes it."""
        return self.prepare(self.images[:1]).clone()

    def _inputs(self, part: Part) -> Tensor:
        """What the network takes of a part."""
        images = self.images[part]
        if isinstance(part, slice) and self.overwrites is not False:  # those that are kept must not change
            images = self.given = images.clone()
        return self.prepare(images if isinstance(part, slice) else images.contiguous(memory_format=torch.channels_last))

    @contextmanager
    def _forward(self, model: nn.Module, count: int, kept: Tensor | None) -> Iterator[Callable[[Part], Tensor]]:
        """The eval pass of `model` for a part of `count` images, from the outputs that are kept if there are any.

        BatchNorm is folded where there are enough images. The plan for it is made once, on one image whose logits are
        not used: a resumed run gets the same results.
        """
        if kept is not None:
            assert self.prefix is not None
            prefix = self.prefix
            yield lambda part: prefix(self._inputs(part), kept[part])
            return
        if count < FOLD_FROM:
            yield lambda part: model(self._inputs(part))
            return
        if self.folded is None or self.folded.model is not model:
            self.folded = FoldedForward(model, self._one_image())
        folded = self.folded
        with folded.weights():
            yield lambda part: folded(self._inputs(part))

    def _kept_outputs(self, model: nn.Module) -> Tensor | None:
        """The outputs of the frozen prefix of `model` for all images; None where there is none, or no room.

        Computed again whenever something has written to the prefix since.
        """
        if self.searched is not model:
            moving = moving_statistics(model)
            with evaluation_mode(model), self.autocast():
                self.prefix = find_prefix(model, moving, self._one_image())
            self.searched, self.kept, self.kept_of = model, None, None
        prefix = self.prefix
        if prefix is None or prefix.one.numel() * prefix.one.element_size() * len(self.images) > KEPT_BYTES:
            return None
        # What is captured is replayed with the outputs that are there: they were computed before, in this state.
        captured = self.images.is_cuda and torch.cuda.is_current_stream_capturing()
        state = prefix.state()
        if self.kept is None or (self.kept_of != state and not captured):
            if self.kept is None:
                self.kept = prefix.one.new_empty(len(self.images), *prefix.one.shape[1:])
            with evaluation_mode(model), self.autocast():
                # Into the same memory: a captured iteration may read it.
                for part in self.shown(self._batches(0, len(self.images))):
                    self.kept[part] = prefix.outputs(self._inputs(part))
            self.kept_of = state
        return self.kept

    def state_dict(self) -> dict:
        """The latest result of every image of this process and the position in the round of slices."""
        return {"correct": self.correct.clone(), "calls": self.calls, "due": self.due}

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        self.correct.copy_(state["correct"])
        self.calls, self.due, self.stale = state["calls"], state["due"], True
