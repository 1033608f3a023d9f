"""Shards that are fetched from a server on the loopback against the same shards on the disk.

    fastlt benchmark stream --images DIR

The JPEGs below DIR, repeated up to --count, are stored as they are, in a random order, in shards of --shard-images.
Random-resized crops of them are read by each of --loader. The rows:

    local, all shuffled      shards on the disk, the order of images
    local, by shards         the same shards in the order of shards
    streamed, empty cache    from the server, before each epoch no shard is on the disk
    streamed, small cache    the cache has room for what is in use and a quarter of the rest
    streamed, full cache     all shards are on the disk after the first epoch

img/s is the median over epochs, all rows in turns. `read` is the bytes from the server in an epoch over those of the
training shards, `hits` the share of shards that were on the disk. The server is nginx where it is installed.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastlt.arguments import make_parser, path, positive, worker_count
from fastlt.benchmarks.file_server import serve
from fastlt.benchmarks.images import repeated_photographs, source_of
from fastlt.benchmarks.options import add_device
from fastlt.benchmarks.rounds import IDLE_S, median_ratio, report
from fastlt.device.available import wait_for
from fastlt.device.host_memory import keep_freed_memory
from loaders.cores import available_cores
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.order.shard_order import ShardOrder
from loaders.protocol import BatchLoader
from loaders.readers import backends_that
from loaders.readers.prefetched_loader import PrefetchedLoader
from loaders.stored.convert import convert
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.streamed import StreamedDataset

NAME = "fastlt benchmark stream"


def main(arguments: list[str], prog: str = NAME) -> int:
    """Convert, serve, measure and print; returns the exit code. ValueError when there is no image."""
    remote = backends_that(lambda one: one.remote)
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("--images", type=path, metavar="DIR", required=True, help="folder with JPEGs")
    parser.add_argument("--count", type=positive, default=8192, help="images (default: 8192)")
    parser.add_argument("--shard-images", type=positive, default=64, help="a shard (default: 64)")
    parser.add_argument("--parts", type=positive, default=4, help="data.stream.parts (default: 4)")
    parser.add_argument("--block", type=positive, default=4, help="data.stream.block (default: 4)")
    parser.add_argument("--loader", nargs="+", default=remote, choices=remote, help="default: all that can")
    parser.add_argument("--size", type=positive, default=224, help="side of the crops (default: 224)")
    parser.add_argument("--batch", type=positive, default=128, help="batch size (default: 128)")
    parser.add_argument("--workers", type=worker_count, default=available_cores(), help="default: all cores")
    parser.add_argument("--rounds", type=positive, default=3, help="measured epochs of each (default: 3)")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    if torch.device(words.device).type == "cpu":
        keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = _convert(words, folder / "shards")
        with serve(dataset.root, folder / "server") as server, contextlib.ExitStack() as stack:
            ways = [
                way for backend in words.loader for way in _ways(words, backend, dataset, server.url, folder, stack)
            ]
            for _ in range(words.rounds + 1):  # the first epoch starts workers, and fills caches
                for way in ways:
                    way.run()
            _report(words, ways, server.name)
    return 0


def _convert(words: Namespace, folder: Path) -> ConvertedDataset:
    return convert(
        source_of(repeated_photographs(words.images, words.count)),
        folder,
        options=FfcvOptions("jpg", num_workers=words.workers),
        request={},
        formats=("dali",),
        allow_duplicates=True,
        progress=False,
        shard_images=words.shard_images,
        shuffle_seed=0,
    )


@dataclass(frozen=True)
class _Row:
    name: str
    img_s: float
    over_local: float
    read: float
    hits: float


@dataclass
class _Way:
    """One row. shards_bytes: of all training shards. empties: whether the cache is emptied before each epoch."""

    name: str
    loader: BatchLoader
    device: torch.device
    shards_bytes: int
    empties: Path | None = None
    speeds: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Measure another epoch."""
        for shard in () if self.empties is None else self.empties.glob("fastlt-*/dali/train-*.tar"):
            shard.unlink()
        time.sleep(IDLE_S)
        before, started = self._fetched(), time.perf_counter()
        images = sum(len(batch) for batch in self.loader.epoch(len(self.speeds)))
        wait_for(self.device)
        self.speeds.append(images / (time.perf_counter() - started))
        files, fetched, asked = (now - then for now, then in zip(self._fetched(), before, strict=True))
        self.read.append(fetched / self.shards_bytes)
        self.hits.append(1 - files / asked if asked else 1.0)

    def _fetched(self) -> tuple[int, int, int]:
        """Files and bytes that were fetched, and shards that were asked for, so far."""
        if not isinstance(self.loader, PrefetchedLoader):
            return 0, 0, 0
        figures = self.loader.shards.files.figures
        return figures.files, figures.bytes, self.loader.asked


def _ways(
    words: Namespace, backend: str, local: ConvertedDataset, url: str, folder: Path, stack: contextlib.ExitStack
) -> list[_Way]:
    order, device = ShardOrder(words.parts, words.block), torch.device(words.device)
    sizes = [path.stat().st_size for path in local.root.glob("dali/train-*.tar")]
    in_use = order.shards_in_use(1, 1) * max(sizes)
    small = in_use + sum(path.stat().st_size for path in local.root.rglob("*.npz")) + sum(sizes) // 4
    made = []
    for name, by_shards, limit in (
        ("local, all shuffled", None, None),
        ("local, by shards", order, None),
        ("streamed, empty cache", order, 1 << 50),
        ("streamed, small cache", order, small),
        ("streamed, full cache", order, 1 << 50),
    ):
        cache = folder / f"{backend} {name}"
        dataset = local if limit is None else StreamedDataset.open_url(url, cache, limit)
        loader = make_loader(
            dataset,
            "train",
            backend=backend,
            batch_size=words.batch,
            device=device,
            train=True,
            crop=CropSpec("random_resized", words.size),
            num_workers=words.workers,
            by_shards=by_shards,
        )
        stack.callback(loader.close)
        empties = cache if name == "streamed, empty cache" else None
        made.append(_Way(f"{backend}: {name}", loader, device, sum(sizes), empties))
    return made


def _report(words: Namespace, ways: list[_Way], server: str) -> None:
    rows, first = [], ways[0]
    for way in ways:
        if way.name.endswith("local, all shuffled"):
            first = way
        over = median_ratio(way.speeds[1:], first.speeds[1:])
        figures = statistics.median(way.speeds[1:]), over, statistics.mean(way.read[1:]), statistics.mean(way.hits[1:])
        rows.append(_Row(way.name, *figures))
    keys = ("count", "shard_images", "parts", "block", "size", "batch", "workers", "rounds", "device")
    settings = {key: getattr(words, key) for key in keys}
    settings |= {"MB": round(first.shards_bytes / 1e6), "server": server}
    settings |= {"torch": torch.__version__, "python": platform.python_version()}
    report(rows, settings, as_json=words.json, table=_print_table)


def _print_table(rows: list[_Row]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"{'':{width}}  {'img/s':>8}  {'x local':>7}  {'read':>6}  {'hits':>6}")
    for row in rows:
        print(f"{row.name:{width}}  {row.img_s:8,.0f}  {row.over_local:7.2f}  {row.read:6.2f}  {row.hits:6.0%}")
