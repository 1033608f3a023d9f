"""Common to all steps: one forward of the training batch, one descent on the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypeVar

from fastlt.augment import Augment
from fastlt.device.compiled import Compiler, capturable, laid_out, load_optimizer
from fastlt.device.distributed import Reducer
from fastlt.device.gradients import mean_gradients
from fastlt.device.replay import Replayable
from fastlt.losses import PerSampleLoss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import Classifier
from fastlt.models.trained_state import load_trained_state, trained_state
from fastlt.optim import Clip
from fastlt.ranges import check_ranges
from fastlt.state import Batch, ClassCounts, StepOutput
from fastlt.steps.needs import Allows, LogitsPrior, Needs
from fastlt.steps.settings import RecipeSettings, StageSettings


@dataclass(frozen=True)
class StageModel:
    """What an earlier stage left: its model, frozen and in eval mode, and the classes it trained on, bool (C,)."""

    model: Classifier
    classes: np.ndarray


@dataclass
class StepParts:
    """What a step is built from; the trainer makes these, the step owns them from then on.

    loss: per-sample loss, (logits (b, C), labels (b,)) -> (b,).
    augment, meta_augment: uint8 (N, 3, H, W) -> normalised float, for the training and the meta batch.
    second_augment: likewise for the second view of a training batch; None for methods that do not need one.
    training_images: goes once over this process's share of the training set, each image once in split order and
        cropped and normalised as for evaluation: (float (N, 3, H, W), labels (N,)), on the device; None for methods
        that do not need them.
    class_accuracy: A on the meta set; None for methods that do not need it.
    autocast: makes the context in which forward passes run (mixed precision); losses come out in float32.
    seed: of the run: of what a step draws by itself, the same on every process.
    compiler: what the step's forward, backward and tangent passes are compiled by.
    trained_classes: bool (C,), the classes whose images the batches hold; None for all of them.
    clip: how gradients are clipped before the optimizer's step; None is not at all.
    accumulate: the number of micro-batches whose gradients make the step of one batch.
    stage_models: of the earlier stages that the method's `models_of_stages` names.
    """

    model: Classifier
    loss: PerSampleLoss
    optimizer: torch.optim.Optimizer
    augment: Augment
    meta_augment: Augment | None
    class_counts: ClassCounts
    class_accuracy: ClassAccuracy | None = None
    second_augment: Augment | None = None
    training_images: Callable[[], Iterator[tuple[Tensor, Tensor]]] | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    reducer: Reducer = field(default_factory=Reducer)
    seed: int = 0
    compiler: Compiler = field(default_factory=Compiler)
    trained_classes: np.ndarray | None = None
    clip: Clip | None = None
    accumulate: int = 1
    stage_models: dict[str, StageModel] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOptions:
    """Recipe options of a method: none, where it has none of its own.

    ValueError for a number out of the range that its field states.
    """

    def __post_init__(self) -> None:
        check_ranges(self)


class GradientSum:
    """Objectives and their gradients, added up one after the other; with the last, gradients are means over processes.

    number: of objectives. value: 0-d. gradients: one tensor a parameter, zeros where unused. Both are constants.
    """

    value: Tensor

    def __init__(self, reducer: Reducer, parameters: Sequence[Tensor], number: int) -> None:
        self.reducer, self.parameters, self.left = reducer, parameters, number
        self.gradients: list[Tensor] = []

    def add(self, objective: Tensor) -> None:
        """Add an objective (0-d) and its gradient; frees its graph."""
        first, self.left = not self.gradients, self.left - 1
        reducer = Reducer() if self.left else self.reducer
        self.gradients = mean_gradients(reducer, objective, self.parameters, added_to=self.gradients or None)
        self.value = objective.detach() if first else self.value + objective.detach()


OptionsT = TypeVar("OptionsT", bound=StepOptions, default=StepOptions)


class Step(Replayable, Generic[OptionsT]):
    """One training iteration: `step(batch, meta_batch) -> StepOutput`, with everything it has to remember.

    Subclasses implement `__call__`, name the class of their recipe options twice, as `Step[…]` for the type checker and
    as `Options` for the recipe, and say what they need. A method that trains a part of the model only, or changes it
    first, overrides `prepare_model`, `parameter_groups` and `set_train_mode`; the run calls them in this order.

    needs, allows: what a recipe and the trainer have to know of a method before they make a step.
    logits_prior: what those who use its models have to know of their logits.
    plain_steps: about the time of an iteration over that of method plain, see `time_of`.
    """

    needs = Needs()
    allows = Allows()
    logits_prior = LogitsPrior()
    plain_steps = 1.0

    Options: type[StepOptions] = StepOptions

    def __init__(self, parts: StepParts, options: OptionsT | None = None) -> None:
        self.parts = parts
        # `Options` is the class that the step is generic in; a class attribute's type cannot say so.
        self.options: OptionsT = options or cast("OptionsT", self.Options())
        self.model, self.loss = parts.model, parts.loss
        self.optimizer, self.reducer = parts.optimizer, parts.reducer
        self.parameters = [p for p in parts.model.parameters() if p.requires_grad]
        self.epoch = 0
        model, loss = parts.model, parts.loss
        self.compiled_losses = parts.compiler(lambda images, labels: loss(model(images), labels))

    # Asked of the class, before a step is made: while the recipe is checked, then with the model of the stage.

    @classmethod
    def check_stage(cls, options: OptionsT, stage: StageSettings, recipe: RecipeSettings) -> list[str]:
        """What the method does not allow about its stage of the recipe: "key: advice", one entry a mistake.

        options: the stage's, as in the methods below.
        """
        return []

    @classmethod
    def time_of(cls, options: OptionsT) -> float:
        """About the time of an iteration over that of method plain; the shortest runs of a table go first by it."""
        return cls.plain_steps

    @classmethod
    def takes_meta_batches(cls, options: OptionsT) -> bool:
        """Whether a stage with these options ever looks at a meta batch; without, none is loaded."""
        return cls.needs.meta_batch

    @classmethod
    def follows(cls, options: OptionsT, stage: StageSettings) -> list[str]:
        """What the method takes where the recipe leaves the choice open, in words: "key is value, why"."""
        return []

    @classmethod
    def check_model(cls, model: Classifier, options: OptionsT) -> None:
        """ValueError for options that do not fit the network, which the recipe alone does not tell."""

    @classmethod
    def prepare_model(cls, model: Classifier, options: OptionsT, *, seed: int) -> None:
        """Change `model` in place for this stage: replace modules, freeze parameters.

        By default everything is trained but what the recipe keeps, see `Classifier.unfreeze`.

        Called before the optimizer is built, and once more when a run resumes in a later stage: what it builds follows
        from the model's structure and the seed, and trained values are loaded over it afterwards.
        """
        model.unfreeze()

    @classmethod
    def set_train_mode(cls, model: Classifier, options: OptionsT) -> None:
        """Put each module of a prepared `model` into the mode it is trained in."""
        model.train()

    @classmethod
    def parameter_groups(cls, model: Classifier, options: OptionsT) -> list[dict[str, Any]]:
        """The optimizer's groups. A group may hold a "lr_factor", by which the stage's learning rate is multiplied."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    @classmethod
    def models_of_stages(cls, options: OptionsT) -> Sequence[str]:
        """Names of the earlier stages whose models the step wants, as `parts.stage_models`."""
        return ()

    # Called by the run.

    def first_pass(self, batches: Iterator[Batch], prepare: Callable[[Tensor], Tensor]) -> None:
        """See the training set once before the first iteration; for methods that need it.

        Called at the start of a stage with the model it starts from, in eval mode and without gradients, and not again
        when the run resumes inside the stage: what it finds belongs into the model or into `state_dict`.

        batches: this process's share of the training split, cropped as for evaluation: over all processes each image
        comes exactly once. prepare: uint8 (N, 3, H, W) -> normalised float, not augmented.
        """
        raise NotImplementedError

    def train_mode(self) -> None:
        """Put each module into the mode it is trained in; called once, before the first iteration."""
        self.set_train_mode(self.model, self.options)

    def advice(self) -> Sequence[str]:
        """What the user is told at the start of the stage: things that cost something and can be changed."""
        return () if self.parts.class_accuracy is None else self.parts.class_accuracy.advice()

    def start_epoch(self, epoch: int) -> None:
        """Called by the trainer before the first iteration of every epoch."""
        self.epoch = epoch
        self.loss.on_epoch(epoch)
        if self.parts.class_accuracy is not None:
            self.parts.class_accuracy.start_epoch()

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput:
        """Train on one batch. Changes the model, the optimizer and the step's own state; does not synchronise."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Everything that the next iteration depends on, apart from the batches."""
        parts = self.parts
        return {
            "epoch": self.epoch,
            **trained_state(parts.model),
            "loss": parts.loss.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "augment": parts.augment.state_dict(),
            "meta_augment": parts.meta_augment.state_dict() if parts.meta_augment else None,
            "class_accuracy": parts.class_accuracy.state_dict() if parts.class_accuracy else None,
            "second_augment": parts.second_augment.state_dict() if parts.second_augment else None,
        }

    def gather_state(self, state: dict) -> dict:
        """`state_dict` with what only other processes hold of it, on the main process; every process calls it."""
        return state

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""
        parts = self.parts
        load_trained_state(parts.model, state)
        parts.loss.load_state_dict(state["loss"])
        # In mid-epoch the trainer does not start the epoch again; what a loss derives from it is not in its state.
        self.epoch = state["epoch"]
        parts.loss.on_epoch(self.epoch)
        load_optimizer(parts.optimizer, state["optimizer"])
        parts.augment.load_state_dict(state["augment"])
        if parts.meta_augment:
            parts.meta_augment.load_state_dict(state["meta_augment"])
        if parts.class_accuracy:
            parts.class_accuracy.load_state_dict(state["class_accuracy"])
        if parts.second_augment:
            parts.second_augment.load_state_dict(state["second_augment"])

    # Asked where iterations are compiled, or captured and replayed; see `Replayable` for the rest.

    def why_not_compiled(self, batch: Batch) -> str | None:
        """Why `parts.compiler` cannot serve this step, None when it can.

        batch: one to try; what that changes, the caller takes back.
        """
        if self.parts.compiler.captures and not capturable(type(self.optimizer)):
            return f"{type(self.optimizer).__name__} counts its steps in Python, which is not captured"
        return None if self.allows.compilation else "the method has passes of its own, which are not compiled"

    def uses_meta_batch(self) -> bool:
        """Whether the next iteration looks at its meta batch."""
        return self.takes_meta_batches(self.options)

    def replayed_part(self) -> Replayable | None:
        return self.parts.class_accuracy

    def variant(self) -> Hashable:
        return self.uses_meta_batch(), super().variant()

    # For the methods: the parts of an iteration.

    @property
    def class_accuracy(self) -> ClassAccuracy:
        """A on the meta set, of a method that needs it."""
        assert self.parts.class_accuracy is not None, "needs.class_accuracy is not set"
        return self.parts.class_accuracy

    @property
    def lr(self) -> float | Tensor:
        """The current learning rate, alpha of Eq. 9; 0-d on the device where iterations are captured."""
        return self.optimizer.param_groups[0]["lr"]

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Per-sample losses (b,) of augmented images, or of what the method's network takes in their place.

        In training mode this moves BatchNorm's running statistics.

        A loss with random numbers of its own draws them here, once: every later evaluation on this batch sees the same.
        """
        self.loss.draw(len(labels))
        with self.parts.autocast():
            return self.compiled_losses(inputs, labels)

    def mean_loss(self, losses: Tensor, labels: Tensor) -> Tensor:
        """The mean of per-sample losses (b,) as the loss's authors take it, over the batches of all processes: 0-d."""
        return self.mean_by_weight(losses, self.loss.mean_weight(labels))

    def mean_by_weight(self, losses: Tensor, weight: Tensor | None) -> Tensor:
        """The mean of losses (b,) over `weight`, `PerSampleLoss.mean_weight` of their labels: 0-d."""
        if weight is None:
            return losses.mean()
        self.reducer.mean_([weight])
        return losses.mean() / weight.to(losses.dtype)

    def micro_batches(self, size: int) -> list[slice]:
        """The equal parts in which a batch of `size` samples goes through the network, one after the other."""
        length = size // self.parts.accumulate
        assert length * self.parts.accumulate == size, (size, self.parts.accumulate)
        return [slice(start, start + length) for start in range(0, size, length)]

    def minimise(self, inputs: Tensor, labels: Tensor, objective: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """One optimizer step down the mean of `objective` over the micro-batches of a batch; returns it, 0-d.

        objective: takes the losses of a micro-batch and its place in the batch to a mean over them, 0-d. The gradient
        is that of the whole batch; BatchNorm normalises with each micro-batch, and its statistics move with each.
        """
        parts = self.micro_batches(len(labels))
        if len(parts) == 1:
            value = objective(self.losses(inputs, labels), parts[0])
            self.descend(value)
            return value.detach()
        sums = GradientSum(self.reducer, self.parameters, len(parts))
        for part in parts:
            sums.add(objective(self.losses(inputs[part], labels[part]), part) / len(parts))
        self.apply(sums.gradients)
        return sums.value

    def apply(self, gradients: list[Tensor]) -> None:
        """One optimizer step with these gradients of `self.parameters`."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = laid_out(gradient, parameter)
        if self.parts.clip is not None:
            self.parts.clip(self.parameters, list(self.model.head.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def descend(self, objective: Tensor) -> None:
        """One optimizer step down the gradient of `objective`, averaged over processes; frees its graph."""
        self.apply(mean_gradients(self.reducer, objective, self.parameters))
