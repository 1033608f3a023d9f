"""One process of a training that several machines share: `node_process.py FAULT RECIPE [WORDS]`.

FAULT: what happens to process 1 at its first validation. "none"; "error", which nobody expects; "kill"; "kill once";
"lose once", a kill of its launcher, too; or "absent once", when it does not come at the first start, for which the
others wait 15 s. "once" leaves a file by which the next start knows.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastlt.device import rendezvous
from fastlt.run.trainer import Trainer
from fastlt.train import main


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    kill()


def once(fault: Callable[[], None]) -> None:
    if not Path("failed").exists():
        Path("failed").touch()
        fault()


def error() -> None:
    raise KeyError("made up")


def sleep() -> None:
    time.sleep(600)


FAULTS = {"error": error, "kill": kill, "kill once": lambda: once(kill), "lose once": lambda: once(lose)}


def train(fault: str, *words: str) -> int:
    if fault == "absent once":
        rendezvous.FIND_S = 15.0
        if os.environ["RANK"] == "1":
            once(sleep)
    elif fault != "none" and os.environ["RANK"] == "1":
        validate = Trainer._validate

        def faulty(*arguments):
            FAULTS[fault]()
            validate(*arguments)

        Trainer._validate = faulty
    return main([*words])


if __name__ == "__main__":
    sys.exit(train(*sys.argv[1:]))
