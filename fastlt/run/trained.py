"""A finished run: what its folder says of it, and the network that it ended with.

Its model folder, `RUN/model`, says as much and holds the weights: it can be taken elsewhere and read alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastlt.augment import normalise
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import Classifier
from fastlt.models.timm_network import from_timm_network
from fastlt.models.trained_state import leaves_out_weights, load_trained_state
from fastlt.models.weight_files import read_weights
from fastlt.recipe import Recipe, read_resolved, recipe_from_tree
from fastlt.run import checkpoint
from fastlt.run.atomic_file import read_json
from fastlt.run.folder import SELECTIONS, last_checkpoint, recipe_file, result_file, stage_checkpoint, versions
from fastlt.run.network import network_of_stage
from fastlt.run.recorded import readable_result, written_inputs
from fastlt.run.shifted_crops import mean_logits
from fastlt.state import ClassCounts
from loaders.stored.identity import DatasetIdentity

CONFIG, WEIGHTS = "config.json", "model.safetensors"  # of a model folder, by timm's names
OURS = "fastlt"  # the part of the config that timm passes over


@dataclass(frozen=True)
class RecordedRun:
    """What the folder of a finished run says, or its model folder. Its data set need not be there any more.

    result: the content of result.json.
    counts: images of each class in the training split, with class names and shots, as they were measured.
    data: which images it was trained on; None for a run of a version that kept no record of them.
    """

    folder: Path
    recipe: Recipe
    result: dict[str, Any]
    counts: ClassCounts
    data: DatasetIdentity | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names in label order."""
        return self.counts.names

    @property
    def stage(self) -> str:
        """The last one, whose model was tested."""
        return next(reversed(self.recipe.stages))

    @property
    def select(self) -> str:
        """Which model of the last stage is the run's result, as `StageRecipe.select`."""
        return self.result.get("select", "best")  # an earlier version kept the best model alone, and did not say so

    def checkpoint(self, select: str) -> Path:
        """The file of a model of the last stage."""
        return stage_checkpoint(self.folder, select, self.stage)


@dataclass(frozen=True)
class TrainedRun:
    """The network of a finished run, in eval mode on `device`, with all that is needed to use it.

    select: which model of the last stage it is, as `StageRecipe.select`.
    iteration: of the last stage, after which it was saved.
    checkpoint: the file whose weights these are.
    """

    run: RecordedRun
    model: Classifier
    device: torch.device
    select: str
    iteration: int
    checkpoint: Path

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def class_names(self) -> tuple[str, ...]:
        """C names in label order."""
        return self.run.class_names

    @property
    def counts(self) -> ClassCounts:
        """Training images of each class."""
        return self.run.counts

    @property
    def image_size(self) -> int:
        """Pixels a side that the network sees."""
        return self.recipe.data.image_size

    @property
    def eval_crop(self) -> Literal["none", "center"]:
        """How an image was cut for the test; `eval_ratio` is the side of the square over its shorter side."""
        return self.recipe.data.eval_crop

    @property
    def eval_ratio(self) -> float:
        return self.recipe.data.eval_ratio

    @property
    def mean(self) -> tuple[float, float, float]:
        """Of the pixels in [0, 1], per RGB channel; `std` is their standard deviation."""
        return self.recipe.data.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.recipe.data.std

    def autocast(self) -> AbstractContextManager[object]:
        """The context of forward passes in the precision of the run."""
        return autocast(self.recipe, self.device)

    def logits(self, images: Tensor) -> Tensor:
        """As the run was tested: float32 (N, C) on `device`, for uint8 (N, 3, H, W) that are cut but not normalised.

        Of images that are larger than `image_size`, the mean over five crops.
        """
        with evaluation_mode(self.model), self.autocast():
            prepared = normalise(images.to(self.device), self.mean, self.std)
            return mean_logits(self.model, prepared, self.image_size).float()


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """The context of forward passes in a recipe's precision, outside of a training."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if recipe.precision == "bf16" else nullcontext()


def read_finished(folder: Path) -> RecordedRun:
    """What the folder of a finished run says; ValueError where there is none, or one that is not finished.

    The folder may be the model folder of a run. Files that the recipe names, such as lists and pretrained weights, need
    not be there any more.
    """
    if is_model_folder(folder):
        return _described(folder, _own_part(folder))
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; give the folder of a finished run, below runs/")
    path = recipe_file(folder)
    if not path.is_file():
        members = (readable_result(folder) or {}).get("members")
        if members:
            names = " and ".join(member["run"] for member in members)
            raise ValueError(f"{folder} holds the result of an ensemble, which has no network of its own; give {names}")
        raise ValueError(f"{folder} holds no finished run: {path.name} is missing; give folders below runs/")
    if not result_file(folder).is_file():
        begun = "it was not trained to its end" if versions(last_checkpoint(folder)) else "nothing was trained"
        raise ValueError(
            f"{folder} holds no finished run: result.json is missing, {begun}; the command that began it goes on"
        )
    result = readable_result(folder)
    if result is None:
        raise ValueError(f"{result_file(folder)} is damaged; the command that trained the run measures it again")
    try:
        recipe = read_resolved(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    record = written_inputs(folder)
    return _finished(folder, recipe, result, None if record is None else record.inputs.data)


def _finished(folder: Path, recipe: Recipe, result: dict[str, Any], data: DatasetIdentity | None) -> RecordedRun:
    images = np.asarray(result["class_counts"], dtype=np.int64)
    return RecordedRun(
        folder, recipe, result, ClassCounts(images, tuple(result["class_names"]), recipe.data.shots), data
    )


def load_trained(folder: Path, device: torch.device, select: str | None = None) -> TrainedRun:
    """The network that is a finished run's result, or another model of its last stage, as `StageRecipe.select`.

    ValueError as `read_finished`, and where the checkpoint is not there or damaged. The generators of random numbers
    stay where they are.
    """
    run = read_finished(folder)
    if is_model_folder(folder):
        return _load_packaged(run, device, select)
    select = run.select if select is None else select
    path = run.checkpoint(select)
    if not versions(path):
        kept = [other for other in SELECTIONS if versions(run.checkpoint(other))]
        advice = f"; of this run are kept: {', '.join(kept)}" if kept else ""
        raise ValueError(f"{path} is not there, the {select} model of stages.{run.stage}{advice}")
    path, state = checkpoint.load_newest(path, device)
    try:
        alone = leaves_out_weights(state)
        model = network_of_stage(run.recipe, run.counts.num_classes, run.stage, device, weights=alone)
        load_trained_state(model, state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not of the network that {recipe_file(folder)} describes ({reason})") from None
    model.requires_grad_(False).eval()
    return TrainedRun(run, model, device, select, state["iteration"], path)


def is_model_folder(folder: Path) -> bool:
    """Whether it is the model folder of a run, as `fastlt.run.model_folder` writes it."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _own_part(folder: Path) -> dict[str, Any]:
    """What a model folder says of its run."""
    config = read_json(folder / CONFIG, "copy the model folder again from where it was written")
    if OURS not in config:
        raise ValueError(f"{folder} holds a model that was not made by fastlt: its {CONFIG} says nothing of a run")
    return config[OURS]


def _described(folder: Path, own: dict[str, Any]) -> RecordedRun:
    data = None if own["data"] is None else DatasetIdentity.from_tree(own["data"])
    return _finished(folder, recipe_from_tree(own["recipe"]), own["result"], data)


def _load_packaged(run: RecordedRun, device: torch.device, select: str | None) -> TrainedRun:
    own, path, data = _own_part(run.folder), run.folder / WEIGHTS, run.recipe.data
    if select not in (None, own["select"]):
        raise ValueError(f"{run.folder} holds the {own['select']} model of its run, not the {select} one")
    state, classes = read_weights(path), run.counts.num_classes
    with torch.random.fork_rng(devices=[]):
        if own["form"] == "timm":
            model = from_timm_network(state, run.recipe.model.name, data.image_size, classes)
        else:
            model = network_of_stage(run.recipe, classes, run.stage, device)
            model.load_state_dict(state)
    model.to(device).to(memory_format=run.recipe.memory_format)
    return TrainedRun(run, model.requires_grad_(False).eval(), device, own["select"], own["iteration"], path)
