"""Measure how well a trained network does on images whose classes are known.

    fastlt evaluate runs/mine newly_labelled/
    fastlt evaluate runs/mine newly_labelled/ --prior uniform --json measured.json
    fastlt evaluate runs/mine newly_labelled/ --csv wrong.csv
    fastlt evaluate runs/mine labels.csv --root images/ --split val
    fastlt evaluate runs/mine shards/

DATA is a folder with one folder a class, or data in any other form that `fastlt inspect` knows: a table, a list, COCO's
JSON, tar files, a folder of Hugging Face datasets, a converted data set. Its classes are named as those of the run, and
may be absent. Where it has several splits, the test set is measured, or what --split says. Images that cannot be read
are listed at the end, and not counted. Groups are by the training images of the classes.
Exit codes: 0 done, 2 bad input, or no image could be read.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from typing import TYPE_CHECKING

# Only what a usage error needs; torch takes seconds and is imported when there is work for it.
from fastlt.arguments import make_parser, path
from fastlt.commands.model_options import (
    add_model_options,
    assumptions,
    check_model_options,
    fitted_temperature,
    load_model,
    tell_unreadable,
)
from fastlt.names import unknown
from loaders.sources import SOURCES

if TYPE_CHECKING:
    from fastlt.inference import Predictor
    from fastlt.inference.evaluation import Evaluation

NAME = "fastlt evaluate"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code. ValueError for a mistake in the input."""
    arguments = parse(words, prog)

    from fastlt.run.atomic_file import write_atomically
    from fastlt.run.log import class_lines, group_lines

    model = load_model(arguments)
    temperature = fitted_temperature(arguments, model)
    found = model.evaluate(
        arguments.data,
        split=arguments.of_split,
        root=arguments.root,
        source=arguments.source,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        split_column=arguments.split_column,
        class_names=arguments.class_names,
        prior=arguments.prior,
        temperature=temperature,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    if arguments.csv is not None:
        write_atomically(arguments.csv, wrong_images(found, model).encode())
    if arguments.json is not None:
        write_atomically(arguments.json, as_json(arguments, model, found, temperature).encode())
    for line in assumptions(arguments, model):
        print(line, file=sys.stderr)
    print(f"{len(found.labels):,} images" + (f" of split {found.split}" if found.split is not None else ""))
    print(*group_lines(found.metrics, model.counts), sep="\n")
    all_in = "--json FILE" if arguments.json is None else str(arguments.json)
    print(*class_lines(found.metrics, model.counts, all_in=all_in), sep="\n")
    tell_unreadable(found.predictions, {"--json": arguments.json})
    return 0


def parse(words: list[str], prog: str) -> argparse.Namespace:
    """The arguments; exits with code 2 and one message when they make no sense."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a finished run, or its folder model/")
    parser.add_argument("data", type=path, metavar="DATA", help="labelled images: a folder, a table, a list, …")
    parser.add_argument("--csv", type=path, metavar="FILE", help="write a table of the images that are taken wrongly")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the metrics, those of each class among them")
    data = parser.add_argument_group("which images")
    data.add_argument("--split", dest="of_split", metavar="NAME", help="train, val, test or all (default: test)")
    data.add_argument("--root", type=path, metavar="DIR", help="folder of a list's images (default: that of the list)")
    data.add_argument("--source", metavar="NAME", help=f"one of {', '.join(SOURCES)} (default: found by what is there)")
    for what in ("image", "label", "split"):
        data.add_argument(f"--{what}-column", metavar="NAME", help=f"of a table: its column of {what}s")
    data.add_argument("--class-names", type=path, metavar="FILE", help="of the data, as of `fastlt convert`")
    add_model_options(parser)
    arguments = parser.parse_args(words)
    if arguments.source is not None and arguments.source not in SOURCES:
        parser.error(unknown("source", arguments.source, SOURCES))
    check_model_options(parser, arguments)
    return arguments


def wrong_images(found: Evaluation, model: Predictor) -> str:
    """A line for each image that was taken for another class, the surest first, with a head."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["image", "class", "prediction", "probability"])
    wrong = [(one, label) for one, label in zip(found.predictions, found.labels, strict=True) if one.index != label]
    for one, label in sorted(wrong, key=lambda pair: -pair[0].probability):
        lines.writerow([one.called, model.classes[label], one.name, f"{one.probability:.6g}"])
    return text.getvalue()


def as_json(arguments: argparse.Namespace, model: Predictor, found: Evaluation, temperature: float | str | None) -> str:
    """The metrics, and how they were measured."""
    from fastlt import strict_json

    tree = {
        "run": str(arguments.run),
        "data": str(arguments.data),
        "split": found.split,
        "images": len(found.labels),
        "prior": arguments.prior,
        "assumptions": list(model.carried.assumptions),
        "temperature": 1.0 if temperature is None else float(temperature),
        "class_names": list(model.classes),
        **found.metrics,
        "unreadable": found.predictions.unreadable_tree(),
    }
    return strict_json.dumps(tree, indent=1) + "\n"
