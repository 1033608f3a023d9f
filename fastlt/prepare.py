"""From a recipe's data section to a converted data set: the small ones are converted here, once, and reused."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from loaders.dataset import ConvertedDataset, convert
from loaders.ffcv_format import FfcvOptions

from fastlt.recipe import LIST_KEYS, SMALL_SOURCES, DataRecipe
from loaders.sources import open_source

# Which images are chosen does not depend on the seed of a run: runs under several seeds share one data set.
SPLIT_SEED = 0


def request(data: DataRecipe) -> dict[str, Any]:
    """What identifies a converted data set: the images asked for and how they are stored, not where they came from."""
    lists = {key: Path(getattr(data, key)).name if getattr(data, key) else None for key in LIST_KEYS}
    return {
        "source": data.source,
        **lists,
        "imbalance_factor": data.imbalance_factor,
        "convention": data.convention,
        "meta_per_class": data.meta_per_class,
        "mode": data.storage.mode,
        "max_resolution": data.storage.max_resolution,
        "jpeg_quality": data.storage.jpeg_quality,
    }


def default_folder(data: DataRecipe) -> Path:
    """`data/<source>-<digest>`: another request gets another folder, so none is ever overwritten."""
    digest = hashlib.sha256(json.dumps(request(data), sort_keys=True).encode()).hexdigest()[:8]
    return Path("data") / f"{data.source}-{digest}"


def conversion_command(data: DataRecipe, folder: Path) -> str:
    """The command that makes the data set a recipe asks for."""
    words = ["python", "tools/convert_dataset.py", data.source, "--out", str(folder), "--root", data.root or "DIR"]
    for key in LIST_KEYS:
        if getattr(data, key):
            words += [f"--{key.replace('_', '-')}", getattr(data, key)]
    if data.imbalance_factor is not None:
        words += ["--imbalance", f"{data.imbalance_factor:g}"]
    words += ["--meta-per-class", str(data.meta_per_class), "--mode", data.storage.mode]
    if data.storage.max_resolution is not None:
        words += ["--max-resolution", str(data.storage.max_resolution)]
    if data.storage.mode != "raw":
        words += ["--jpeg-quality", str(data.storage.jpeg_quality)]
    return shlex.join(words)


def prepare_dataset(data: DataRecipe, accelerator: Accelerator) -> ConvertedDataset:
    """The converted data set of a recipe; digits and CIFAR are converted by the main process when it is absent.

    ValueError, on every process, when there is none and it is not small, when the folder holds another one, or when
    the source cannot be read.
    """
    folder = Path(data.converted) if data.converted else default_folder(data)
    problem = [None]
    if accelerator.is_main_process:
        try:
            _make_sure(data, folder)
        except ValueError as error:
            problem = [str(error)]
    # The others learn of a failure instead of waiting for a data set that will not come.
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])
    return ConvertedDataset.open(folder)


def _make_sure(data: DataRecipe, folder: Path) -> None:
    if (folder / "manifest.json").exists():
        if not ConvertedDataset.open(folder).matches(request(data)):
            raise ValueError(
                f"data.converted: {folder} holds another data set than the recipe asks for; "
                f"see its manifest.json, or leave data.converted out to use {default_folder(data)}"
            )
        return
    if data.source not in SMALL_SOURCES:
        raise ValueError(f"{folder} holds no converted data set; make it with\n  {conversion_command(data, folder)}")
    source = open_source(
        data.source,
        root=data.root,
        download=data.download,
        imbalance_factor=data.imbalance_factor,
        convention=data.convention,
        meta_per_class=data.meta_per_class,
        seed=SPLIT_SEED,
    )
    storage = data.storage
    options = FfcvOptions(storage.mode, max_resolution=storage.max_resolution, jpeg_quality=storage.jpeg_quality)
    convert(source, folder, options=options, request=request(data))
