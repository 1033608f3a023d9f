"""The content of `result.json`."""

from __future__ import annotations

import math
import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastlt.device.openmp import runtime
from fastlt.run.atomic_file import read_json
from fastlt.run.context import RunContext
from fastlt.run.folder import earlier_model_folder, earlier_result_file, model_folder, predictions_file, result_file
from fastlt.run.main_process import on_main
from fastlt.run.progress import Progress
from fastlt.run.recorded import is_complete, readable_result
from fastlt.typed_yaml import to_tree
from fastlt.version import __version__
from loaders.factory import format_read
from loaders.stored.as_stored import Storage


def recorded_result(context: RunContext) -> dict[str, Any] | None:
    """The result of a run that is finished, on every process; None while there is something to train or to measure."""
    recipe, path = context.recipe, result_file(context.folder)
    result = on_main(context.accelerator, lambda: read_json(path) if is_complete(recipe) else None)
    if result is not None:
        context.say(f"{context.folder} is finished; nothing is left to do")
    return result


def set_aside_result(context: RunContext) -> None:
    """Rename the result of a run that goes on: it was finished with fewer iterations, or the file is damaged.

    So is the model that belongs to it, also where the result is gone. The predictions are removed.
    """
    path, result = result_file(context.folder), readable_result(context.folder)
    predictions_file(context.folder).unlink(missing_ok=True)
    which = str(result.get("iterations")) if result is not None else "damaged" if path.exists() else "unknown"
    if model_folder(context.folder).exists():  # first: after a kill in between the result still says of which it is
        earlier = earlier_model_folder(context.folder, which)
        if earlier.exists():
            shutil.rmtree(earlier)
        model_folder(context.folder).rename(earlier)
    if path.exists():
        context.say(f"the result that was there is kept as {path.rename(earlier_result_file(context.folder, which))}")


def circumstances(context: RunContext) -> dict[str, Any]:
    """On what a part of a run is trained, as far as last bits may depend on it."""
    return {
        "device": device_name(context.device),
        "processes": context.reducer.world_size,
        "threads": torch.get_num_threads(),
        "fastlt": __version__,
        "torch": version("torch"),
    }


def device_name(device: torch.device) -> str:
    """What a result calls a device."""
    return str(device) if device.type == "cpu" else torch.cuda.get_device_name(device)


def processor_name() -> str:
    """The model of the CPU as Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


def make_result(context: RunContext, progress: Progress, measured: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything a reader needs: the metrics of the selected model on the test split, and how it came about.

    measured: of `Trainer._test`; the last entry is the selected model.
    """
    recipe, counts = context.recipe, context.counts
    validation_images = len(context.dataset.labels("meta"))
    selection = {
        select: {
            "iteration": model["iteration"],
            "validation_top1": model["top1"],
            "validation_top1_se": standard_error(model["top1"], validation_images),
            **{k: v for k, v in model["test"].items() if k != "per_class_accuracy"},
        }
        for select, model in measured.items()
    }
    selected, model = list(measured.items())[-1]
    return {
        "name": recipe.name,
        **model["test"],
        "select": selected,
        "selected_iteration": model["iteration"],
        "validation_top1": model["top1"],
        "validation_top1_se": standard_error(model["top1"], validation_images),
        "selection": selection,
        "class_names": list(counts.names),
        "class_counts": counts.counts.tolist(),
        "class_weights": None if progress.class_weights is None else progress.class_weights.tolist(),
        "shots": to_tree(counts.shots),
        "imbalance_factor": counts.imbalance_factor,
        "seed": recipe.seed,
        "precision": recipe.precision,
        "device": device_name(context.device),
        "processor": processor_name(),
        "processes": context.reducer.world_size,
        "threads": torch.get_num_threads(),
        "openmp": runtime(),
        "storage": asdict(storage_of(context)),
        "parts": progress.parts,
        "iterations": progress.done,
        "train_s": progress.train_s,
        "img_s": progress.img_s,
        "data_wait_share": progress.data_wait_share,
        "aside_s": progress.aside_s,
        "versions": versions(),
    }


def storage_of(context: RunContext) -> Storage:
    """How the images that a run is tested on are stored: those who predict with its model read images likewise."""
    loader = context.recipe.data.loader
    kind = format_read(context.dataset, loader)
    assert kind is not None, "the loader of a run reads its data set"
    return Storage.of(context.dataset, kind, encoded=loader == "dali")


def standard_error(accuracy: float, images: int) -> float:
    """Of an accuracy measured on so many images: sqrt(p (1 - p) / n), of the binomial distribution."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    packages = ("torch", "torchvision", "timm", "accelerate", "ffcv", "numpy")
    return {"python": platform.python_version(), "fastlt": __version__, **{p: version(p) for p in packages}}
