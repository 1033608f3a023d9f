"""The content of `result.json`."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from fastlt.device.openmp import runtime
from fastlt.recipe.typed_yaml import to_tree
from fastlt.run.checkpoint import read_json
from fastlt.run.context import RunContext
from fastlt.run.folder import is_finished, result_file
from fastlt.run.progress import Progress


def recorded_result(context: RunContext) -> dict[str, Any] | None:
    """The result of a run that is finished, None while there is work left. ValueError when the file is damaged."""
    if not is_finished(context.folder):
        return None
    result = read_json(result_file(context.folder))
    context.say(f"{context.folder} is finished; nothing is left to do")
    return result


def make_result(
    context: RunContext, progress: Progress, metrics: dict[str, Any], best: dict[str, Any]
) -> dict[str, Any]:
    """Everything a reader needs beside the metrics of the test split.

    best: what the last stage's best checkpoint holds beside the model.
    """
    recipe, counts, device = context.recipe, context.counts, context.device
    return {
        "name": recipe.name,
        **metrics,
        "validation_top1": best["top1"],
        "best_iteration": best["iteration"],
        "class_names": list(counts.names),
        "class_counts": counts.counts.tolist(),
        "class_weights": None if progress.class_weights is None else progress.class_weights.tolist(),
        "shots": to_tree(counts.shots),
        "imbalance_factor": counts.imbalance_factor,
        "seed": recipe.seed,
        "precision": recipe.precision,
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "processes": context.reducer.world_size,
        "threads": torch.get_num_threads(),
        "openmp": runtime(),
        "iterations": progress.done,
        "train_s": progress.train_s,
        "img_s": progress.img_s,
        "data_wait_share": progress.data_wait_share,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    packages = ("fastlt", "torch", "torchvision", "timm", "accelerate", "ffcv", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
