"""Train what a recipe describes.

    fastlt train digits_lt
    fastlt train recipes/mine.yaml data.root=DIR seed=1

`--check` stops after the recipe has been read and checked, and prints it with every default filled in.
Exit code: 0 done, 2 for a mistake in the recipe or the data and for a full disk, 130 or 143 when stopped by a signal,
1 for anything else. The same command goes on after a signal, a kill or a full disk.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Any

from fastlt.arguments import add_recipe, make_parser
from fastlt.console import print_anything
from fastlt.device.openmp import load_llvm_openmp
from fastlt.error_message import print_error
from fastlt.parent_process import LAUNCHER, end_with_parent

if TYPE_CHECKING:
    from fastlt.run.context import RunContext


NAME = "fastlt train"
SCRIPT = "accelerate launch fastlt/train.py"


def main(arguments: list[str] | None = None, prog: str = SCRIPT) -> int:
    """Recipe in, training, exit code out."""
    print_anything()
    parser = make_parser(__doc__, NAME, prog)
    add_recipe(parser)
    parser.add_argument("--check", action="store_true", help="check the recipe, print it in full, and stop")
    # Options may stand between the recipe and its overrides.
    words = parser.parse_intermixed_args(arguments)

    launcher = os.environ.pop(LAUNCHER, None)  # what this process starts has another parent
    if launcher is not None:
        end_with_parent(int(launcher), signal.SIGTERM)
    # Torch says so of its own code when it first takes a forward-mode derivative.
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    # Torch reports each connection that breaks with a stack trace of its own; the reason is told once, see `Peers`.
    if "WORLD_SIZE" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        load_llvm_openmp()
        if words.check:
            check(words.recipe, words.overrides)
            return 0
        # Imported late: a mistake on the command line answers before torch has loaded.
        from fastlt.run.processes import find

        processes = find()
    except ValueError as error:
        print_error(error)
        return 2
    except ConnectionError as error:
        print_error(error)
        return 1
    try:
        train(words.recipe, words.overrides)
    except BaseException as error:
        return processes.end(error)
    processes.close()
    return 0


def check(recipe: str, overrides: list[str]) -> None:
    """Check a recipe without data, and print it. ValueError."""
    from fastlt.recipe import load_recipe
    from fastlt.run.preflight import checked_text

    print(checked_text(load_recipe(recipe, overrides)), end="")


def train(recipe: str, overrides: list[str]) -> None:
    """Train, and tell the result. Ended, with the exit code and the message for the user, where it ends before."""
    from fastlt.run.atomic_file import RunFileError
    from fastlt.run.model_folder import mend_run_model
    from fastlt.run.preflight import prepare, read_recipe
    from fastlt.run.processes import Ended
    from fastlt.run.result import recorded_result
    from fastlt.run.stopping import Interrupted
    from fastlt.run.trainer import Trainer
    from loaders.stored.damage import DamageError, NoRoomError, ReaderError

    try:
        context = prepare(read_recipe(recipe, overrides))
        recorded = recorded_result(context)
        if recorded is not None:
            mend_run_model(context)
            report(context, recorded)
            return
        trainer = Trainer(context)
    except ValueError as error:
        raise Ended(str(error), 2) from error
    except KeyboardInterrupt:
        raise Ended("stopped before the training began", 128 + signal.SIGINT) from None
    try:
        result = trainer.fit()
    except KeyboardInterrupt:
        raise Ended("stopped; the same command goes on from the last checkpoint", 128 + signal.SIGINT) from None
    except Interrupted as stopped:
        raise Ended(f"{stopped}; the same command goes on from there", 128 + stopped.signal, said=True) from None
    except (DamageError, NoRoomError, RunFileError) as error:
        raise Ended(str(error), 2) from error
    except (FloatingPointError, ReaderError) as error:
        raise Ended(str(error), 1) from error
    report(context, result)


def report(context: RunContext, result: dict[str, Any]) -> None:
    """Tell the user what was measured and where it is."""
    from fastlt.run.log import result_table

    context.say("\n" + result_table(result, context.counts) + f"\n\nrun folder: {context.folder}")


if __name__ == "__main__":
    sys.exit(main())
