"""Which images of which source: the options that `fastlt convert` and `fastlt inspect` share."""

from __future__ import annotations

import argparse
import math
from typing import Any

from fastlt.arguments import path, whole
from loaders.order.longtail import CONVENTIONS
from loaders.sources import Source, open_source, sources_taking
from loaders.sources.cut import DEFAULT_SPLIT, check_split, split_text

# Options that some sources have no use for, under the names of the arguments of `open_source` that they become.
SOME_SOURCES = (
    *("root", "train_list", "meta_list", "test_list", "image_column", "label_column", "split_column", "class_names"),
    *("split", "split_seed", "convention", "download", "allow_duplicates"),
)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The group of options that say which images are meant."""
    data = parser.add_argument_group("which images")
    data.add_argument("--root", type=path, metavar="DIR", help="folder with the images (not needed for digits)")
    for split in ("train", "meta", "test"):
        what = "lines of `relative/path label`, a table, or COCO's JSON, by the source"
        data.add_argument(f"--{split}-list", type=path, metavar="FILE", help=f"the {split} images: {what}")
    for what in ("image", "label", "split"):
        data.add_argument(f"--{what}-column", metavar="NAME", help=f"of a table: its column of {what}s")
    data.add_argument("--class-names", type=path, metavar="FILE", help="names of the classes: lines of `class name`")
    data.add_argument("--split", type=shares, metavar="T/V/E", help="draw train, validation and test: 0.8/0.1/0.1")
    data.add_argument("--split-seed", type=whole(0), default=0, metavar="N", help="of what is drawn (0)")
    data.add_argument("--num-classes", type=whole(1), metavar="C", help="what the data set must have")
    data.add_argument("--imbalance", type=imbalance, metavar="IF", help="cut a long tail, largest over smallest class")
    data.add_argument("--convention", choices=sorted(CONVENTIONS), help="how CIFAR is cut (default: paper)")
    data.add_argument("--meta-per-class", type=whole(1), default=10, metavar="N", help="validation images (10)")
    data.add_argument("--no-download", action="store_true", help="do not fetch CIFAR when it is not under --root")


def refuse_foreign_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace, source: str | None) -> None:
    """End with a usage error where an option was given that `source` has no use for."""
    for argument in SOME_SOURCES:
        name, sources = "no_download" if argument == "download" else argument, sources_taking(argument)
        given = getattr(arguments, name, None)
        if given != parser.get_default(name) and source not in (None, *sources):
            parser.error(f"--{name.replace('_', '-')} is for {' and '.join(sources)} only, not for {source}")


def choices(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options by which images are chosen, as `open_source` and the request of a conversion name them."""
    return {
        "train_list": arguments.train_list,
        "meta_list": arguments.meta_list,
        "test_list": arguments.test_list,
        "image_column": arguments.image_column,
        "label_column": arguments.label_column,
        "split_column": arguments.split_column,
        "class_names": arguments.class_names,
        "split": arguments.split,
        "split_seed": arguments.split_seed,
        "imbalance_factor": arguments.imbalance,
        "convention": arguments.convention or "paper",
        "meta_per_class": arguments.meta_per_class,
    }


def open_chosen(arguments: argparse.Namespace, chosen: dict[str, Any]) -> Source:
    """The source that the command line describes; `chosen`: `choices` of it."""
    return open_source(
        arguments.source,
        root=arguments.root,
        download=not arguments.no_download,
        num_classes=arguments.num_classes,
        allow_duplicates=arguments.allow_duplicates,
        **chosen,
    )


def imbalance(word: str) -> float:
    """A reader of imbalance factors, as `whole`."""
    try:
        factor = float(word)
    except ValueError:
        factor = math.nan
    if not 1 <= factor < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number from 1 (balanced) on")
    return factor


def shares(word: str) -> tuple[float, float, float]:
    """A reader of the shares of train, validation and test, as `whole`."""
    try:
        train, meta, test = (float(part) for part in word.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r} is not the shares of train, validation and test, such as {split_text(DEFAULT_SPLIT)}"
        ) from None
    try:
        check_split((train, meta, test))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return train, meta, test
