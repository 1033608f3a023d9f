"""Write the model of a finished run in a form that other programs read.

    fastlt export runs/mine --to timm                     # runs/mine/model, which a run also leaves at its end
    fastlt export runs/mine --to onnx --preprocess        # runs/mine/mine.onnx, which takes uint8 images
    fastlt export runs/mine --to torch --out mine.pt2
    fastlt export runs/mine --to timm --push OWNER/NAME   # to the Hugging Face hub, with a card
    fastlt export runs/a runs/b --to onnx                 # the mean of their probabilities

timm: a folder for timm.create_model("local-dir:FOLDER", pretrained=True). onnx: for onnxruntime and others, any number
of images a batch; needs the extra `export`. torch: a program of torch.export, any batch. torchscript: the older form.
Each is checked against the trained model on validation images of the run, or on those of --images where the data set is
not there any more. The largest difference of logits is printed; above 1e-4 nothing is written.
Exit code: 0 done, 2 for a run that cannot be exported so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastlt.arguments import make_parser, path

if TYPE_CHECKING:
    from torch import Tensor

    from fastlt.run.trained import TrainedRun

NAME = "fastlt export"
CHECKED = 32  # validation images


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code. ValueError for what cannot be exported."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="folders of finished runs, or of their models"
    )
    parser.add_argument("--to", required=True, choices=("timm", "onnx", "torch", "torchscript"), help="the form")
    parser.add_argument("--out", type=path, metavar="PATH", help="file, or folder of timm (default: in the run folder)")
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best", "smoothed"),
        help="which model of the last stage (default: the run's result)",
    )
    parser.add_argument("--preprocess", action="store_true", help="take uint8 images and normalise them inside")
    parser.add_argument("--images", nargs="+", type=path, metavar="FILE", help="images to check the export by")
    parser.add_argument("--push", metavar="REPO", help="upload to the Hugging Face hub as OWNER/NAME (form timm)")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that others cannot see")
    given = parser.parse_args(words)
    several = len(given.runs) > 1
    if given.to == "timm" and given.preprocess:
        raise ValueError("--preprocess is not for --to timm, whose config.json says how images are normalised")
    if given.to == "timm" and several:
        raise ValueError("--to timm is one network, and several runs are none; take --to onnx, torch or torchscript")
    if given.push and given.to != "timm":
        raise ValueError(f"--push uploads what timm reads, and --to is {given.to}; give --to timm")
    if given.private and not given.push:
        raise ValueError("--private says how --push uploads; give --push REPO")

    import torch

    from fastlt.run.trained import load_trained, read_finished

    for folder in given.runs:
        read_finished(folder)
    if given.to != "timm":
        from fastlt.export.programs import FORMS, check_installed

        check_installed(FORMS[given.to])
    if given.push:
        from fastlt.export.hub import check_push

        check_push(given.push)
    trained = [load_trained(folder, torch.device("cpu"), given.checkpoint) for folder in given.runs]
    out = given.out or _default_out(trained, given.to, given.checkpoint)
    if given.to == "timm":
        return _timm(trained[0], given.images, out, given.push, given.private)
    images, which = _images(trained[0], given.images)
    return _program(trained, images, which, out, given.to, given.preprocess or several)


def _default_out(trained: Sequence[TrainedRun], to: str, checkpoint: str | None) -> Path:
    """In the folder of the run; ValueError where that would hide what was asked for."""
    first = trained[0]
    if len(trained) > 1:
        raise ValueError("several runs have no folder in common; give --out FILE")
    if checkpoint is not None and checkpoint != first.run.select:
        raise ValueError(
            f"the {checkpoint} model is not the result of {first.run.folder}; give --out PATH, so that nobody takes it "
            "for that"
        )
    if to == "timm":
        from fastlt.run.folder import model_folder

        return model_folder(first.run.folder)
    from fastlt.export.programs import FORMS

    return first.run.folder / f"{first.recipe.name}{FORMS[to].suffix}"


def _images(trained: TrainedRun, files: list[Path] | None) -> tuple[Tensor, str]:
    """The images that the export is checked by, and which they are."""
    from fastlt.run.cut_images import images_of_files, validation_images

    data = trained.recipe.data
    if files:
        images = images_of_files(files, data)
        # Programs for any number of images are made from more than one.
        return images if len(images) > 1 else images.repeat(
            2, 1, 1, 1
        ), f"{len(files)} given image{'s' if len(files) > 1 else ''}"
    try:
        images = validation_images(data, CHECKED)
    except ValueError as error:
        raise ValueError(
            f"the data set of {trained.run.folder} cannot be read, and the export is checked by images ({error}); give "
            "some with --images FILE ..."
        ) from None
    return images, f"{len(images)} validation images"


def _timm(trained: TrainedRun, files: list[Path] | None, out: Path, repository: str | None, private: bool) -> int:
    from fastlt.run.model_folder import in_timm, write_model_folder
    from fastlt.run.trained import is_model_folder

    _, reason = in_timm(trained)
    if reason is not None:
        if repository is None and not is_model_folder(out):
            write_model_folder(trained, _images(trained, files)[0], out)
        held = f"fastlt.load reads it from {out}, " if is_model_folder(out) else ""
        raise ValueError(f"{reason}; {held}and for programs without fastlt export it --to onnx, torch or torchscript")
    images, which = _images(trained, files)
    written = write_model_folder(trained, images, out)
    print(f"{out}: the largest difference of logits is {written.difference:.2g}, on {which}")
    print(f'timm.create_model("local-dir:{out}", pretrained=True)')
    if repository:
        from fastlt.export.hub import push

        print(push(trained, repository, private=private))
    return 0


def _program(trained: Sequence[TrainedRun], images: Tensor, which: str, out: Path, to: str, preprocess: bool) -> int:
    from fastlt.export.checked import check_together, export, takes

    check_together(trained)
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file")
    difference = export(trained, to, images, out, preprocess=preprocess)
    gives = "logits" if len(trained) == 1 else "the log of the mean probability"
    print(f"{out}: the largest difference of {gives} is {difference:.2g}, on {which}")
    print(f"takes {takes(trained, preprocess=preprocess)}")
    return 0
