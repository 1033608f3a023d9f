"""What the commands' argument parsers share: the help text under the name that was called, and checked numbers."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fastlt.paths import as_path


def typed(prog: str) -> str:
    """What the user types for a program's name: `report.py` is a script of tools/, `fastlt report` is itself."""
    return f"python tools/{prog}" if prog.split()[0].endswith(".py") else prog


def show(doc: str | None, name: str, prog: str) -> str:
    """A module's docstring with the command `name` as the user types it; "" of Python's -OO, which drops docstrings."""
    return (doc or "").strip().replace(name, typed(prog))


def make_parser(doc: str | None, name: str, prog: str) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring.

    name: how the docstring writes the command, `fastlt report`. prog: how the user called it, that or `report.py`, a
    script of tools/; the examples and the usage line show the user's own.
    """
    return _Parser(
        prog=prog,
        description=show(doc, name, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """Where words `key.sub=value` are taken, it says that they have no dashes."""

    def error(self, message: str) -> NoReturn:
        stray = re.match(r"unrecognized arguments: --(\S+)", message)
        if stray and any(action.dest == "overrides" for action in self._actions):
            key, _, value = stray[1].partition("=")
            message += f"; a key of the recipe is written without dashes, {key}={value or 'VALUE'}"
        super().error(message)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides, as the words `recipe` and `overrides` of `parse_intermixed_args`."""
    parser.add_argument("recipe", help="the name of a shipped recipe, or a file")
    # Without a default, argparse would call the overrides required.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="for example data.root=/images seed=1"
    )


def path(word: str) -> Path:
    """A reader of paths, for argparse: `~` is the home folder also where the shell leaves it, as in --out=~/data."""
    try:
        return as_path(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers from `low` to `high`, for argparse, which puts the option's name before the message."""

    def read(word: str) -> int:
        allowed = f"a whole number from {low} on" if high is None else f"a whole number from {low} to {high}"
        try:
            number = int(word)
        except ValueError:
            number = None
        if number is None or number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{word!r} is not {allowed}")
        return number

    return read


positive = whole(1)
# More threads than this crash torch, and more processes the machine.
MOST_WORKERS = 1024
worker_count = whole(1, MOST_WORKERS)


def check_files_to_write(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *options: str) -> None:
    """A usage error for a file to write that cannot be one."""
    for option in options:
        file: Path | None = getattr(arguments, option)
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            what = "is a folder" if file.is_dir() else f"lies in no folder that exists ({file.parent})"
            parser.error(f"--{option} {file} {what}: give a file")
