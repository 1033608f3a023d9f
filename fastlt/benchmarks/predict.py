"""Predicting a folder of JPEGs against the evaluation loop on the same images, converted before.

    fastlt benchmark predict --images DIR
    fastlt benchmark predict --images DIR --count 10000 --model resnet18 --storage jpg/own raw/256

Both run the same untrained network in turns, on the JPEGs below DIR, repeated up to --count. Evaluation reads .beton
files and counts right answers, as a run does it. Prediction reads the JPEGs themselves, keeps the five best classes of
each, and does what the conversion did: it scales, too, where --storage has a size. `x bare` is over the evaluation
loop.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD

from fastlt.arguments import make_parser, path, positive, worker_count
from fastlt.augment import normalise
from fastlt.benchmarks.data import STORAGES
from fastlt.benchmarks.images import of_one_class, photographs, source_of
from fastlt.benchmarks.options import add_device
from fastlt.benchmarks.rounds import Row, interleaved, report_speeds, row
from fastlt.device.available import wait_for
from fastlt.device.host_memory import keep_freed_memory
from fastlt.inference.predictor import BATCH_SIZE, Predictor
from fastlt.inference.priors import CarriedPrior
from fastlt.inference.transform import EvaluationTransform
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import Classifier, build_model
from fastlt.run.loading import EVALUATION_BATCH
from fastlt.run.metrics import Metrics
from fastlt.state import ClassCounts
from loaders.cores import available_cores
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.protocol import BatchLoader
from loaders.stored.as_stored import Storage
from loaders.stored.convert import convert

NAME = "fastlt benchmark predict"
CLASSES = 100


def main(arguments: list[str], prog: str = NAME) -> int:
    """Convert, measure and print; returns the exit code. ValueError when there is no image."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("--images", type=path, required=True, metavar="DIR", help="folder with JPEGs, and all below it")
    parser.add_argument("--count", type=positive, default=1000, help="images (default: 1000)")
    parser.add_argument("--model", default="resnet18", help="a network of timm, or ours (default: resnet18)")
    parser.add_argument("--size", type=positive, default=224, help="side of the crops (default: 224)")
    parser.add_argument(
        "--storage",
        nargs="+",
        default=["jpg/own"],
        choices=STORAGES,
        help="what evaluation reads: the JPEGs in their size, or with longer sides of 256 (default: jpg/own)",
    )
    parser.add_argument(
        "--batch", type=positive, default=BATCH_SIZE, help=f"of the prediction; evaluation has {EVALUATION_BATCH}"
    )
    parser.add_argument("--workers", type=worker_count, default=available_cores(), help="default: all cores")
    parser.add_argument("--rounds", type=positive, default=3, help="measured passes of each (default: 3)")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    found = photographs(words.images)
    device = torch.device(words.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = build_model(words.model, num_classes=CLASSES, image_size=words.size).to(device).eval()
    model.to(memory_format=torch.channels_last)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = _repeated(found, Path(folder), words.count)
        for storage in words.storage:
            rows += _measure(words, storage, files, Path(folder) / storage.replace("/", "-"), model, device)
    keys = ("count", "model", "size", "batch", "workers", "rounds", "device")
    report_speeds(rows, as_json=words.json, settings={key: getattr(words, key) for key in keys})
    return 0


def _repeated(found: Sequence[Path], folder: Path, count: int) -> list[Path]:
    """So many files, links to those that were found: each is read by a path of its own."""
    (folder / "images").mkdir()
    files = [folder / "images" / f"{i:06}.jpg" for i in range(count)]
    for i, file in enumerate(files):
        os.symlink(found[i % len(found)].absolute(), file)
    return files


def _measure(
    words: argparse.Namespace, storage: str, files: list[Path], folder: Path, model: Classifier, device: torch.device
) -> list[Row]:
    """The rows of one way to store the images that evaluation reads."""
    source = source_of(of_one_class(files[0].parent, [file.name for file in files]), "test")
    options = replace(STORAGES[storage], num_workers=words.workers)
    dataset = convert(source, folder, options=options, request={}, allow_duplicates=True, progress=False)
    crop = CropSpec("center", words.size)
    predictor = Predictor(
        model,
        ClassCounts(np.ones(CLASSES, dtype=np.int64), tuple(f"class {c}" for c in range(CLASSES))),
        CarriedPrior(np.full(CLASSES, 1 / CLASSES)),
        EvaluationTransform(words.size, crop, Storage(options.mode == "jpg", options.max_resolution), MEAN, STD),
        device,
    )
    options_of_loader = {"batch_size": EVALUATION_BATCH, "train": False, "crop": crop, "num_workers": words.workers}
    with contextlib.closing(make_loader(dataset, "test", backend="ffcv", device=device, **options_of_loader)) as loader:
        evaluation, prediction = f"{storage}: evaluation loop", f"{storage}: predict"
        variants: dict[str, Callable[[], int]] = {
            evaluation: lambda: _evaluate(model, loader, device),
            prediction: lambda: len(predictor.predict(files, batch_size=words.batch, workers=words.workers)),
        }
        speeds = interleaved(variants, words.rounds)
    return [row(speeds, name, bare=evaluation) for name in variants]


def _evaluate(model: Classifier, loader: BatchLoader, device: torch.device) -> int:
    """One pass as `fastlt.run.evaluation.Evaluation` makes it; the number of images."""
    metrics = Metrics(CLASSES, device=device)
    with evaluation_mode(model):
        for batch in loader.epoch(0):
            metrics.update(model(normalise(batch.images, MEAN, STD, torch.float32)), batch.labels)
    wait_for(device)
    return int(metrics.total.sum())
