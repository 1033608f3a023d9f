"""From a recipe's data section to a converted data set: the small ones are converted here, once, and reused."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from fastlt.recipe import CHOICE_KEYS, DataRecipe
from fastlt.run.main_process import on_main, on_nodes
from fastlt.run.processes import connect
from loaders.readers import BACKENDS, formats_for
from loaders.sources import SOURCES, Source, open_source
from loaders.sources.cut import split_text
from loaders.stored.atomic_folder import MANIFEST, ConversionRunningError
from loaders.stored.cached_folder import default_cache
from loaders.stored.convert import conversion_request, convert
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.manifest import as_json
from loaders.stored.remote_folder import is_url
from loaders.stored.streamed import StreamedDataset
from loaders.stored.unconverted import UnconvertedDataset


def request(data: DataRecipe) -> dict[str, Any]:
    """What identifies the converted data set that a recipe asks for."""
    return conversion_request(data.source, **_choices(data), options=_options(data))


def _choices(data: DataRecipe) -> dict[str, Any]:
    """Which images are chosen. The seed of a run is not among it: runs under several seeds share one data set."""
    return {key: getattr(data, key) for key in CHOICE_KEYS}


def _check_format(data: DataRecipe, folder: Path) -> None:
    """ValueError when the folder holds none of the formats that the recipe's loader reads."""
    formats = ConvertedDataset.open(folder).formats
    if data.loader in BACKENDS and not set(formats) & set(BACKENDS[data.loader].reads):
        raise ValueError(
            f"data.loader is {data.loader!r}, but {folder} was converted to {' and '.join(formats)} only; choose "
            f"another loader, or convert it anew with\n  {conversion_command(data, folder, overwrite=True)}"
        )


def _options(data: DataRecipe) -> FfcvOptions:
    storage = data.storage
    return FfcvOptions(storage.mode, max_resolution=storage.max_resolution, jpeg_quality=storage.jpeg_quality)


def _formats(data: DataRecipe) -> tuple[str, ...]:
    """What to convert the data set of a recipe to, where it is converted for it."""
    shards = ("dali",) if data.order == "shards" else ()
    return tuple(dict.fromkeys((*formats_for(data.loader), *shards)))


def default_folder(data: DataRecipe) -> Path:
    """`data/<source>-<digest>`: another request gets another folder, so none is ever overwritten."""
    digest = hashlib.sha256(json.dumps(request(data), sort_keys=True).encode()).hexdigest()[:8]
    return Path("data") / f"{data.source}-{digest}"


def converted_folder(data: DataRecipe) -> Path:
    """Where the converted data set of a recipe lies, or is to lie."""
    return Path(data.converted) if data.converted else default_folder(data)


def conversion_command(data: DataRecipe, folder: Path, *, overwrite: bool = False) -> str:
    """The command that makes the data set a recipe asks for."""
    words = ["fastlt", "convert", data.source, "--out", str(folder)]
    if "root" in SOURCES[data.source].takes:
        words += ["--root", data.root or "DIR"]
    for key in CHOICE_KEYS:
        value = getattr(data, key)
        if value and (key, value) != ("convention", "paper"):
            option = "imbalance" if key == "imbalance_factor" else key.replace("_", "-")
            text = split_text(value) if key == "split" else str(value)
            words += [f"--{option}", text.removesuffix(".0") if isinstance(value, float) else text]
    words += ["--mode", data.storage.mode]
    if len(_formats(data)) > 1:
        words += ["--format", "both"]
    if data.storage.max_resolution is not None:
        words += ["--max-resolution", str(data.storage.max_resolution)]
    if data.storage.mode != "raw":
        words += ["--jpeg-quality", str(data.storage.jpeg_quality)]
    if overwrite:
        words.append("--overwrite")
    return shlex.join(words)


def prepare_dataset(data: DataRecipe, accelerator: Accelerator) -> ConvertedDataset | UnconvertedDataset:
    """The data set of a recipe; a small source is converted when it is absent, once on each machine that lacks it.

    ValueError, on every process, when there is none and it is not small, when the folder holds another one, or when
    the source cannot be read.
    """
    if not data.convert:
        return on_main(accelerator, lambda: _read_source(data))
    if is_url(data.converted):
        return _prepare_remote(data, accelerator)
    folder = converted_folder(data)
    on_main(accelerator, lambda: ensure_converted(data, folder))
    on_nodes(connect(), lambda: ensure_converted(data, folder))
    return ConvertedDataset.open(folder)


def _prepare_remote(data: DataRecipe, accelerator: Accelerator) -> StreamedDataset:
    """The remote data set of a recipe; one process of each node fetches what has to be there before work starts."""

    def first() -> str:
        dataset = open_remote(data, progress=True)
        _check_request(data, dataset.place, dataset.manifest["request"])
        return dataset.seal

    def of_node() -> None:
        open_remote(data, seal)

    seal = on_main(accelerator, first)
    on_nodes(connect(), of_node)
    return open_remote(data, seal)


def open_remote(data: DataRecipe, seal: str | None = None, *, progress: bool = False) -> StreamedDataset:
    """The remote data set of a recipe. ValueError as `StreamedDataset.open_url`."""
    assert data.converted is not None
    cache = Path(data.stream.cache) if data.stream.cache else default_cache()
    limit = int(data.stream.cache_gb * 1e9)
    return StreamedDataset.open_url(data.converted, cache, limit, seal=seal, progress=progress)


def open_converted(data: DataRecipe) -> ConvertedDataset:
    """The converted data set of a recipe, in its folder or at its URL. ValueError when it is not there."""
    return open_remote(data) if is_url(data.converted) else ConvertedDataset.open(converted_folder(data))


def existing_dataset(data: DataRecipe) -> ConvertedDataset | UnconvertedDataset:
    """The data set of a recipe as it lies there: nothing is converted, nor fetched into `root`.

    ValueError when it is not there.
    """
    if not data.convert:
        return _read_source(replace(data, download=False))
    return open_converted(data)


def _read_source(data: DataRecipe) -> UnconvertedDataset:
    dataset = UnconvertedDataset.open(open_data_source(data), Path(data.root or data.source))
    for note in dataset.notes:
        tqdm.write(note)
    return dataset


def open_data_source(data: DataRecipe) -> Source:
    """The source that a recipe names, with the splits that it asks for. ValueError where it cannot be read."""
    return open_source(
        data.source,
        root=data.root,
        num_classes=data.num_classes,
        download=data.download,
        **_choices(data),
    )


def ensure_converted(data: DataRecipe, folder: Path) -> None:
    """Convert into `folder` unless what the recipe asks for is there; for one process. ValueError as above.

    A conversion that another run has begun is waited for.
    """
    source, told = None, False
    while not (folder / MANIFEST).exists():
        if not SOURCES[data.source].small:
            raise ValueError(
                f"{folder} holds no converted data set; make it with\n  {conversion_command(data, folder)}"
            )
        source = source or open_data_source(data)
        try:
            convert(source, folder, options=_options(data), request=request(data), formats=_formats(data))
            return
        except ConversionRunningError:
            if not told:
                print(f"fastlt: waiting for another run to convert images into {folder}", file=sys.stderr, flush=True)
            told = True
        except ValueError:
            if not (folder / MANIFEST).exists():  # else that other run has just finished
                raise
    _check_request(data, folder, ConvertedDataset.open(folder).manifest["request"])
    _check_format(data, folder)


def _check_request(data: DataRecipe, folder: Path | str, made_from: dict[str, Any]) -> None:
    """ValueError when the folder, or the URL, holds other images than the recipe asks for.

    Where the recipe names the folder, the way in which images are stored is not compared, and list files, columns and
    shares only where the recipe names them.
    """
    wanted = request(data)
    if data.converted:
        always = "source", "imbalance_factor", "convention", "meta_per_class"
        named = [key for key in CHOICE_KEYS if wanted.get(key) is not None]
        wanted = as_json({key: wanted[key] for key in (*always, *named)})
    wrong = [f"{k} is {made_from.get(k)!r}, not {v!r}" for k, v in wanted.items() if made_from.get(k) != v]
    if wrong:
        raise ValueError(
            f"{folder} holds another data set than the recipe asks for: {'; '.join(wrong)}. "
            f"Convert into another folder and name it in data.converted, or change the recipe"
        )
