"""From stored images to batches on the device: one file a backend, and the table of them.

The table imports none of them, nor torch: recipes and command lines are checked against it in no time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from loaders.stored import FORMATS, SOURCE_FILES

if TYPE_CHECKING:
    from loaders.protocol import LoaderClass


@dataclass(frozen=True)
class Backend:
    """One way to read a split, and all that must be known of it before its module is imported.

    module, loader: where its class is and the name of that, a `base_loader.BaseLoader`. Its `check` says what it needs
        besides a split that can be opened.
    reads: the formats it reads, the preferred one first.
    streams: the format that loader "auto" reads with it where pixels are not kept on the device.
    can_augment: whether its pipeline can do `loaders.readers.dali_augment`.
    remote: whether it can read shards that are fetched meanwhile, and of which a part is on the disk.
    fewest_workers: the least `num_workers`; 0 where it can read in the main process.
    """

    name: str
    module: str
    loader: str
    reads: tuple[str, ...]
    streams: str | None = None
    can_augment: bool = False
    remote: bool = False
    fewest_workers: int = 1

    @property
    def needs_conversion(self) -> bool:
        """Whether it cannot read a source's own files."""
        return SOURCE_FILES not in self.reads

    def load(self) -> LoaderClass:
        """Its class; ValueError with advice when the library that it needs is absent."""
        return getattr(import_module(self.module), self.loader)


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("resident", "loaders.readers.resident_loader", "ResidentLoader", reads=(*FORMATS, SOURCE_FILES)),
        Backend("ffcv", "loaders.readers.ffcv_loader", "FfcvLoader", reads=("ffcv",), streams="ffcv"),
        Backend(
            "torch",
            "loaders.readers.torch_loader",
            "TorchLoader",
            reads=(*FORMATS, SOURCE_FILES),
            streams=SOURCE_FILES,
            remote=True,
            fewest_workers=0,
        ),
        Backend(
            "dali",
            "loaders.readers.dali_loader",
            "DaliLoader",
            reads=("dali", SOURCE_FILES),
            streams="dali",
            can_augment=True,
            remote=True,
        ),
        Backend(
            "resident_jpeg",
            "loaders.readers.resident_jpeg_loader",
            "ResidentJpegLoader",
            reads=("dali", "ffcv"),
            can_augment=True,
        ),
    )
}
AUTO = "auto"  # the loader that picks one of them
AUTO_READS = (*FORMATS, SOURCE_FILES)


def backends_that(accept: Callable[[Backend], bool]) -> list[str]:
    """The names of the backends that a property holds for."""
    return [name for name, backend in BACKENDS.items() if accept(backend)]


def formats_for(loader: str) -> tuple[str, ...]:
    """What to convert a data set to for `loader`: to .beton files, which most backends read, and to its own format."""
    preferred = AUTO_READS[0] if loader == AUTO else BACKENDS[loader].reads[0]
    return tuple(dict.fromkeys(("ffcv", preferred)))
