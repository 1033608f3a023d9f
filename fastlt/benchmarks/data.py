"""The loaders, from converted files to uint8 batches on the device, against bare FFCV, bare DALI and torchvision.

    fastlt benchmark data --images DIR

Two kinds of jobs: random-resized crops of the JPEGs below DIR, repeated up to --count, once for each --storage; and
small images without a crop, those of CIFAR-10 (--cifar) or random ones of its size. Bare FFCV and DALI read the very
files that ours do and do the same work with their own operators and random numbers; torchvision's DataLoader decodes
the originals with PIL. All shuffle, and use --workers threads or processes. Without --images only the small images
are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlt.arguments import make_parser, path, positive, worker_count
from fastlt.benchmarks.bare_loaders import SAME_PIXELS, bare_dali, bare_ffcv, torchvision_loader
from fastlt.benchmarks.images import repeated_photographs, source_of
from fastlt.benchmarks.options import add_device
from fastlt.benchmarks.rounds import Row, interleaved, report_speeds, row
from fastlt.device.available import wait_for
from fastlt.device.host_memory import keep_freed_memory
from loaders.cores import available_cores
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.sources import ArraySplit, FileSplit
from loaders.sources.cifar import CIFAR10, read_cifar
from loaders.stored.convert import convert
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions

NAME = "fastlt benchmark data"
BOTH = ("ffcv", "dali")
BARE = {"fastlt ffcv": "bare ffcv", "fastlt dali": "bare dali", "fastlt resident_jpeg": "bare dali"}
STORAGES = {
    "jpg/own": FfcvOptions("jpg"),
    "jpg/256": FfcvOptions("jpg", max_resolution=256),
    "raw/256": FfcvOptions("raw", max_resolution=256),
}
TORCHVISION = "torchvision"


def main(arguments: list[str], prog: str = NAME) -> int:
    """Convert, measure and print; returns the exit code. ValueError when there is no image or a split is too small."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("--images", type=path, metavar="DIR", help="folder with JPEGs, searched with its subfolders")
    parser.add_argument("--count", type=positive, default=1024, help="photographs (default: 1024)")
    parser.add_argument("--small-count", type=positive, default=20_000, help="small images (default: 20000)")
    parser.add_argument("--cifar", type=path, metavar="DIR", help="folder that holds CIFAR-10, for the small images")
    parser.add_argument("--size", type=positive, default=224, help="side of the crops (default: 224)")
    parser.add_argument(
        "--storage",
        nargs="+",
        default=list(STORAGES),
        choices=STORAGES,
        help="the JPEGs as they are (and DALI's loaders), or .beton files of longer sides of 256 (default: all)",
    )
    parser.add_argument("--batch", type=positive, default=128, help="batch size (default: 128)")
    parser.add_argument("--workers", type=worker_count, default=available_cores(), help="default: all cores")
    parser.add_argument("--rounds", type=positive, default=5, help="measured epochs of each (default: 5)")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    if torch.device(words.device).type == "cpu":
        keep_freed_memory()  # as training does
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for storage in words.storage if words.images else ():
            rows += _measure_photographs(words, storage, Path(folder) / storage.replace("/", "-"))
        rows += _measure_small(words, Path(folder) / "small")
    settings = {key: getattr(words, key) for key in ("count", "small_count", "batch")}
    settings |= {key: getattr(words, key) for key in ("workers", "rounds", "device")}
    report_speeds(rows, as_json=words.json, settings=settings)
    return 0


def _measure_photographs(words: argparse.Namespace, storage: str, folder: Path) -> list[Row]:
    split = repeated_photographs(words.images, words.count)
    whole = storage == "jpg/own"
    dataset = _convert(
        split, folder, replace(STORAGES[storage], num_workers=words.workers), BOTH if whole else ("ffcv",)
    )
    backends = ("ffcv", "torch", "dali", "resident_jpeg") if whole else ("resident", "ffcv", "torch")
    return _measure(
        f"{storage} to {words.size} px", backends, dataset, split, CropSpec("random_resized", words.size), words
    )


def _measure_small(words: argparse.Namespace, folder: Path) -> list[Row]:
    if words.cifar is None:
        pixels = np.random.default_rng(0).integers(0, 256, (words.small_count, 8, 8, 3), dtype=np.uint8)
        pixels, origin = pixels.repeat(4, axis=1).repeat(4, axis=2), "random"
    else:
        train, _, _ = read_cifar(CIFAR10, words.cifar, download=False)
        pixels, origin = train.pixels[np.arange(words.small_count) % len(train)], "cifar10"
    labels = np.zeros(len(pixels), dtype=np.int64)
    split = ArraySplit.whole(pixels, labels, origin=origin, provenance="benchmark")
    dataset = _convert(split, folder, FfcvOptions("raw", num_workers=words.workers), BOTH)
    return _measure(
        "32 px" if words.cifar is None else "CIFAR-10",
        ("resident", "ffcv", "dali", "resident_jpeg", "torch"),
        dataset,
        split,
        CropSpec("none"),
        words,
    )


def _convert(
    split: ArraySplit | FileSplit, folder: Path, options: FfcvOptions, formats: tuple[str, ...]
) -> ConvertedDataset:
    source = source_of(split)
    return convert(source, folder, options=options, request={}, formats=formats, allow_duplicates=True, progress=False)


def _measure(
    job: str,
    backends: tuple[str, ...],
    dataset: ConvertedDataset,
    split: ArraySplit | FileSplit,
    crop: CropSpec,
    words: argparse.Namespace,
) -> list[Row]:
    device = torch.device(words.device)
    with contextlib.ExitStack() as stack:
        variants: dict[str, Callable[[], int]] = {}
        for backend in backends:
            loader = make_loader(
                dataset,
                "train",
                backend=backend,
                batch_size=words.batch,
                device=device,
                train=True,
                crop=crop,
                num_workers=words.workers,
            )
            stack.callback(loader.close)
            variants[f"fastlt {backend}"] = _Epochs(loader, device)
        same = {"crop": crop, "batch": words.batch, "workers": words.workers, "device": device}
        others = {"bare ffcv": bare_ffcv(dataset.beton("train"), **same)}
        if "dali" in dataset.formats:
            others["bare dali"] = bare_dali(dataset.shards("train"), **same, decoding=SAME_PIXELS)
            if crop.kind != "none":  # small images are stored as PNG, to which none of it applies
                others["bare dali, its defaults"] = bare_dali(dataset.shards("train"), **same, decoding={})
        others[TORCHVISION] = torchvision_loader(split, **same)
        for name, epoch in others.items():
            variants[name] = lambda epoch=epoch: _drain(epoch(), device)
        speeds = interleaved(variants, words.rounds)
    rows = [row(speeds, name, bare=BARE.get(name), torchvision=TORCHVISION, prefix=f"{job}: ") for name in speeds]
    for one in rows:  # the whole takes minutes: what is known already is said
        print(f"{one.name}: {one.img_s:,.0f} img/s", file=sys.stderr)
    return rows


class _Epochs:
    """Runs one of our loader's epochs a call, each another one."""

    def __init__(self, loader, device: torch.device) -> None:
        self.loader, self.device, self.number = loader, device, 0

    def __call__(self) -> int:
        self.number += 1
        return _drain((batch.images for batch in self.loader.epoch(self.number)), self.device)


def _drain(batches: Iterable[Tensor], device: torch.device) -> int:
    """The number of images of all batches, once they have arrived on the device."""
    images = 0
    for batch in batches:
        assert batch.device.type == device.type, batch.device
        images += len(batch)
    wait_for(device)
    return images
