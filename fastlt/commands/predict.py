"""Predict the classes of images with a trained network.

    fastlt predict runs/mine photo.jpg
    fastlt predict runs/mine photos/ --csv predictions.csv --top 3
    fastlt predict runs/mine @list.txt --json predictions.json --abstain 0.5
    fastlt predict runs/mine photos/ --prior uniform --temperature validation

IMAGES are files, folders with all below them, or @FILE, a list with a path a line. Images that cannot be read are
listed at the end and in the output files. They don't stop the others.
Exit codes: 0 done, 2 bad input, or no image could be read.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

# Only what a usage error needs; torch takes seconds and is imported when there is work for it.
from fastlt.arguments import make_parser, path, positive
from fastlt.commands.model_options import (
    add_model_options,
    assumptions,
    check_model_options,
    fitted_temperature,
    load_model,
    tell_unreadable,
)
from fastlt.paths import as_path

if TYPE_CHECKING:
    from fastlt.inference import Predictions, Predictor

NAME = "fastlt predict"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code. ValueError for a mistake in the input."""
    arguments = parse(words, prog)
    images = listed(arguments.images)

    import torch

    from fastlt.inference.inputs import gathered
    from fastlt.inference.predictor import checked_threshold
    from fastlt.run.atomic_file import write_atomically

    checked_threshold(arguments.abstain)
    images = gathered([as_path(image) for image in images])
    if images and all(isinstance(image, Path) and not os.path.lexists(image) for image in images):
        raise ValueError(f"none of {len(images)} images could be read: {images[0]} (no such file)")
    model = load_model(arguments)
    temperature = fitted_temperature(arguments, model)
    started = time.perf_counter()
    with torch.inference_mode():
        predictions = model.predict(
            images,
            arguments.top,
            prior=arguments.prior,
            temperature=temperature,
            abstain=arguments.abstain,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            progress=not arguments.quiet,
        )
    seconds = time.perf_counter() - started
    if arguments.csv is not None:
        write_atomically(arguments.csv, predictions.to_csv().encode())
    if arguments.json is not None:
        write_atomically(arguments.json, as_json(arguments, model, predictions, temperature).encode())
    if arguments.csv is None and arguments.json is None:
        for prediction in predictions:
            print(prediction)
    summarise(arguments, model, predictions, seconds)
    return 0


def parse(words: list[str], prog: str) -> argparse.Namespace:
    """The arguments; exits with code 2 and one message when they make no sense."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a finished run, or its folder model/")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, or @FILE with a path a line")
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="classes of each image (default: 5)")
    parser.add_argument("--csv", type=path, metavar="FILE", help="write a table, a line an image")
    parser.add_argument("--json", type=path, metavar="FILE", help="write one JSON object")
    decision = add_model_options(parser)
    decision.add_argument("--abstain", type=float, metavar="P", help="predict nothing below this probability")

    arguments = parser.parse_args(words)
    check_model_options(parser, arguments)
    return arguments


def listed(words: list[str]) -> list[str]:
    """The words with each @FILE replaced by the paths in that file; ValueError for a list that cannot be read."""
    found = []
    for word in words:
        if not word.startswith("@"):
            found.append(word)
            continue
        file = as_path(word[1:])
        try:
            lines = file.read_bytes().splitlines()
        except OSError as error:
            why = f"the list {file} cannot be read ({error.strerror}); write ./{word} for an image of that name"
            raise ValueError(f"{word}: {why}") from None
        paths = [line.decode(errors="surrogateescape") for line in lines if line.strip()]
        if not paths:
            raise ValueError(f"{word}: the list {file} is empty; write a path a line, from the current folder")
        found += paths
    return found


def as_json(
    arguments: argparse.Namespace, model: Predictor, predictions: Predictions, temperature: float | str | None
) -> str:
    """The predictions and how they were made."""
    from fastlt import strict_json

    made = {
        "run": str(arguments.run),
        "top": arguments.top,
        "prior": arguments.prior,
        "prior_of_logits": dict(zip(model.classes, model.carried.shares.tolist(), strict=True)),
        "assumptions": list(model.carried.assumptions),
        "temperature": 1.0 if temperature is None else float(temperature),
    }
    return strict_json.dumps({**made, **predictions.to_tree()}, indent=1) + "\n"


def summarise(arguments: argparse.Namespace, model: Predictor, predictions: Predictions, seconds: float) -> None:
    """On stderr: what was taken for granted, how many images and how fast, and which could not be read."""

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    for line in assumptions(arguments, model):
        say(line)
    rate = len(predictions) / seconds
    read = f"{len(predictions):,} {'image' if len(predictions) == 1 else 'images'} in {seconds:.1f} s"
    if rate >= 10:  # else the start took longer than the images
        read += f", {rate:,.0f} a second"
    if arguments.abstain is not None:
        read += f"; {100 * predictions.coverage:.1f} % predicted, the others are below {arguments.abstain:g}"
    say(read)
    tell_unreadable(predictions, {"--csv": arguments.csv, "--json": arguments.json})
