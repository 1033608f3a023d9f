"""A trained model in the form of another program: `fastlt export`, and `export` of what `fastlt.load` gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fastlt.export.checked import check_together, export, takes
from fastlt.export.options import TIMM, ExportOptions
from fastlt.export.programs import FORMS, check_installed, check_opset
from fastlt.names import pick
from fastlt.run.cut_images import images_of_files, validation_images
from fastlt.run.folder import model_folder
from fastlt.run.model_folder import in_timm, write_model_folder
from fastlt.run.trained import TrainedRun, is_model_folder

CHECKED = 32  # validation images
TARGETS = (TIMM, *FORMS)


@dataclass(frozen=True)
class ExportedModel:
    """What was written.

    path: the file, or the folder of timm.
    difference: the largest one of its logits from the trained model's. images: on which, in words.
    takes: which images it takes, in words; timm's folder says it in its config.json.
    """

    path: Path
    difference: float
    images: str
    takes: str


def check_export(to: str, options: ExportOptions, *, several: bool) -> None:
    """ValueError for what can be refused before a model is read. several: whether runs are put together."""
    pick("form", to, dict.fromkeys(TARGETS))
    options.check(to, several=several)
    if to in FORMS:
        check_installed(FORMS[to])
    if options.opset is not None:
        check_opset(options.opset)


def export_model(
    trained: Sequence[TrainedRun],
    to: str,
    out: Path | None = None,
    *,
    options: ExportOptions,
    images: Sequence[Path] | None = None,
) -> ExportedModel:
    """Write a trained model, or the mean of several, on the CPU, in the form `to` of TARGETS.

    out: the file, or the folder of timm; None is in the folder of the run. images: files to check the export by; None
    takes validation images. ValueError for what cannot be written so, and when logits differ by more than
    `options.allowed`; nothing is left behind then.
    """
    several = len(trained) > 1
    check_export(to, options, several=several)
    out = _place(trained, to) if out is None else out
    if to == TIMM:
        return _to_timm(trained[0], images, out)
    check_together(trained)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give --out the name of a file")
    if several:  # each network normalises for itself
        options = replace(options, preprocess=True)
    pixels, which = _images(trained[0], images)
    difference = export(trained, to, pixels, out, options)
    return ExportedModel(out, difference, which, takes(trained, options))


def _place(trained: Sequence[TrainedRun], to: str) -> Path:
    """In the folder of the run; ValueError where that would hide what was asked for."""
    first = trained[0]
    if len(trained) > 1:
        raise ValueError("several runs have no folder in common; give --out FILE")
    if first.select != first.run.select and not is_model_folder(first.run.folder):
        raise ValueError(
            f"the {first.select} model is not the result of {first.run.folder}; give --out PATH (out= in Python), so "
            "that nobody takes it for that"
        )
    if to == TIMM:
        return model_folder(first.run.folder)
    return first.run.folder / f"{first.recipe.name}{FORMS[to].suffix}"


def _images(trained: TrainedRun, files: Sequence[Path] | None) -> tuple[Tensor, str]:
    """The images that the export is checked by, and which they are."""
    data = trained.recipe.data
    if files:
        images = images_of_files(files, data)
        which = f"{len(files)} given image{'s' if len(files) > 1 else ''}"
        # Programs for any number of images are made from more than one.
        return images if len(images) > 1 else images.repeat(2, 1, 1, 1), which
    try:
        images = validation_images(data, CHECKED)
    except ValueError as error:
        raise ValueError(
            f"the data set of {trained.run.folder} cannot be read, and the export is checked by images ({error}); give "
            "some with --images FILE ... (images= in Python)"
        ) from None
    return images, f"{len(images)} validation images"


def _to_timm(trained: TrainedRun, files: Sequence[Path] | None, out: Path) -> ExportedModel:
    """ValueError where timm cannot compute it; the folder is then there for fastlt."""
    network, reason = in_timm(trained)
    if network is None:
        of_result = trained.select == trained.run.select
        own = of_result and out.resolve() == model_folder(trained.run.folder).resolve()
        if not (own and is_model_folder(out)):
            write_model_folder(trained, _images(trained, files)[0], out)
        raise ValueError(
            f"{reason}; fastlt.load reads it from {out}, and for programs without fastlt export it --to onnx, torch or "
            "torchscript"
        )
    images, which = _images(trained, files)
    written = write_model_folder(trained, images, out)
    own = "" if reason is None else f"; {reason}: import fastlt.models before"
    return ExportedModel(out, written.difference, which, f"what its config.json says{own}")
