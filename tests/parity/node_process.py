"""One process of a training that several machines share: `node_process.py FAULT RECIPE [WORDS]`.

FAULT: what happens to process 1 at its first validation. "none"; "error", which nobody expects; "kill"; or "kill once",
which leaves a file `killed` by which the next start knows.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fastlt.run.trainer import Trainer
from fastlt.train import main


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_once() -> None:
    if not Path("killed").exists():
        Path("killed").touch()
        kill()


def error() -> None:
    raise KeyError("made up")


FAULTS = {"error": error, "kill": kill, "kill once": kill_once}


def train(fault: str, *words: str) -> int:
    if fault != "none" and os.environ["RANK"] == "1":
        validate = Trainer._validate

        def faulty(*arguments):
            FAULTS[fault]()
            validate(*arguments)

        Trainer._validate = faulty
    return main([*words])


if __name__ == "__main__":
    sys.exit(train(*sys.argv[1:]))
