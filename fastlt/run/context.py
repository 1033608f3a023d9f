"""The surroundings of a run: made once, handed down, never changed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from fastlt.device.compiled import mode_for
from fastlt.device.distributed import Reducer
from fastlt.device.host_memory import keep_freed_memory
from fastlt.recipe import Recipe
from fastlt.run.dataset import prepare_dataset
from fastlt.run.features import Features
from fastlt.run.inputs import InputsRecord, check_same_data, read_inputs
from fastlt.run.main_process import on_main, on_nodes
from fastlt.run.processes import Processes, connect
from fastlt.run.recorded import recorded_inputs
from fastlt.state import ClassCounts
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.unconverted import UnconvertedDataset


@dataclass(frozen=True)
class RunContext:
    """A recipe, and the machines and the data set on which the processes train it.

    processes: where they are, and what they know of each other.
    compile: the recipe's `compile` on this device: "none", "inductor", "cudagraph" or "replay".
    counts: of the training split, with the recipe's shots.
    inputs: which images and weights these are.
    features: of a frozen backbone, on which the run trains in the place of images; None where it trains on images.
    """

    recipe: Recipe
    accelerator: Accelerator
    processes: Processes
    device: torch.device
    reducer: Reducer
    compile: str
    dataset: ConvertedDataset | UnconvertedDataset
    counts: ClassCounts
    inputs: InputsRecord
    features: Features | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.recipe.folder

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and talks to the user."""
        return self.accelerator.is_main_process

    def autocast(self) -> AbstractContextManager[None]:
        """The context of forward passes in the recipe's precision."""
        # Accelerate's takes 20 us to find out that there is none; an iteration on features asks for eight.
        return nullcontext() if self.recipe.precision == "fp32" else self.accelerator.autocast()

    def say(self, text: str) -> None:
        """One line for the person who watches, above the progress bar."""
        if self.main:
            tqdm.write(text)

    @property
    def local_world_size(self) -> int:
        """How many processes of the run are on this one's node, itself among them."""
        return len(self.processes.on_node)


def with_recipe(context: RunContext, recipe: Recipe) -> RunContext:
    """The same surroundings for another recipe on the same data, with the generators seeded as for its own run."""
    set_seed(recipe.seed)
    return replace(context, recipe=recipe)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate's view of the processes of a run; connects them. ValueError as `connect`."""
    connect()
    return Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[recipe.precision],
        log_with=[*recipe.trackers] or None,
        project_dir=str(recipe.folder),
    )


def make_context(recipe: Recipe, accelerator: Accelerator) -> RunContext:
    """Set this process up for a recipe: threads, memory, seed, and its data set, converted where it is small.

    ValueError as `prepare_dataset`, and where the data set of another machine has other images.
    """
    # Accelerate numbers CPUs by process, and torch cannot read a checkpoint back to a device "cpu:1".
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    processes = connect()
    compressed = recipe.reduce_precision == "bf16"
    reducer = Reducer(accelerator.process_index, accelerator.num_processes, compressed)
    _set_threads(recipe.num_threads, device, processes.cores)
    if device.type == "cpu":
        keep_freed_memory()
    else:
        torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest convolutions are found once
    set_seed(recipe.seed)
    dataset = prepare_dataset(recipe.data, accelerator)
    inputs = on_main(accelerator, lambda: read_inputs(recipe, dataset, recorded_inputs(recipe.folder), tqdm.write))
    on_nodes(processes, lambda: check_same_data(dataset, inputs, tqdm.write))
    return RunContext(
        recipe=recipe,
        accelerator=accelerator,
        processes=processes,
        device=device,
        reducer=reducer,
        compile=mode_for(recipe.compile, device, reducer.world_size, on_features=recipe.data.cached_views is not None),
        dataset=dataset,
        counts=dataset.class_counts(recipe.data.shots),
        inputs=inputs,
    )


def _set_threads(asked: int | None, device: torch.device, cores: int) -> None:
    """All of this process's cores for the arithmetic on a CPU; `accelerate launch` would leave one."""
    if asked is not None:
        torch.set_num_threads(asked)
    elif device.type == "cpu":
        torch.set_num_threads(cores)
