"""What a method needs, what it allows, and what its logits stand for; read off the class, before a step is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Needs:
    """What the run provides for this method and spares others.

    meta_batch: a meta batch for each iteration.
    class_accuracy: the accuracy of every class on the meta set, as `StepParts.class_accuracy`.
    second_view: each training image under a second augmentation.
    training_images: passes over the whole training set now and then, as `StepParts.training_images`.
    first_pass: one pass over the training images before the first iteration, see `Step.first_pass`.
    trained_model: a model that was trained before, by an earlier stage or in `model.checkpoint`.
    trained_head: a trained head too; a checkpoint without a fitting head is refused.
    """

    meta_batch: bool = False
    class_accuracy: bool = False
    second_view: bool = False
    training_images: bool = False
    first_pass: bool = False
    trained_model: bool = False
    trained_head: bool = False


@dataclass(frozen=True)
class Allows:
    """What a recipe may combine this method with.

    compilation: the recipe's `compile`; the passes that cost the most go through `StepParts.compiler`.
    experts: `model.experts`, several branches with a head each.
    some_classes: the stage's `classes`, training on a part of the classes.
    features: `data.cached_views`, training on features of a frozen backbone in the place of images.
    trained_part: `model.train`, `model.norm` and `model.adapt`, training a part of the network.
    accumulation: the stage's `accumulate`, a batch in micro-batches.
    ema: the stage's `ema`, a moving average of the weights.
    """

    compilation: bool = False
    experts: bool = False
    some_classes: bool = False
    features: bool = True
    trained_part: bool = True
    accumulation: bool = False
    ema: bool = True


@dataclass(frozen=True)
class LogitsPrior:
    """Which class prior the logits of this method's models carry, for those who put another one in its place.

    origin: batches are the class shares of its batches times the factor of its loss (`PerSampleLoss.log_prior_factor`);
        weighted are these times the class weights that were logged last; before is what the stage before left; uniform
        is the same for every class.
    assumption: what is taken for granted in this, as a sentence; None where it follows from the method.
    """

    origin: Literal["batches", "weighted", "before", "uniform"] = "batches"
    assumption: str | None = None
