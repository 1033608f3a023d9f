"""What a conversion changes, pixels and the decisions of a pretrained network; and how much CPU time it takes.

    fastlt benchmark conversion --images DIR --weights FILE
    fastlt benchmark conversion --images DIR --weights FILE --model tf_efficientnet_lite0 --size 224
    fastlt benchmark conversion --images DIR --cpu 2000

The images are converted in several ways. With --cpu, that many images are converted, those of the folder again and
again: by fastlt from the check to the manifest, and by FFCV's own writer, which gets Pillow's images. The table has the
CPU time of all processes, user and system, the median of the rounds, in which the two take turns.

With --weights, the network sees the central crop of each, once of the original file and once
of what was stored. The table has the mean difference of the pixels of that crop in levels of 255, the share of images
whose top-1 class is another one, and the mean and largest difference of the probability of the top-1 class.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastlt.arguments import make_parser, path, positive
from fastlt.augment import normalise
from fastlt.benchmarks.images import of_one_class, source_of
from fastlt.models import build_model
from fastlt.models.classifier import check_model
from fastlt.models.pretrained import config_of, input_config
from loaders.cores import available_cores
from loaders.order.crop import CropSpec
from loaders.sources import FileSplit
from loaders.sources.decode import EXTENSIONS
from loaders.stored.as_stored import cut
from loaders.stored.beton import Beton
from loaders.stored.convert import convert
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.ffcv_kernels import kernels
from loaders.stored.image_check import check_images
from loaders.stored.piece_writer import write_split
from loaders.stored.progress import progress_bar

NAME = "fastlt benchmark conversion"
RATIO = 0.875  # of the central crop's side to the shorter side
BATCH = 32
WAYS = {
    "raw": FfcvOptions("raw"),
    "jpg": FfcvOptions("jpg"),
    "raw, 400 px": FfcvOptions("raw", max_resolution=400),
    "jpg, 400 px": FfcvOptions("jpg", max_resolution=400),
    "jpg, 256 px": FfcvOptions("jpg", max_resolution=256),
    "jpg, 256 px, quality 75": FfcvOptions("jpg", max_resolution=256, jpeg_quality=75),
}
CPU_WAYS = {name: options for name, options in WAYS.items() if options.jpeg_quality == FfcvOptions.jpeg_quality}


def main(arguments: list[str], prog: str = NAME) -> int:
    """Convert, compare and print; returns the exit code. ValueError when there is no image."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument(
        "--images", type=path, required=True, metavar="DIR", help="folder of images, with its subfolders"
    )
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="of timm (default: tf_efficientnet_lite0)")
    parser.add_argument("--weights", type=path, metavar="FILE", help="its pretrained weights")
    parser.add_argument("--size", type=positive, default=224, help="side of the crop (default: 224)")
    parser.add_argument("--cpu", type=positive, metavar="N", help="measure the CPU time of converting N images")
    parser.add_argument("--rounds", type=positive, default=3, help="of the CPU time (default: 3)")
    parser.add_argument("--workers", type=positive, default=available_cores(), help="processes (default: all cores)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    if (words.cpu is None) == (words.weights is None):
        parser.error("give --weights FILE or --cpu N")
    paths = sorted(str(p.relative_to(words.images)) for p in words.images.rglob("*") if p.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"{words.images} has no image: give a folder of images")
    split = of_one_class(words.images, paths)
    trained = None if words.weights is None else _trained(words.model, words.weights, words.size)
    good = check_images(split).good
    split = split.subset(good)
    if not len(split):
        raise ValueError(f"none of the {len(paths)} images below {words.images} can be decoded")
    if trained is None:
        _measure_cpu(split.subset(np.arange(words.cpu) % len(split)), words)
    else:
        _compare(split, *trained, words)
    return 0


def _measure_cpu(split: FileSplit, words: argparse.Namespace) -> None:
    rows = {}
    with progress_bar("converted", 2 * len(split) * len(CPU_WAYS) * words.rounds, not words.json) as advance:
        for name, options in CPU_WAYS.items():
            options = replace(options, num_workers=words.workers)
            writers = {"ffcv": _write_with_ffcv, "fastlt": _convert}
            seconds: dict[str, list[float]] = {writer: [] for writer in writers}
            for _ in range(words.rounds):
                for writer, write in writers.items():
                    seconds[writer].append(_cpu_seconds(write, split, options))
                    advance(len(split))
            medians = {writer: statistics.median(of_writer) for writer, of_writer in seconds.items()}
            rows[name] = {**medians, "ratio": medians["fastlt"] / medians["ffcv"], "rounds": seconds}
    if words.json:
        print(json.dumps({"images": len(split), "workers": words.workers, "cpu_seconds": rows}))
        return
    print(f"{len(split)} images, {words.workers} processes, medians of {words.rounds} rounds")
    print(f"{'stored as':26}{'FFCV, CPU s':>13}{'fastlt, CPU s':>15}{'ratio':>8}{'ms an image':>13}")
    for name, row in rows.items():
        an_image = 1000 * row["fastlt"] / len(split)
        print(f"{name:26}{row['ffcv']:>13.2f}{row['fastlt']:>15.2f}{row['ratio']:>8.2f}{an_image:>13.2f}")


def _cpu_seconds(write: Callable[[FileSplit, FfcvOptions], None], split: FileSplit, options: FfcvOptions) -> float:
    """The CPU time of a conversion in a process of its own, and of those that it starts."""
    kernels()  # importing FFCV is no part of it
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = multiprocessing.get_context("fork").Process(target=write, args=(split, options))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a conversion as {options.mode} failed (exit code {process.exitcode})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _convert(split: FileSplit, options: FfcvOptions) -> None:
    source = source_of(split)
    with tempfile.TemporaryDirectory() as folder:
        convert(source, Path(folder) / "out", options=options, request={}, allow_duplicates=True, progress=False)


class _PillowImages:
    """The images as FFCV's writer is usually given them."""

    def __init__(self, split: FileSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        with Image.open(self.split.name(i)) as image:
            return image.convert("RGB"), int(self.split.labels[i])


def _write_with_ffcv(split: FileSplit, options: FfcvOptions) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    cv2.setNumThreads(0)  # its threads do not survive a fork
    longest: Any = options.max_resolution  # None is its default, which its types deny
    image = RGBImageField(options.mode, longest, jpeg_quality=options.jpeg_quality)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
        fields = {"image": image, "label": IntField()}
        writer = DatasetWriter(str(Path(folder) / "images.beton"), fields, num_workers=options.num_workers or 1)
        writer.from_indexed_dataset(_PillowImages(split))


def _compare(
    split: FileSplit, model: nn.Module, prepare: Callable[[Tensor], Tensor], words: argparse.Namespace
) -> None:
    rows = {}
    with progress_bar("stored and compared", len(split) * len(WAYS), not words.json) as advance:
        originals = _crops(split, words.size)
        before = _probabilities(model, prepare, originals)
        for name, options in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                write_split(Path(folder), "images", split, options, ("ffcv",))
                crops = _crops(Beton(Path(folder) / "images.beton"), words.size)
            changed, after = (crops != originals).any(axis=(1, 2, 3)), before.clone()
            if changed.any():
                after[torch.from_numpy(changed)] = _probabilities(model, prepare, crops[changed])
            rows[name] = _difference(before, after, originals, crops)
            advance(len(split))
    if words.json:
        print(json.dumps({"images": len(split), "model": words.model, "size": words.size, "rows": rows}))
        return
    print(f"{len(split)} images, {words.model}, central crops of {words.size} px")
    print(f"{'stored as':26}{'pixels':>9}{'other top-1 %':>15}{'probability':>13}{'at most':>9}")
    for name, row in rows.items():
        print(
            f"{name:26}{row['pixels']:>9.2f}{100 * row['other_top1']:>15.1f}{row['probability']:>13.4f}"
            f"{row['largest']:>9.3f}"
        )


def _crops(images: FileSplit | Beton, size: int) -> np.ndarray:
    """The central crops, uint8 (N, size, size, 3)."""
    crop = CropSpec("center", size, ratio=RATIO)
    crops = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for i in range(len(images)):
        cut(images.image(i), crop, crops[i])
    return crops


def _trained(name: str, weights: Path, size: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network with its head, and what normalises uint8 images (N, 3, S, S) for it. ValueError for other weights."""
    check_model(name, False, None)
    config = config_of(name)
    prepared, classes = input_config(config), config.get("num_classes", 1000)
    model = build_model(name, num_classes=classes, checkpoint=weights, image_size=size).eval()
    if not model.head_is_trained:
        raise ValueError(f"{weights} has no head for the {classes} classes of {name}: there would be no decisions")
    return model, lambda images: normalise(images, prepared.mean, prepared.std)


@torch.inference_mode()
def _probabilities(model: nn.Module, prepare: Callable[[Tensor], Tensor], crops: np.ndarray) -> Tensor:
    """The softmax of each crop, float32 (N, C)."""
    batches = torch.from_numpy(crops).permute(0, 3, 1, 2).split(BATCH)
    return torch.cat([model(prepare(batch)).softmax(1) for batch in batches])


def _difference(before: Tensor, after: Tensor, originals: np.ndarray, crops: np.ndarray) -> dict[str, float]:
    """pixels: mean difference in levels. other_top1: share. probability, largest: of the originals' top-1 class."""
    top = before.argmax(1)
    rows = torch.arange(len(top))
    gap = (before[rows, top] - after[rows, top]).abs()
    return {
        "pixels": float(np.abs(originals.astype(np.int16) - crops).mean()),
        "other_top1": float((after.argmax(1) != top).float().mean()),
        "probability": gap.mean().item(),
        "largest": gap.max().item(),
    }
