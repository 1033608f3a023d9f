"""Convert a data set once, so that training reads it at full speed.

    fastlt convert digits --out data/digits --imbalance 20
    fastlt convert cifar100 --root ~/data --out data/cifar100-if100 --imbalance 100
    fastlt convert list_file --root /images --train-list train.txt --meta-list val.txt \\
        --test-list test.txt --out data/places-lt --mode jpg --max-resolution 400
    fastlt convert image_folder --root /images --out data/mine --split 0.8/0.1/0.1
    fastlt convert table --root /images --train-list labels.csv --out data/mine --mode jpg --max-resolution 400
    fastlt convert coco --root /images --train-list train2021.json --test-list val2021.json --out data/inat
    fastlt convert webdataset --root /shards --out data/mine
    fastlt convert hf_dataset --root saved_to_disk --out data/mine
    fastlt convert image_folder --root /images --out data/shards --format dali --shuffle --shard-images 1000

A conversion that is interrupted keeps what is finished in DIR.partial, and the same command goes on from there.
--restart throws it away.
`fastlt verify DIR` reads a converted data set back and checks all of it.
Exit codes: 0 done, 2 bad input, 130 or 143 interrupted or terminated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

# Only what a usage error needs; torch and FFCV take seconds and are imported when there is work for them.
from fastlt.arguments import make_parser, path, whole, worker_count
from fastlt.commands.data_options import add_data_options, choices, open_chosen, refuse_foreign_options
from fastlt.commands.signals import Terminated, ended_by_signals
from fastlt.names import unknown
from loaders.sources import SOURCES, sources_taking
from loaders.sources.duplicates import KINDS
from loaders.sources.messages import readable_bytes, shortened
from loaders.sources.source import absent_classes
from loaders.stored.ffcv_format import MODES, FfcvOptions

if TYPE_CHECKING:
    from loaders.stored.dataset import ConvertedDataset

NAME = "fastlt convert"
FORMATS = {"ffcv": ("ffcv",), "dali": ("dali",), "both": ("ffcv", "dali")}
SHUFFLE_SEED = 0  # of the order in which images are stored; a run shuffles them by its own
NAMED_CLASSES = 3  # of the largest and of the smallest, in the line of a converted data set


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code. A mistake in the input is one message, not a traceback."""
    arguments = parse(words, prog)
    try:
        with ended_by_signals():
            return run_convert(arguments)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"{prog}: error: {error.strerror or error}{where}", file=sys.stderr)
    except KeyboardInterrupt:
        return ended(arguments, "interrupted", 130, prog)
    except Terminated:
        return ended(arguments, "terminated", 143, prog)
    return 2


def ended(arguments: argparse.Namespace, how: str, code: int, prog: str) -> int:
    """Say how the command was ended, and what is kept; returns `code`."""
    from loaders.stored.atomic_folder import what_is_kept

    print(f"\n{prog}: {how}{what_is_kept(arguments.out) or '; nothing was left behind'}", file=sys.stderr)
    return code


def parse(words: list[str], prog: str) -> argparse.Namespace:
    """The arguments; exits with code 2 and one message when they make no sense."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("source", metavar="SOURCE", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--out", type=path, metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--format", choices=FORMATS, default="ffcv", help="ffcv (default), dali's shards, or both")

    add_data_options(parser)
    storage = parser.add_argument_group("how they are stored")
    storage.add_argument("--mode", choices=MODES, default="raw", help="default: raw, the fastest to read")
    storage.add_argument("--max-resolution", type=whole(1), metavar="PIXELS", help="scale longer sides down to this")
    storage.add_argument("--jpeg-quality", type=whole(1, 100), metavar="Q", help="1 to 100 (default: 90), not for raw")
    storage.add_argument(
        "--shuffle", action="store_true", help="training images in random order, for shards on a server"
    )
    storage.add_argument(
        "--shard-images",
        type=whole(1),
        metavar="N",
        help="images a shard (default: 1024, and more where a split would have over 128)",
    )

    run = parser.add_argument_group("the run")
    run.add_argument("--workers", type=worker_count, metavar="N", help="processes (default: all cores)")
    run.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="images that cannot be decoded")
    run.add_argument(
        "--allow-duplicates",
        action="store_true",
        help="the same image may be in two splits or under two labels",
    )
    run.add_argument("--overwrite", action="store_true", help="replace the converted data set at --out")
    run.add_argument("--restart", action="store_true", help="throw away what an interrupted conversion has finished")
    run.add_argument("--quiet", action="store_true", help="no progress bars")

    arguments = parser.parse_args(words)
    if arguments.source not in SOURCES:
        parser.error(unknown("source", arguments.source, SOURCES))
    refuse_foreign_options(parser, arguments, arguments.source)
    if arguments.mode == "raw" and arguments.jpeg_quality is not None:
        parser.error("--jpeg-quality has no meaning for raw pixels: add --mode jpg or proportion, or leave it out")
    if arguments.shard_images is not None and "dali" not in FORMATS[arguments.format]:
        parser.error("--shard-images is for shards: add --format dali or both, or leave it out")
    if arguments.mode == "proportion" and "dali" in FORMATS[arguments.format]:
        parser.error(f"--mode proportion is for --format ffcv only, not for {arguments.format}: take raw or jpg")
    if arguments.source in sources_taking("root") and arguments.root is None:
        parser.error(f"{arguments.source} needs --root DIR: the folder that holds its images")
    return arguments


def run_convert(arguments: argparse.Namespace) -> int:
    """Convert, unless what is asked for is already there."""
    out = arguments.out
    quality = FfcvOptions.jpeg_quality if arguments.jpeg_quality is None else arguments.jpeg_quality
    options = FfcvOptions(arguments.mode, arguments.max_resolution, quality, arguments.workers)
    chosen = choices(arguments)
    from loaders.stored.atomic_folder import MANIFEST, check_target, refuse_target_inside, remove_published
    from loaders.stored.convert import conversion_request, convert
    from loaders.stored.dataset import ConvertedDataset

    request = conversion_request(arguments.source, options=options, **chosen)
    # Other conversions say nothing of these: they stay equal to those of earlier versions.
    request |= {key: value for key in ("shuffle", "shard_images") if (value := getattr(arguments, key))}
    formats = FORMATS[arguments.format]
    if (out / MANIFEST).is_file() and not arguments.overwrite:
        there = ConvertedDataset.open(out)
        if there.matches(request) and not set(formats) <= set(there.formats):
            raise ValueError(
                f"{out} holds this data set as {' and '.join(there.formats)} only: "
                "convert it anew with --format both --overwrite, or give another folder"
            )
        if there.matches(request):
            if arguments.num_classes not in (None, there.num_classes):
                raise ValueError(f"--num-classes is {arguments.num_classes}, and {out} has {there.num_classes} classes")
            remove_published(out)
            print(f"{out} already holds this data set: nothing to do{compare_listing(there, arguments, chosen)}")
            return 0
        differences = "; ".join(there.differences(request))
        raise ValueError(f"{out} holds another data set: {differences}; give another folder, or --overwrite")
    check_target(out, overwrite=arguments.overwrite)
    if arguments.source == "image_folder":
        refuse_target_inside(out, arguments.root)
    source = open_chosen(arguments, chosen)
    for note in source.notes:
        print(note)
    dataset = convert(
        source,
        out,
        options=options,
        request=request,
        formats=formats,
        on_error=arguments.on_error,
        allow_duplicates=arguments.allow_duplicates,
        progress=not arguments.quiet,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
        say=tqdm.write,
        shard_images=arguments.shard_images,
        shuffle_seed=SHUFFLE_SEED if arguments.shuffle else None,
    )
    report(dataset)
    return 0


def compare_listing(there: ConvertedDataset, arguments: argparse.Namespace, chosen: dict) -> str:
    """ValueError when the source lists other images now than those converted; else what to add to the message.

    The request knows neither the folder nor the lines of the lists, and the images may be gone after the conversion.
    """
    known = there.manifest.get("listing_sha256")
    if known is None:
        return ""
    try:
        listing = open_chosen(arguments, chosen).listing_sha256()
    except ValueError as error:
        return f" (though the images are not as they were: {error})"
    if listing != known:
        raise ValueError(
            f"{there.root} was made from other images than {arguments.root} and the lists hold now: "
            "give another folder, or --overwrite"
        )
    return ""


def report(dataset: ConvertedDataset) -> None:
    """Say what was made: images and bytes per split, the classes, what was left out and what is there twice."""
    from loaders.stored.manifest import DUPLICATES, KEPT, SKIPPED

    splits = dataset.manifest["splits"]
    for name, split in splits.items():
        of_split = f"{name}.beton", f"dali/{name}"
        size = sum(f["bytes"] for path, f in dataset.manifest["files"].items() if path.startswith(of_split))
        low, high = (f"{width}x{height}" for height, width in (split["image_size"]["min"], split["image_size"]["max"]))
        pixels = low if split["image_size"]["same"] else f"{low} to {high}"
        count = dataset.manifest[KEPT][dataset.formats[0]][name]
        kept = f", {count:,} of them the source's own files" if count else ""
        print(f"{name}: {split['count']:,} images of {pixels}, {readable_bytes(size)}{kept}; {split['provenance']}")
    print(f"{dataset.root}: {classes_text(dataset.class_names, splits['train']['class_counts'])}")
    for warning in absent_classes(dataset.class_names, {name: of["class_counts"] for name, of in splits.items()}):
        print(warning)
    if dataset.manifest["skipped"]:
        print(f"{dataset.manifest['skipped']} images could not be decoded: {dataset.root / SKIPPED}")
    counts = [f"{count:,} {KINDS[kind]}" for kind, count in dataset.manifest["duplicates"].items() if count]
    if counts:
        print(f"files of equal contents: {', '.join(counts)}: {dataset.root / DUPLICATES} begins with")
        with (dataset.root / DUPLICATES).open(encoding="utf-8", errors="backslashreplace") as lines:
            print(*(f"  {' '.join(line.split(chr(9)))}" for line in itertools.islice(lines, 3)), sep="", end="")


def classes_text(names: Sequence[str], counts: Sequence[int]) -> str:
    """How many classes of how many training images there are, with the names of the largest and the smallest."""
    order = sorted(range(len(names)), key=lambda c: (-counts[c], c))
    ends = order if len(order) <= 2 * NAMED_CLASSES + 1 else [*order[:NAMED_CLASSES], None, *order[-NAMED_CLASSES:]]
    listed = ["…" if c is None else f"{shortened(names[c])} {counts[c]:,}" for c in ends]
    return f"{len(names):,} classes of {max(counts):,} to {min(counts):,} training images: {', '.join(listed)}"
