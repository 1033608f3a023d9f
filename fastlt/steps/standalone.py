"""A step for a training loop of one's own: any network, optimizer and source of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlt.augment import Augment
from fastlt.device.distributed import Reducer
from fastlt.losses import PerSampleLoss, build_loss
from fastlt.meta.bounded_accuracy import class_accuracy
from fastlt.meta.class_accuracy import REFRESHES, ClassAccuracy, evaluation_mode
from fastlt.models import Classifier
from fastlt.names import pick, unknown
from fastlt.optim import PRECONDITIONERS
from fastlt.state import Batch, ClassCounts, StepOutput, upload
from fastlt.steps import STEPS
from fastlt.steps.base import Step, StepParts
from fastlt.steps.learned_weights import LearnedWeightStep
from fastlt.steps.meta import MetaOptions, MetaStep, refuse_recomputation
from fastlt.typed_yaml import build

# Those that train any network as it is: no head of ours, no second view of an image, no stage before.
METHODS = ("plain", "difficulty", "sample_difficulty", "mwn", "cb_da", "cdb", "mixup", "cutmix")

Loss = str | PerSampleLoss | Callable[[Tensor, Tensor], Tensor]


class TrainingStep:
    """One iteration of a method, `step(images, labels)`: forward, backward, and the optimizer's step.

    Made by `build_step`. The trainer's own step does the work.
    """

    def __init__(self, step: Step[Any], meta: MetaBatches | None) -> None:
        self.step, self.meta = step, meta
        self.device = step.parameters[0].device

    def __call__(
        self, images: Tensor, labels: Tensor, meta_images: Tensor | None = None, meta_labels: Tensor | None = None
    ) -> StepOutput:
        """Train on one batch.

        images: float (N, 3, H, W) as the network takes them; labels: int64 (N,). On any device; they are brought to the
        network's. meta_images, meta_labels: a meta batch of the same kind; without them one is drawn from the meta set.
        Changes the network and the optimizer, whose gradients are None afterwards; does not wait for the device.
        `output.loss` is 0-d, `output.per_class["weight"]` (C,), for methods that have them.
        """
        meta_batch = None
        if self.step.uses_meta_batch():
            if meta_images is None or meta_labels is None:
                meta_batch = self._drawn(len(labels))
            else:
                meta_batch = self._batch(meta_images, meta_labels)
        return self.step(self._batch(images, labels), meta_batch)

    def start_epoch(self, epoch: int) -> None:
        """Tell losses that change over time, and `refresh="epoch"`, that an epoch begins; counted from 0."""
        self.step.start_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """All that the next iteration depends on, the network and the optimizer among it."""
        return {"step": self.step.state_dict(), "meta": None if self.meta is None else self.meta.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.step.load_state_dict(state["step"])
        if self.meta is not None:
            self.meta.load_state_dict(state["meta"])

    def _drawn(self, size: int) -> Batch:
        assert self.meta is not None, "build_step asks for the meta set of every method that takes meta batches"
        return self.meta.draw(size)

    def _batch(self, images: Tensor, labels: Tensor) -> Batch:
        if not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype}: the step takes them as the network does, normalised floats; "
                "fastlt.build_augment([...]) makes them of uint8 images"
            )
        labels = upload(labels, self.device)
        return Batch(upload(images, self.device), labels, torch.arange(len(labels), device=self.device))


class MetaBatches:
    """Random batches of a meta set in memory: one random order after the other, each cut into whole batches.

    As with the trainer's loader, images that fill no batch at the end of an order are left out of it.

    images: (M, ...), labels: int64 (M,), both on the device. size: of a batch; None is that of the training batch.
    """

    def __init__(self, images: Tensor, labels: Tensor, size: int | None, seed: int) -> None:
        self.images, self.labels, self.size = images, labels, size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def draw(self, size: int) -> Batch:
        """The next batch, of `size` images unless the constructor got another number. Moves the state on."""
        size = min(self.size or size, len(self.labels))
        if len(self.order) < size:
            self.order = torch.randperm(len(self.labels), generator=self.generator)
        chosen, self.order = upload(self.order[:size], self.images.device), self.order[size:]
        return Batch(self.images[chosen], self.labels[chosen], chosen)

    def state_dict(self) -> dict[str, Tensor]:
        """The images that are still to come, and the generator's state."""
        return {"order": self.order, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        self.order = state["order"].cpu()
        self.generator.set_state(state["generator"].cpu())


def build_step(
    method: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    class_counts: ClassCounts | Sequence[int],
    *,
    loss: Loss = "cross_entropy",
    meta_set: Iterable[tuple[Tensor, Tensor]] | None = None,
    meta_batch_size: int | None = None,
    refresh: str = "exact",
    window: int = 10,
    images_per_step: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    seed: int = 0,
    **options: Any,
) -> TrainingStep:
    """A method for a training loop of one's own; `step(images, labels)` takes one iteration.

    method: "difficulty" is Difficulty-Net; the others are those of METHODS.
    model: images to logits (N, C), on its device. Not wrapped in DistributedDataParallel: the step averages gradients
        over the processes of torch.distributed itself.
    optimizer: any of torch, of all parameters that the model trains and of no others. The lookahead takes its learning
        rate, which a schedule may change. Groups with other rates keep their ratio to the first.
    class_counts: training images of every class.
    loss: a name of fastlt's, a loss of `build_loss`, or a function of (logits, labels) to one loss a sample.
    meta_set: batches (images, labels) of held-out images, as many of every class, as the network takes them and not
        augmented, such as a DataLoader of the validation set. Gone through once, and kept on the device. A class
        without an image counts as one of mean accuracy.
    meta_batch_size: images of a meta batch; None is as many as the training batch has.
    refresh, window: how much of the meta set is scored in an iteration, see `ClassAccuracy`.
    images_per_step: with refresh="rolling", the most images that an iteration scores, see `BoundedAccuracy`.
    autocast: makes the context of forward passes, such as `lambda: torch.autocast("cuda", torch.bfloat16)`.
    seed: of the meta batches.
    options: of the method, see docs/recipes.md; values as in a recipe, such as approximate={"every": 2}.
    ValueError for what does not fit together.
    """
    kind = pick("method", method, {name: STEPS[name] for name in METHODS})
    made = build(kind.Options, options)
    scored = _scored(refresh, window, images_per_step)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model is wrapped in DistributedDataParallel: give model.module, the step averages gradients")
    _check_parameters(model, optimizer)
    if issubclass(kind, MetaStep) and kind.takes_meta_batches(made):
        refuse_recomputation(model)
    counts = class_counts if isinstance(class_counts, ClassCounts) else ClassCounts.of(class_counts)
    device = next(p for p in model.parameters() if p.requires_grad).device
    reducer = Reducer(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Reducer()
    accuracy = meta = None
    if kind.takes_meta_batches(made) or kind.needs.class_accuracy:
        if meta_set is None:
            raise ValueError(f"method {method} needs a meta_set: batches (images, labels) of held-out images")
        images, labels = _together(meta_set, counts, device)
        _check_logits(model, images, counts)
        meta = MetaBatches(images, labels, meta_batch_size, seed + reducer.rank)
        if kind.needs.class_accuracy:
            accuracy = scored(images, labels, counts.num_classes, reducer=reducer, autocast=autocast)
    preconditions = isinstance(made, MetaOptions) and made.preconditions(type(optimizer))
    if preconditions and type(optimizer) not in PRECONDITIONERS:
        raise ValueError(
            f"lookahead is 'preconditioned', and {type(optimizer).__name__} has no diagonal preconditioner; take "
            "lookahead='sgd'"
        )
    _set_relative_rates(optimizer)
    parts = StepParts(
        model=cast("Classifier", model),  # these methods call it, and ask for its parameters and buffers
        loss=_per_sample(loss, counts).to(device),
        optimizer=optimizer,
        augment=AsGiven(device),
        meta_augment=AsGiven(device) if kind.takes_meta_batches(made) else None,
        class_counts=counts,
        class_accuracy=accuracy,
        autocast=autocast,
        reducer=reducer,
    )
    step = kind(parts, made)
    if reducer.world_size > 1 and isinstance(step, LearnedWeightStep):
        for parameter in step.net.parameters():  # the processes may have drawn different ones
            dist.broadcast(parameter.data, 0)
    return TrainingStep(step, meta)


class AsGiven(Augment):
    """No augmentation: images come from the caller as the network takes them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__((), (0.0,) * 3, (1.0,) * 3, 0, device)

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return images


class OwnLoss(PerSampleLoss):
    """A function of (logits, labels) as a loss."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = self.function(logits, labels)
        if losses.shape != labels.shape:
            raise ValueError(
                f"the loss gives {tuple(losses.shape)} for {len(labels)} samples: the method weights samples, so it "
                'takes one loss each, as torch\'s losses give with reduction="none"'
            )
        return losses


def _per_sample(loss: Loss, counts: ClassCounts) -> PerSampleLoss:
    if isinstance(loss, str):
        return build_loss(loss, counts)
    return loss if isinstance(loss, PerSampleLoss) else OwnLoss(loss)


def _scored(refresh: str, window: int, images_per_step: int | None) -> Callable[..., ClassAccuracy]:
    """`class_accuracy` with these settings, of images as the network takes them."""
    if refresh not in REFRESHES:
        raise ValueError(unknown("refresh", refresh, REFRESHES))
    if images_per_step is not None and (refresh != "rolling" or images_per_step < 1):
        raise ValueError(f"images_per_step is {images_per_step}: give 1 or more, with refresh='rolling'")
    settings = {"refresh": refresh, "window": window, "images_per_step": images_per_step}
    return partial(class_accuracy, prepare=lambda images: images, **settings)


def _set_relative_rates(optimizer: torch.optim.Optimizer) -> None:
    """Note in every group but the first its rate over that of the first, as "lr_factor", unless one is there."""
    groups = optimizer.param_groups
    # A schedule that warms up from 0 keeps the rates themselves as initial_lr.
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    for group, rate in zip(groups[1:], rates[1:], strict=True):
        if rates[0] == 0:
            raise ValueError("the optimizer's first group has lr 0, and the rates of the others count in its rate")
        group.setdefault("lr_factor", rate / rates[0])


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ValueError unless the optimizer has the parameters that the model trains, and no others."""
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    given = {p for group in optimizer.param_groups for p in group["params"]}
    forgotten = [name for p, name in trained.items() if p not in given]
    foreign = [p for p in given if p not in trained]
    if not trained:
        raise ValueError("model trains no parameter: every one has requires_grad=False")
    if forgotten:
        raise ValueError(
            f"optimizer has not {forgotten[0]!r} and {len(forgotten) - 1} more of the parameters that the model "
            "trains: give them all, or freeze those with requires_grad_(False)"
        )
    if foreign:
        raise ValueError(
            f"optimizer has {len(foreign)} parameters that the model does not train, the first of shape "
            f"{tuple(foreign[0].shape)}: the step would not move them; give them an optimizer of their own"
        )


def _together(
    batches: Iterable[tuple[Tensor, Tensor]], counts: ClassCounts, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All images and labels of an iterable of batches, on the device."""
    pairs = [tuple(batch) if isinstance(batch, (tuple, list)) else () for batch in batches]
    if not pairs or any(len(pair) != 2 or not all(isinstance(t, Tensor) for t in pair) for pair in pairs):
        raise ValueError(
            "meta_set gives no batches (images, labels) of tensors: give a DataLoader, or [(images, labels)]"
        )
    images, labels = (torch.cat(part).to(device) for part in zip(*pairs, strict=True))
    if not images.is_floating_point():
        raise ValueError(f"meta_set has {images.dtype} images: give them as the network takes them, normalised floats")
    if labels.dtype != torch.int64 or int(labels.max()) >= counts.num_classes or int(labels.min()) < 0:
        raise ValueError(f"meta_set has labels that are not int64 from 0 to {counts.num_classes - 1}")
    return images, labels


def _check_logits(model: nn.Module, images: Tensor, counts: ClassCounts) -> None:
    """ValueError unless the model gives one logit a class."""
    with evaluation_mode(model):
        logits = model(images[:1].clone())  # some networks overwrite what they are given
    if not isinstance(logits, Tensor) or logits.shape != (1, counts.num_classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model gives {shape} for one image: class_counts has {counts.num_classes} classes")
