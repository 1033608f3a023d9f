"""`load`: the network of a finished run, ready to predict."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from fastlt.device.available import usable_device
from fastlt.inference.predictor import Predictor
from fastlt.inference.priors import carried_prior
from fastlt.inference.transform import EvaluationTransform
from fastlt.paths import expand
from fastlt.run.dataset import existing_dataset
from fastlt.run.finished_data import check_same_images, evaluation_batches
from fastlt.run.loading import evaluation_side
from fastlt.run.trained import RecordedRun, load_trained
from fastlt.state import Batch
from loaders.stored.as_stored import Storage


def load(
    run: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    select: Literal["last", "best", "smoothed"] | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
) -> Predictor:
    """The network of a finished run, in eval mode.

    run: the folder of the run, or its folder `model`, which may lie elsewhere.
    device: of torch; None is the first CUDA device, or the CPU where there is none.
    select: which model of the last stage; None is the run's result. precision: None is the run's.
    ValueError for a folder without a finished run, and for a device or a precision that is not there.
    """
    trained = load_trained(Path(expand(os.fspath(run))), usable_device(device), select)
    finished = trained.run
    if precision not in (None, "fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}: allowed are fp32 and bf16")
    half = partial(torch.autocast, trained.device.type, torch.bfloat16)
    storage, notes = _storage(finished)
    return Predictor(
        model=trained.model,
        counts=trained.counts,
        carried=carried_prior(
            finished.recipe, finished.counts, finished.result.get("class_weights"), trained.iteration
        ),
        transform=EvaluationTransform.of(
            evaluation_side(finished.recipe.data, "test"),
            trained.eval_crop,
            trained.eval_ratio,
            storage,
            trained.mean,
            trained.std,
        ),
        device=trained.device,
        image_size=trained.image_size,
        autocast=half if (precision or finished.recipe.precision) == "bf16" else nullcontext,
        validation=partial(_validation, finished, trained.device),
        trained=trained,
        notes=notes,
    )


def _storage(run: RecordedRun) -> tuple[Storage, tuple[str, ...]]:
    """How the images that the run was tested on had been stored, and what is not known of it."""
    if "storage" in run.result:
        return Storage(**run.result["storage"]), ()
    stored = run.recipe.data.storage
    note = (
        f"{run.folder} is a run of an earlier version, which does not say how its images were stored: taken is "
        f"mode {stored.mode}, max_resolution {stored.max_resolution}, from its recipe"
    )
    return Storage(stored.mode == "jpg", stored.max_resolution), (note,)


def _validation(run: RecordedRun, device: torch.device) -> Iterator[Batch]:
    """The images of the validation set, cut as those of the test; ValueError where they are gone or are others."""
    try:
        dataset = existing_dataset(run.recipe.data)
    except ValueError as error:
        raise ValueError(f"the validation set of {run.folder} cannot be read: {error}") from None
    check_same_images(run, dataset)
    yield from evaluation_batches(run, dataset, "meta", device, cut_as="test")
