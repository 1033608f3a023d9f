"""The command `fastlt`: a table of its subcommands, each imported when it is asked for.

This module imports nothing heavy, so that `fastlt --help` and a mistyped word are answered at once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from fastlt.commands import run
from fastlt.console import print_anything
from fastlt.names import unknown
from fastlt.version import __version__


@dataclass(frozen=True)
class Command:
    """A subcommand: a module with `main(words, prog) -> exit code`, and its line in the help."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("fastlt.train", "train what a recipe describes"),
    "launch": Command("fastlt.commands.launch", "train in several processes, one for each device"),
    "check": Command("fastlt.commands.check", "check a recipe and print it with every default filled in"),
    "inspect": Command("fastlt.commands.inspect", "look at a data set, and get a recipe that fits"),
    "convert": Command("fastlt.commands.convert", "convert a data set once, so that training reads it at full speed"),
    "verify": Command("fastlt.commands.verify", "read a converted data set back and check all of it"),
    "predict": Command("fastlt.commands.predict", "predict the classes of images with a trained network"),
    "evaluate": Command("fastlt.commands.evaluate", "measure a trained network on further images of known classes"),
    "report": Command("fastlt.commands.report", "compare runs: a table, or a page with figures"),
    "export": Command("fastlt.commands.export", "write a trained model for timm, ONNX or torch"),
    "ensemble": Command("fastlt.commands.ensemble", "evaluate finished runs together"),
    "reproduce": Command("fastlt.commands.reproduce", "run the rows of the paper's tables, our numbers beside them"),
    "benchmark": Command("fastlt.commands.benchmark", "measure what fastlt claims, on your machine"),
    "recipe-reference": Command("fastlt.commands.recipe_reference", "print the page of all recipe keys"),
}


def main(words: list[str] | None = None, prog: str | None = None) -> int:
    """Run the subcommand that the first word names with the words after it; returns the exit code.

    prog: the name under which the subcommand speaks of itself, `fastlt NAME` by default; the scripts of tools/ have
    names of their own.
    """
    print_anything()
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fastlt {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(f"fastlt: error: {unknown('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    return run(COMMANDS[name].module, rest, prog or f"fastlt {name}")


def help_text() -> str:
    """The subcommands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    head = "usage: fastlt COMMAND ...\n\nLong-tailed image recognition, fast and right.\n"
    more = "\n`fastlt COMMAND --help` says more of each; `fastlt --version` says which version this is."
    return "\n".join([head, *lines, more])
