"""Which model of a run, how it decides and on what it runs: what `fastlt predict` and `fastlt evaluate` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastlt.arguments import check_files_to_write, positive, worker_count
from fastlt.paths import expand
from fastlt.run.folder import SELECTIONS
from loaders.sources.messages import one_line

if TYPE_CHECKING:
    from fastlt.inference import Predictions, Predictor

SHOWN = 20  # images that could not be read


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Two groups of options; returns the one about decisions."""
    decision = parser.add_argument_group("how classes are decided")
    decision.add_argument(
        "--prior",
        metavar="PRIOR",
        help="class shares where the images come from: training, uniform, or a CSV or JSON file of `class,count`; by "
        "default the network's logits are taken as they are",
    )
    decision.add_argument(
        "--temperature",
        metavar="T",
        help="by which logits are divided: a number, or validation, which fits it on the validation set (default: 1)",
    )
    run = parser.add_argument_group("the network")
    run.add_argument(
        "--checkpoint", choices=SELECTIONS, help="which model of the last stage (default: the run's result)"
    )
    run.add_argument("--precision", choices=("fp32", "bf16"), help="of its computation (default: the run's)")
    run.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    run.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images at a time (default: 128)")
    run.add_argument("--workers", type=worker_count, metavar="N", help="threads that decode (default: all cores)")
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    return decision


def check_model_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """A usage error for a file to write that cannot be one."""
    check_files_to_write(parser, arguments, "csv", "json")
    if arguments.csv is not None and arguments.csv == arguments.json:
        parser.error(f"--csv and --json are both {arguments.csv}: give two files")
    if arguments.prior is not None:
        arguments.prior = expand(arguments.prior)


def load_model(arguments: argparse.Namespace) -> Predictor:
    """The network that the options name; ValueError for what is not there."""
    from fastlt.device.host_memory import keep_freed_memory
    from fastlt.inference import load
    from fastlt.inference.predictor import checked_temperature

    if arguments.temperature is not None:
        checked_temperature(arguments.temperature)
    model = load(arguments.run, arguments.device, select=arguments.checkpoint, precision=arguments.precision)
    if model.device.type == "cpu":
        keep_freed_memory()
    return model


def fitted_temperature(arguments: argparse.Namespace, model: Predictor) -> float | str | None:
    """The temperature that the options say; one that is fitted is told on stderr."""
    if arguments.temperature != "validation":
        return arguments.temperature
    fitted = model.fit_temperature(adjusted=arguments.prior is not None)
    print(fitted, file=sys.stderr)
    return fitted.value


def assumptions(arguments: argparse.Namespace, model: Predictor) -> list[str]:
    """What was taken for granted, a line each."""
    prior = model.carried.assumptions if arguments.prior is not None else ()
    return [*(f"note: {note}" for note in model.notes), *(f"assumed of the logits' prior: {of}" for of in prior)]


def tell_unreadable(predictions: Predictions, files: Mapping[str, Path | None]) -> None:
    """On stderr: the first images that could not be read, each with its reason.

    files: those that list all of them, by their options; None where the option was not given.
    """
    unreadable = predictions.unreadable
    if not unreadable:
        return
    lines = [f"{len(unreadable):,} could not be read:"]
    lines += [f"  {one_line(one.called)}: {one.reason}" for one in unreadable[:SHOWN]]
    if len(unreadable) > SHOWN:
        written = next((file for file in files.values() if file is not None), None)
        where = f"all in {written}" if written is not None else f"{next(iter(files))} FILE lists all"
        lines.append(f"  and {len(unreadable) - SHOWN:,} more; {where}")
    print(*lines, sep="\n", file=sys.stderr)
