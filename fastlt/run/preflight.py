"""Everything that is refused before training: each failed check is a ValueError for the user."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.state import PartialState

from fastlt.augment import check_augment, output_size
from fastlt.losses import build_loss
from fastlt.models import Classifier, check_padded_pooling
from fastlt.models.head_init import check_head_init
from fastlt.models.pretrained import check_reachable
from fastlt.names import shortened
from fastlt.recipe import Recipe, StageRecipe, load_recipe, unlike_model
from fastlt.run.context import RunContext, make_accelerator, make_context
from fastlt.run.cost import scoring, theta
from fastlt.run.folder import is_finished, last_checkpoint, result_file, versions
from fastlt.run.loading import (
    augmentations,
    batch_size,
    check_meta_share,
    check_split,
    evaluation_side,
    iterations_per_epoch,
    stage_classes,
)
from fastlt.run.lock import lock_folder, unlock_folder
from fastlt.run.main_process import on_main, on_nodes
from fastlt.run.network import network_of
from fastlt.run.network_checks import check_network, meta_steps
from fastlt.run.processes import connect
from fastlt.run.recorded import changed, is_complete, readable_result, recorded_inputs, recorded_recipe
from fastlt.run.trackers import check_trackers
from fastlt.state import ShotRanks
from fastlt.steps import STEPS
from loaders.order.shard_order import ShardOrder
from loaders.readers import BACKENDS
from loaders.readers.base_loader import WORKER_BATCHES
from loaders.sources.source import absent_classes
from loaders.stored.streamed import StreamedDataset

SOME_CLASSES = 10  # of a network that is built before the data set is known

log = logging.getLogger(__name__)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a user names, as the main process finds it, on every process. RecipeError as `load_recipe`."""
    connect()
    return on_main(PartialState(), lambda: load_recipe(path, overrides))


def prepare(recipe: Recipe) -> RunContext:
    """The context of a run, after all checks that do without the model. ValueError for what they refuse.

    The main process owns the run folder from here on, unless the run is finished: see `lock_folder`.
    """
    check_trackers(recipe)
    accelerator = make_accelerator(recipe)
    on_main(accelerator, lambda: check_trained_part(recipe))
    on_main(accelerator, lambda: claim_folder(recipe))
    main_has_it = on_main(accelerator, lambda: holds_run(recipe.folder))
    on_nodes(connect(), lambda: check_run_is_on_main(recipe.folder, main_has_it))
    context = make_context(recipe, accelerator)
    on_main(accelerator, lambda: check_inputs(context))
    check_dataset(context)
    check_loaders(context)
    for warning in (
        *absent_classes(context.counts.names, context.inputs.inputs.data.class_counts),
        *never_begun(context),
    ):
        context.say(warning)
    if recipe.data.order == "shards" and is_sorted(context.dataset.labels("train")):
        context.say(
            f"warning: the training images of {context.dataset.place} are stored class by class, so shards have few "
            "classes, and batches are of those; convert them with --shuffle"
        )
    return context


def never_begun(context: RunContext) -> Iterator[str]:
    """A warning for each part of a loss or a method that is to begin in an epoch that its stage does not have."""
    for name, stage in context.recipe.stages.items():
        given = {f"loss_options.{key}": value for key, value in stage.loss_options.items()}
        given |= {f"options.{key}": value for key, value in vars(stage.options).items()}
        given = {k: value for k, value in given.items() if k.endswith("from_epoch") and isinstance(value, int)}
        if not given:  # of many images an epoch takes time to count
            continue
        per_epoch = iterations_per_epoch(context, stage)
        epochs = stage.epochs if stage.epochs is not None else math.ceil(stage.length / max(1, per_epoch))
        for key, value in given.items():
            if value >= epochs:
                yield (
                    f"warning: stages.{name}.{key} is {value}, and the stage has {epochs} epochs, counted from 0: it "
                    "never begins"
                )


def is_sorted(labels: np.ndarray) -> bool:
    """Whether neighbours are of one class far more often than in a random order; labels: int64 (N,)."""
    shares = np.bincount(labels) / len(labels)
    by_chance = float((shares**2).sum())
    return float((labels[1:] == labels[:-1]).mean()) > by_chance + 0.5 * (1 - by_chance)


def holds_run(folder: Path) -> bool:
    """Whether a run can go on in a folder, or is finished there."""
    return is_finished(folder) or bool(versions(last_checkpoint(folder)))


def check_run_is_on_main(folder: Path, main_has_it: bool) -> None:
    """ValueError for a run that is on this machine and not on that of the main process, which would begin it anew."""
    if holds_run(folder) and not main_has_it:
        raise ValueError(
            f"{folder} holds a run, and on the machine of process 0 there is none: start the command so that process 0 "
            "is on this machine, bring the folder there, or choose another name=..."
        )


def claim_folder(recipe: Recipe) -> None:
    """Lock the run folder for this process, unless it is only read. ValueError when it cannot be, or `check_folder`."""
    try:
        if not is_complete(recipe):
            lock_folder(recipe.folder)
    except OSError as error:
        raise ValueError(
            f"runs is {shortened(recipe.runs)}, but {_obstacle(recipe.folder, error)}; "
            "set runs=DIR to a folder that can be written to"
        ) from None
    check_folder(recipe)
    if is_complete(recipe):
        unlock_folder(recipe.folder)  # another process has finished it meanwhile


def _obstacle(folder: Path, error: OSError) -> str:
    """Why a run folder could not be written to."""
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not place.exists():
        return f"{place} is a link to {os.readlink(place)}, which is not there"
    if not place.is_dir():
        return f"{place} is a file"
    if isinstance(error, PermissionError):
        return f"{place} may not be written to"
    return f"{place} cannot be written to ({error.strerror})"


def check_folder(recipe: Recipe) -> None:
    """ValueError for a run folder that holds a run of another recipe, or any run when `resume` is never."""
    before = recorded_recipe(recipe.folder)
    if before is None:
        return
    if recipe.resume == "never":
        raise ValueError(
            f"{recipe.folder} holds a run already and resume is never; "
            "choose another name=..., or set resume=auto to go on with it"
        )
    refused = [change.line for change in changed(recipe, before) if change.refused]
    if refused:
        raise ValueError(
            f"{recipe.folder} holds a run of another recipe; it differs in (there and here)\n  "
            + "\n  ".join(refused)
            + "\nset the value of there to go on with that run, or choose another name=... for a run of its own"
        )
    if is_finished(recipe.folder) and readable_result(recipe.folder) is None:
        if not versions(last_checkpoint(recipe.folder)):
            raise ValueError(
                f"{result_file(recipe.folder)} is damaged, and there is no checkpoint to measure it again from; put a "
                "good copy there, or choose another name=..."
            )
        log.warning("%s is damaged: the test split is measured again", result_file(recipe.folder))


def check_inputs(context: RunContext) -> None:
    """ValueError when the run in the folder was begun with other data than are there now, or other weights."""
    folder = context.folder
    before = recorded_inputs(folder)
    if before is None:
        if holds_run(folder):
            context.say(f"{folder} was made by a version that kept no record of its data: they cannot be compared")
        return
    wrong = context.inputs.inputs.differences(before.inputs)
    if wrong:
        raise ValueError(
            f"{folder} holds a run that began with other data than {context.dataset.place} has now:\n  "
            + "\n  ".join(wrong)
            + "\nbring the data back as they were, or choose another name=... for a run on these"
        )


def check_dataset(context: RunContext) -> None:
    """Mistakes that only the data set can show: the class count, and batches that are larger than their split."""
    data, counts = context.recipe.data, context.counts
    if data.num_classes is not None and data.num_classes != counts.num_classes:
        raise ValueError(
            f"data.num_classes is {data.num_classes}, but {context.dataset.place} has {counts.num_classes} "
            "classes; leave the key out to take what is there, or convert the data set that is meant"
        )
    if isinstance(data.shots, ShotRanks) and sum(data.shots.ranks) != counts.num_classes:
        raise ValueError(
            f"data.shots is {counts.shots_text}, {sum(data.shots.ranks)} classes, but {context.dataset.place} has "
            f"{counts.num_classes}; give groups that add up to them"
        )
    for name, stage in context.recipe.stages.items():
        # Built again when its turn comes; here so that the last stage's mistake does not cost the first stage.
        build_loss(stage.loss, counts, **stage.loss_options)
        if not stage_classes(context, stage).any():
            raise ValueError(
                f"stages.{name}.classes is {stage.classes!r}, but {context.dataset.place} has no such class with "
                f"data.shots {counts.shots_text}; leave out the stage and the keys that name it, or set other shots"
            )
        if not stage_classes(context, stage)[context.dataset.labels("meta")].any():
            raise ValueError(
                f"stages.{name}.classes is {stage.classes!r}, and no such class has an image in the meta split, on "
                "which the stage is validated; hold out more images, or leave out the stage and the keys that name it"
            )
        _check_batches(context, name, stage)
        check_meta_share(context, name, stage)


def _check_batches(context: RunContext, name: str, stage: StageRecipe) -> None:
    """ValueError for batches that their split cannot fill, or that do not divide among the processes."""
    processes = context.reducer.world_size
    for key, split in (("batch_size", "train"), ("meta_batch_size", "meta")):
        if split == "meta" and not STEPS[stage.method].takes_meta_batches(stage.options):
            continue
        size, labels = batch_size(stage, split), context.dataset.labels(split)
        available = int(stage_classes(context, stage)[labels].sum()) if split == "train" else len(labels)
        if size > available:
            of = "" if stage.classes == "all" else f" of {stage.classes}-shot classes"
            raise ValueError(
                f"stages.{name}.{key} is {size}, but the {split} split has {available} images{of}; "
                f"give {available} or fewer"
            )
        if size % processes:
            raise ValueError(f"stages.{name}.{key} is {size}, which does not divide into {processes} processes")
        if size // processes % stage.accumulate:
            raise ValueError(
                f"stages.{name}.accumulate is {stage.accumulate}, but each of {processes} processes has "
                f"{size // processes} of {key} {size}, which does not divide into so many; give another number"
            )
    if stage.sampling == "class_aware_4" and stage.batch_size // processes % 4:
        raise ValueError(
            f"stages.{name}.batch_size is {stage.batch_size} with sampling class_aware_4, which gives each "
            f"process whole groups of 4 images of a class; give a multiple of {4 * processes}"
        )


def _shards_ahead(context: RunContext, dataset: StreamedDataset) -> float:
    """How many shards the workers of the 'torch' loader read ahead of the training."""
    data = context.recipe.data
    if data.loader != "torch":
        return 0.0
    workers = context.processes.cores if data.num_workers is None else data.num_workers
    batch = max(stage.batch_size for stage in context.recipe.stages.values())
    return workers * WORKER_BATCHES * batch / dataset.images_per_shard()


def check_loaders(context: RunContext) -> None:
    """Mistakes that only the stored images can show: a loader that cannot read them, and sizes unlike the recipe's."""
    data = context.recipe.data
    if isinstance(context.dataset, StreamedDataset):
        order, processes = ShardOrder(data.stream.parts, data.stream.block), context.reducer.world_size
        ahead = _shards_ahead(context, context.dataset)
        context.dataset.check_room(order.shards_in_use(processes, context.local_world_size, ahead))
    specs = augmentations(data)
    wanted = {"data.augment": ("train", specs["train"])}
    stages = context.recipe.stages.values()
    if any(STEPS[stage.method].takes_meta_batches(stage.options) for stage in stages):
        wanted["data.meta_augment"] = ("meta", specs["meta"])
    if data.second_augment is not None:
        wanted["data.second_augment"] = ("train", specs["second"])
    for key, (split, chain) in wanted.items():
        _, shape = check_split(context, split, train=True)
        try:
            shape = output_size(check_augment(chain, data.image_size), *shape)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        _check_image_size(context, split, shape, "data.train_crop=random_resized, or a random_crop in data.augment")
    for split in ("meta", "test"):
        _, (height, width) = check_split(context, split, train=False)
        more = evaluation_side(data, split) - data.image_size
        _check_image_size(context, split, (height - more, width - more), "data.eval_crop=center")


def _check_image_size(context: RunContext, split: str, shape: tuple[int, int], advice: str) -> None:
    size = context.recipe.data.image_size
    if shape != (size, size):
        raise ValueError(
            f"data.image_size is {size}, but the images of the {split} split come to the network as "
            f"{shape[0]}x{shape[1]}; set it to what they are, or cut them: {advice}"
        )


def check_trained_part(recipe: Recipe) -> None:
    """ValueError for a part of the network that the recipe trains and the network does not have.

    Builds the network with random weights, where the recipe does not train all of it.
    """
    if not recipe.model.trains_all:
        with torch.random.fork_rng(devices=[]):
            network_of(recipe, recipe.data.num_classes or SOME_CLASSES, weights=False)


def check_model(context: RunContext, model: Classifier) -> None:
    """Mistakes that only the network can show: options that name parts it lacks, and a trained head that is absent."""
    recipe = context.recipe
    if recipe.channels_last:
        check_padded_pooling(model, context.device)
    check_network(recipe, model, context.reducer.world_size)
    if recipe.model.head_init is not None:
        init = recipe.model.head_init
        on_main(context.accelerator, lambda: check_head_init(init, model))
    for name, stage in recipe.stages.items():
        kind = STEPS[stage.method]
        first = len(recipe.lineage(stage)) == 1
        if first and kind.needs.trained_head and not model.head_is_trained:
            raise ValueError(
                f"stages.{name}.method is {stage.method!r}, which goes on from a trained head, but "
                f"{recipe.model.checkpoint} has none for {context.counts.num_classes} classes and "
                f"model.head={recipe.model.head}; use method crt for a new one, or another checkpoint"
            )


def check_without_data(recipe: Recipe) -> list[str]:
    """ValueError for all that a run of the recipe on this machine refuses before it looks at its data.

    Returns what the recipe alone does not tell, a line each: see `meta_steps`, `scoring` and `theta`. Builds the
    network and reads its weights from a file. Writes nothing, and fetches nothing.
    """
    check_folder(recipe)
    check_trackers(recipe)
    if recipe.data.loader in BACKENDS:
        BACKENDS[recipe.data.loader].load()
    if recipe.model.pretrained:
        check_reachable(recipe.model.name)
    fetching_none = replace(recipe, model=replace(recipe.model, pretrained=False))
    model = network_of(fetching_none, recipe.data.num_classes or SOME_CLASSES, weights=True)
    check_network(recipe, model)
    return [*meta_steps(recipe, model), *scoring(recipe), *theta(recipe)]


def checked_text(recipe: Recipe) -> str:
    """The recipe as YAML, with every default and what follows from it as comments; refuses as `check_without_data`."""
    lines = check_without_data(recipe)
    return recipe.to_yaml() + "".join(f"# {line}\n" for line in [*recipe.follows(), *unlike_model(recipe), *lines])
