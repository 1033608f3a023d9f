"""Measure what fastlt claims, on your machine.

    fastlt benchmark step            the training step: ours, plain training, and other ways to the same gradient
    fastlt benchmark data            the loaders, from files to a batch on the device
    fastlt benchmark stream          shards from a server on the loopback against the same shards on the disk
    fastlt benchmark predict         predicting a folder of JPEGs against the evaluation loop on the same images
    fastlt benchmark conversion      what storing images changes in their pixels and in a network's decisions
    fastlt benchmark augment         the on-device augmentation against the usual one, image by image
    fastlt benchmark train           images a second of a whole training, with the time spent waiting for data
    fastlt benchmark plan            the order of an epoch and its random crops, by the number of images
    fastlt benchmark drift           a rolling class accuracy against the exact one, while a network trains
    fastlt benchmark approximations  the approximations of the meta-step against the exact one, while a network trains

Each command has its own --help; --json prints one JSON object instead of a table.
"""

from __future__ import annotations

from fastlt.arguments import show
from fastlt.commands import run
from fastlt.names import pick

NAME = "fastlt benchmark"
# Each module has `main(words: list[str], prog: str) -> int`; it is imported when asked for, torch takes seconds.
BENCHMARKS = {
    "step": "fastlt.benchmarks.step",
    "data": "fastlt.benchmarks.data",
    "stream": "fastlt.benchmarks.stream",
    "predict": "fastlt.benchmarks.predict",
    "conversion": "fastlt.benchmarks.conversion",
    "augment": "fastlt.benchmarks.augment",
    "train": "fastlt.benchmarks.train",
    "plan": "fastlt.benchmarks.plan",
    "drift": "fastlt.benchmarks.drift",
    "approximations": "fastlt.benchmarks.approximations",
}


def main(words: list[str], prog: str = NAME) -> int:
    """Run the benchmark that the first word names with the words after it; returns the exit code."""
    if not words or words[0] in ("-h", "--help"):
        print(show(__doc__, NAME, prog))
        return 0 if words else 2
    name, *rest = words
    return run(pick("benchmark", name, BENCHMARKS), rest, f"{prog} {name}")
