"""Measure what fastlt claims, on your machine.

    python tools/benchmark.py step      the training step: ours, plain training, and other ways to the same gradient
    python tools/benchmark.py data      the loaders, from files to a batch on the device
    python tools/benchmark.py augment   the on-device augmentation against the usual one, image by image
    python tools/benchmark.py train     images a second of a whole training, with the time spent waiting for data
    python tools/benchmark.py drift     a rolling class accuracy against the exact one, while a network trains

Each command has its own --help; --json prints one JSON object instead of a table.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fastlt.names import unknown  # noqa: E402

# Each module has `main(arguments: list[str]) -> int`; it is imported when asked for, torch takes seconds.
COMMANDS = {
    "step": "tools.benchmarks.step",
    "data": "tools.benchmarks.data",
    "augment": "tools.benchmarks.augment",
    "train": "tools.benchmarks.train",
    "drift": "tools.benchmarks.drift",
    "approximations": "tools.benchmarks.approximations",
}


def main(words: list[str] | None = None) -> int:
    """Run the benchmark that the first word names with the words after it; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if words else 2
    command, *arguments = words
    if command not in COMMANDS:
        print(f"benchmark.py: error: {unknown('benchmark', command, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[command]).main(arguments)
    except ValueError as error:
        print(f"benchmark.py {command}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nbenchmark.py {command}: interrupted", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
