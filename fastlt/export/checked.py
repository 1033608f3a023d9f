"""Writing an export and checking it: what differs from the trained model is not left behind."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlt.augment import normalise
from fastlt.ensemble import log_mean_probability
from fastlt.export.network import Exported, ExportedMean
from fastlt.export.options import ExportOptions
from fastlt.export.programs import FORMS, Program
from fastlt.run.atomic_file import RunFileError, not_written
from fastlt.run.folder import part_file
from fastlt.run.model_folder import largest_difference, logits
from fastlt.run.trained import TrainedRun
from fastlt.version import __version__

OTHER_SIZES = ((1.5, 1.0), (1.0, 1.25), (0.75, 0.75))  # height and width over the side that was trained on
IN_OTHER_SIZES = 4  # images


def export(runs: Sequence[TrainedRun], to: str, images: Tensor, out: Path, options: ExportOptions) -> float:
    """Write a network, or the mean of several, to a file; returns the largest difference of its logits.

    An ONNX file with more than 2 GB of weights has them beside it, in a file that ends in .data.
    images: uint8 (N, 3, S, S), N > 1, by which it is checked, all at once and the first alone, and a few in other sizes
    where it takes these. ValueError when logits differ by more than `options.allowed`, or the network cannot be written
    so; nothing is left behind then.
    """
    form, folder = FORMS[to], part_file(out)
    part = folder / out.name
    checked = [Check.of(runs, images, options)]
    if options.dynamic_size:
        checked += _in_other_sizes(runs, images, options)
    network: nn.Module
    if len(runs) == 1:
        network = Exported(runs[0], preprocess=options.preprocess, dtype=options.dtype)
    else:
        network = ExportedMean(runs, options.dtype)
    try:
        folder.mkdir(parents=True)
        try:
            form.write(network, checked[0].given, part, description(runs, options), options)
            program = form.read(part)
            with torch.no_grad():
                difference = max(check.difference(program) for check in checked)
        except (OSError, ValueError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{_names(runs)} cannot be written as {to}{_for(options)}: {_reason(error)}") from None
        allowed = options.allowed(checked[0].expected)
        if not difference <= allowed:
            raise ValueError(
                f"the logits of {out.name} differ from the trained model's by {difference:.2g}, more than "
                f"{allowed:.2g} is allowed{_for(options)}; nothing was written"
            )
        for file in sorted(folder.iterdir(), key=lambda file: file == part):  # what another refers to goes first
            file.replace(out.with_name(file.name))
    except OSError as error:
        raise RunFileError(not_written(out, error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return difference


@dataclass(frozen=True)
class Check:
    """Images as an exported network takes them, and the logits that the trained one gives them, float32 (N, C)."""

    given: Tensor
    expected: Tensor

    @classmethod
    def of(cls, runs: Sequence[TrainedRun], images: Tensor, options: ExportOptions) -> Check:
        """images: uint8 (N, 3, H, W)."""
        given = images if options.preprocess else normalise(images, runs[0].mean, runs[0].std).contiguous()
        return cls(given, expected_logits(runs, images))

    def difference(self, program: Program) -> float:
        """The largest difference of a program's logits, for all images at once and for the first alone."""
        return max(
            largest_difference(program(self.given[:count]).float(), self.expected[:count])
            for count in (1, len(self.given))
        )


def _in_other_sizes(runs: Sequence[TrainedRun], images: Tensor, options: ExportOptions) -> list[Check]:
    """Checks of images that are larger, smaller and no squares; ValueError where a network takes one size alone."""
    side, checks = images.shape[-1], []
    for factors in OTHER_SIZES:
        size = tuple(math.ceil(factor * side) for factor in factors)
        resized = F.interpolate(images[:IN_OTHER_SIZES].float(), size).to(torch.uint8)
        try:
            checks.append(Check.of(runs, resized, options))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{_names(runs)} takes no images of {size[0]} x {size[1]} pixels, only of {side}, and so cannot be "
                f"written for any size ({_reason(error)}); leave dynamic_size out"
            ) from None
    return checks


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


def description(runs: Sequence[TrainedRun], options: ExportOptions) -> dict[str, Any]:
    """What a file says of the model in it."""
    first = runs[0]
    ratio = first.eval_ratio if first.eval_crop == "center" else 1.0
    return {
        "made_by": f"fastlt {__version__}",
        "runs": [run.recipe.name for run in runs],
        "class_names": list(first.class_names),
        "input": takes(runs, options),
        "precision": options.precision,
        "output": "logits" if len(runs) == 1 else "log of the mean probability",
        "image_size": first.image_size,
        "crop": f"{first.eval_crop}, {ratio:.6g} of the shorter side",
        "crop_ratio": ratio,
        "mean": list(first.mean),
        "std": list(first.std),
    }


def takes(runs: Sequence[TrainedRun], options: ExportOptions) -> str:
    """What images an exported network takes, for a person."""
    first = runs[0]
    shape = f"(N, 3, {first.image_size}, {first.image_size})"
    if options.dynamic_size:
        shape = f"(N, 3, H, W), trained on {shape},"
    cut = "whole images"
    if first.eval_crop == "center":
        cut = f"the central square of {first.eval_ratio:.4g} of the shorter side, shrunk by area or enlarged bilinearly"
    if options.preprocess:
        return f"uint8 {shape} RGB, {cut}; they are normalised inside"
    mean, std = (", ".join(f"{x:g}" for x in of) for of in (first.mean, first.std))
    return f"float32 {shape} RGB, {cut}, normalised as (x / 255 - mean) / std with mean ({mean}) and std ({std})"


def _for(options: ExportOptions) -> str:
    """With which options, for the end of a message; "" without any that others could be taken for."""
    said = [f"opset {options.opset}"] if options.opset is not None else []
    said += ["any size"] if options.dynamic_size else []
    said += ["half precision"] if options.precision == "fp16" else []
    return f" for {' and '.join(said)}" if said else ""


def _names(runs: Sequence[TrainedRun]) -> str:
    return " and ".join(run.recipe.model.name for run in runs)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong at the bottom of it: exporters wrap errors in advice of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
