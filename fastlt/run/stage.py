"""From a stage of the recipe to a model and a step that train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm.auto import tqdm

from fastlt.device.compiled import Compiler
from fastlt.device.random_states import derived_seed
from fastlt.losses import build_loss
from fastlt.meta.bounded_accuracy import class_accuracy
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.meta.streamed_accuracy import StreamedAccuracy
from fastlt.models import Classifier
from fastlt.models.sync_batch_norm import synchronise_batch_norm
from fastlt.models.trained_state import leaves_out_weights, load_trained_state
from fastlt.recipe import StageRecipe
from fastlt.run import checkpoint
from fastlt.run.context import RunContext
from fastlt.run.folder import stage_checkpoint, versions
from fastlt.run.loading import (
    StageLoaders,
    endless,
    is_streamed,
    iterations_per_epoch,
    make_augment,
    normaliser,
    open_slices,
    open_stage_loaders,
    read_share,
    stage_classes,
)
from fastlt.run.main_process import from_main
from fastlt.run.network import network_of, network_of_stage
from fastlt.run.optimizers import set_learning_rate, stage_optimizer
from fastlt.run.progress import PlannedStage
from fastlt.steps import STEPS, StageModel, Step, StepParts
from loaders.protocol import BatchLoader
from loaders.stored.damage import DamageError

BAR_AFTER_S = 2.0  # a shorter pass over the meta set shows no progress
TrainingImages = Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Stage:
    """A stage that is ready to be trained. Its lengths are in iterations.

    ema: the moving average of the model's weights, where the recipe has one.
    """

    name: str
    recipe: StageRecipe
    step: Step
    loaders: StageLoaders
    ema: ModelEmaV3 | None

    @property
    def per_epoch(self) -> int:
        return len(self.loaders.train)

    @property
    def unit(self) -> int:
        """Iterations in one unit of the recipe's lengths."""
        return self.per_epoch if self.recipe.epochs is not None else 1

    @property
    def iterations(self) -> int:
        return self.recipe.length * self.unit

    @property
    def evaluate_every(self) -> int:
        return self.recipe.evaluate_every * self.unit

    @property
    def average(self) -> Classifier | None:
        """The model with the averaged weights."""
        return None if self.ema is None else cast("Classifier", self.ema.module)

    @property
    def models(self) -> dict[str, Classifier]:
        """What evaluations measure, the selected one first: the model, "raw", and the average of its weights, "ema"."""
        model = {"raw": self.step.model}
        if self.recipe.ema is None or self.average is None:
            return model
        both = {**model, "ema": self.average}
        return {name: both[name] for name in (self.recipe.ema.select, self.recipe.ema.beside)}

    def end(self, iteration: int) -> None:
        """After an iteration, counted from 1: let the average follow."""
        if self.ema is not None:
            self.ema.update(self.step.model, iteration)

    def begin(self, iteration: int) -> None:
        """Before an iteration: tell the step of a new epoch, and set the learning rate."""
        if iteration % self.per_epoch == 0:
            self.step.start_epoch(iteration // self.per_epoch)
        self.set_learning_rate(iteration)

    def set_learning_rate(self, iteration: int) -> None:
        """Give the optimizer the learning rate of an iteration."""
        set_learning_rate(self.step.optimizer, self.recipe, iteration / self.unit)


def build_stage(
    context: RunContext,
    name: str,
    model: Classifier,
    *,
    training_images: TrainingImages,
    backends: Mapping[str, str] | None = None,
) -> Stage:
    """Open the loaders of a stage and make the step that trains `model`, which `prepare_model` has been given.

    training_images: see `StepParts`. backends: see `open_stage_loaders`.

    With several processes the step's own networks begin alike on all, and dropout draws other masks on each.
    """
    stage = context.recipe.stages[name]
    _draw_as_main(context)
    kind, options = STEPS[stage.method], stage.options
    optimizer = stage_optimizer(context, stage, model, kind.parameter_groups(model, options))
    loaders, accuracy = open_stage_loaders(context, stage, backends), None
    if kind.needs.class_accuracy:
        accuracy, slices = _class_accuracy(context, stage)
        loaders = replace(loaders, slices=slices)
    loss = build_loss(stage.loss, context.counts, **stage.loss_options).to(context.device)
    loss.share_draws(context.recipe.seed, context.reducer.rank, context.reducer.world_size)
    parts = StepParts(
        model=model,
        class_accuracy=accuracy,
        loss=loss,
        optimizer=optimizer,
        augment=make_augment(context, "train", loaders.train),
        meta_augment=None if loaders.meta is None else make_augment(context, "meta", loaders.meta),
        second_augment=make_augment(context, "second", loaders.train) if kind.needs.second_view else None,
        training_images=training_images if kind.needs.training_images else None,
        class_counts=context.counts,
        autocast=context.autocast,
        reducer=context.reducer,
        seed=context.recipe.seed,
        compiler=Compiler(context.compile),
        trained_classes=stage_classes(context, stage),
        clip=stage.clip,
        accumulate=stage.accumulate,
        stage_models={earlier: stage_model(context, earlier) for earlier in kind.models_of_stages(options)},
    )
    ema = None if stage.ema is None else stage.ema.start(model)
    step = kind(parts, options)
    if context.reducer.rank > 0:
        torch.manual_seed(derived_seed(context.recipe.seed, name, context.reducer.rank))
    return Stage(name, stage, step, loaders, ema)


def _draw_as_main(context: RunContext) -> None:
    """The default generator of the CPU goes on from where that of the main process is."""
    torch.set_rng_state(from_main(context.accelerator, torch.get_rng_state))


def planned(context: RunContext) -> list[PlannedStage]:
    """The stages of a recipe with their lengths in iterations, before any loader is open."""
    stages = []
    for name, stage in context.recipe.stages.items():
        unit = 1 if stage.epochs is None else iterations_per_epoch(context, stage)
        lengths = stage.length * unit, stage.evaluate_every * unit
        stages.append(PlannedStage(name, stage.method, stage.batch_size, *lengths))
    return stages


def new_model(context: RunContext) -> Classifier:
    """The recipe's model as a first stage gets it, the same on every process."""
    recipe, classes = context.recipe, context.counts.num_classes

    def build(weights: bool) -> Classifier:
        model = network_of(recipe, classes, weights=weights)
        return model.to(context.device).to(memory_format=recipe.memory_format)

    if not recipe.model.pretrained and recipe.model.checkpoint is None:
        return build(True)
    model = _with_weights_of_main(context, build)
    _draw_as_main(context)  # building with weights may have drawn other numbers than building without
    return model


def _with_weights_of_main(context: RunContext, build: Callable[[bool], Classifier]) -> Classifier:
    """A model whose weights the main process reads or fetches, and sends to the others. ValueError, on every process.

    build: makes it, with its weights or with random ones.
    """
    of_main: list[Classifier] = []

    def read() -> dict[str, Any]:
        of_main.append(build(True))
        model = of_main[0]
        return {
            "weights": model.state_dict(),
            "head_is_trained": model.head_is_trained,
            "frozen_part": model.frozen_part,
        }

    state = from_main(context.accelerator, read)
    if of_main:
        return of_main[0]
    model = build(False)
    model.load_state_dict(state["weights"])
    model.head_is_trained, model.frozen_part = state["head_is_trained"], state["frozen_part"]
    return model


def prepare_model(context: RunContext, model: Classifier, stage: StageRecipe) -> Classifier:
    """The model in the form that a stage trains: `model`, changed in place, or a new one where the stage starts afresh.

    To resume in a later stage, take the model through its whole lineage.
    """
    recipe = context.recipe
    position = next(i for i, one in enumerate(recipe.stages.values()) if one is stage)
    if stage.start == "fresh" and position > 0:
        # Weights of its own, the same on every process, and the default generator stays where it is: a run that
        # resumes comes through here too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * recipe.seed + position)
            model = new_model(context)
    STEPS[stage.method].prepare_model(model, stage.options, seed=recipe.seed)
    if context.features is not None:
        model.drop_backbone()
    if recipe.sync_batch_norm and context.reducer.world_size > 1:
        synchronise_batch_norm(model, context.reducer)
    return model


def stage_model(context: RunContext, name: str) -> StageModel:
    """The model that an earlier stage left, by its `select`."""
    recipe, path = context.recipe, stage_checkpoint(context.folder, context.recipe.stages[name].select, name)
    classes, device = context.counts.num_classes, context.device

    def read() -> dict[str, Any]:
        if not versions(path):
            raise DamageError(
                f"{path} is not there, the model of stages.{name}, which is trained first: run all stages"
            )
        return checkpoint.load_newest(path, device)[1]

    def build(weights: bool) -> Classifier:
        return network_of_stage(recipe, classes, name, device, weights=weights)

    state = from_main(context.accelerator, read)
    model = _with_weights_of_main(context, build) if leaves_out_weights(state) else build(False)
    load_trained_state(model, state)
    return StageModel(model.requires_grad_(False).eval(), stage_classes(context, recipe.stages[name]))


def _class_accuracy(context: RunContext, stage: StageRecipe) -> tuple[ClassAccuracy, BatchLoader | None]:
    """The accuracies that a stage asks for, and the loader of their slices where the meta set stays encoded."""
    labels, classes = torch.from_numpy(context.dataset.labels("meta")).to(context.device), context.counts.num_classes
    options: dict[str, Any] = {
        "prepare": normaliser(context),
        "window": stage.accuracy.window,
        "images_per_step": stage.accuracy.images_per_step,
        "batch_size": stage.accuracy.batch_size,
        "reducer": context.reducer,
        "autocast": _accuracy_autocast(context, stage),
        "shown": partial(tqdm, desc="scoring the meta set", delay=BAR_AFTER_S, leave=False, disable=not context.main),
    }
    if not is_streamed(context, stage):
        images = partial(read_share, context, "meta")
        return class_accuracy(images, labels, classes, refresh=stage.accuracy.refresh, **options), None
    opened: list[BatchLoader] = []

    def slices(index: Tensor, size: int) -> Callable[[int], Iterator[Tensor]]:
        opened.append(open_slices(context, index, size))
        return lambda start: (batch.images for batch in endless(opened[0], start))

    accuracy = StreamedAccuracy(slices, labels, classes, image_size=context.recipe.data.image_size, **options)
    return accuracy, opened[0]


def _accuracy_autocast(context: RunContext, stage: StageRecipe) -> Callable[[], AbstractContextManager]:
    """Makes the context in which the meta set is scored: in the recipe's precision unless the stage has another."""
    precision = stage.accuracy.precision
    if precision is None:
        return context.autocast
    return partial(torch.autocast, context.device.type, torch.bfloat16, enabled=precision == "bf16")
