"""Writing an export and checking it: what differs from the trained model is not left behind."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.augment import normalise
from fastlt.ensemble import log_mean_probability
from fastlt.export.network import Exported, ExportedMean
from fastlt.export.programs import FORMS
from fastlt.run.checkpoint import RunFileError, not_written
from fastlt.run.folder import part_file
from fastlt.run.model_folder import LIMIT, largest_difference, logits
from fastlt.run.trained import TrainedRun


def export(runs: Sequence[TrainedRun], to: str, images: Tensor, out: Path, *, preprocess: bool) -> float:
    """Write a network, or the mean of several, to a file; returns the largest difference of its logits.

    An ONNX file with more than 2 GB of weights has them beside it, in a file that ends in .data.
    images: uint8 (N, 3, S, S), N > 1, by which it is checked, all at once and the first alone. ValueError when logits
    differ by more than 1e-4 or the network cannot be written in this form; nothing is left behind then.
    """
    form, folder = FORMS[to], part_file(out)
    part = folder / out.name
    network: nn.Module = Exported(runs[0], preprocess=preprocess) if len(runs) == 1 else ExportedMean(runs)
    given = images if preprocess else normalise(images, runs[0].mean, runs[0].std).contiguous()
    expected = expected_logits(runs, images)
    try:
        folder.mkdir(parents=True)
        try:
            form.write(network, given, part, description(runs, preprocess=preprocess))
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{_names(runs)} cannot be written as {to}: {_reason(error)}") from None
        with torch.no_grad():
            program = form.read(part)
            difference = max(
                largest_difference(program(given[:count]).float(), expected[:count]) for count in (1, len(images))
            )
        if not difference <= LIMIT:
            raise ValueError(
                f"the logits of {out.name} differ from the trained model's by {difference:.2g}, more than {LIMIT:g} is "
                "allowed; nothing was written"
            )
        for file in sorted(folder.iterdir(), key=lambda file: file == part):  # what another refers to goes first
            file.replace(out.with_name(file.name))
    except OSError as error:
        raise RunFileError(not_written(out, error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return difference


def expected_logits(runs: Sequence[TrainedRun], images: Tensor) -> Tensor:
    """What the trained networks give uint8 images, in float32: logits, or the log of their mean probability."""
    each = [logits(run.model, images, run) for run in runs]
    if len(each) == 1:
        return each[0]
    return log_mean_probability(each).float()


def check_together(runs: Sequence[TrainedRun]) -> None:
    """ValueError for runs that cannot be one network: of other classes, or images that are cut otherwise."""
    first = runs[0]
    for other in runs[1:]:
        for what, of in (
            ("classes", lambda run: run.class_names),
            ("data.image_size", lambda run: run.image_size),
            ("data.eval_crop", lambda run: (run.eval_crop, run.eval_ratio)),
        ):
            if of(first) != of(other):
                raise ValueError(
                    f"{first.run.folder} and {other.run.folder} cannot be one network: their {what} differ"
                )


def description(runs: Sequence[TrainedRun], *, preprocess: bool) -> dict[str, Any]:
    """What a file says of the model in it."""
    first = runs[0]
    ratio = first.eval_ratio if first.eval_crop == "center" else 1.0
    return {
        "made_by": f"fastlt {version('fastlt')}",
        "runs": [run.recipe.name for run in runs],
        "class_names": list(first.class_names),
        "input": takes(runs, preprocess=preprocess),
        "output": "logits" if len(runs) == 1 else "log of the mean probability",
        "image_size": first.image_size,
        "crop": f"{first.eval_crop}, {ratio:.6g} of the shorter side",
        "crop_ratio": ratio,
        "mean": list(first.mean),
        "std": list(first.std),
    }


def takes(runs: Sequence[TrainedRun], *, preprocess: bool) -> str:
    """What images an exported network takes, for a person."""
    first = runs[0]
    shape = f"(N, 3, {first.image_size}, {first.image_size})"
    cut = "whole images"
    if first.eval_crop == "center":
        cut = f"the central square of {first.eval_ratio:.4g} of the shorter side, shrunk by area or enlarged bilinearly"
    if preprocess:
        return f"uint8 {shape} RGB, {cut}; they are normalised inside"
    mean, std = (", ".join(f"{x:g}" for x in of) for of in (first.mean, first.std))
    return f"float32 {shape} RGB, {cut}, normalised as (x / 255 - mean) / std with mean ({mean}) and std ({std})"


def _names(runs: Sequence[TrainedRun]) -> str:
    return " and ".join(run.recipe.model.name for run in runs)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of it: exporters wrap errors in advice of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
