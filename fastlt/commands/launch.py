"""Start one training process for each device, as `accelerate launch` does, and end as the training ends.

    fastlt launch recipes/imagenet_lt.yaml data.root=DIR
    fastlt launch --multi_gpu --num_processes 4 recipes/imagenet_lt.yaml
    fastlt launch --cpu --num_processes 2 recipes/digits_lt.yaml

The options before the recipe are those of `accelerate launch`, which lists them with --help. `accelerate launch
fastlt/train.py` trains just the same, but ends with a traceback of its own and code 1 when a recipe is refused or the
run is stopped; its --quiet hides that traceback, of one process alone. `fastlt launch` adds nothing to the messages of
the training. Ctrl-C and SIGTERM reach the training once, and it saves a checkpoint, as it does when the launcher is
killed.
Exit code: that of the training (see `fastlt train --help`), 2 for options that cannot be launched.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
from pathlib import Path

from fastlt.arguments import show
from fastlt.error_message import PRINTED
from fastlt.parent_process import LAUNCHER

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
NAME = "fastlt launch"
# Seconds that torch's launcher lets its processes save a checkpoint in before it kills them; 30 by default.
SAVING_S = 300


class TrainingEnded(BaseException):
    """The one process that was launched has ended; code: as `subprocess` tells it, -N when killed by signal N."""

    def __init__(self, code: int) -> None:
        self.code = code


def main(words: list[str], prog: str = NAME) -> int:
    """Launch, wait, and return the exit code of the training; ValueError for options that do not go together."""
    if not words or words[0] in ("-h", "--help"):
        print(show(__doc__, NAME, prog))
        return 0 if words else 2

    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    given = parse(launch.launch_command_parser(), words, prog)
    # Accelerate's own drops the exit code, and the signals that it gets.
    launch.simple_launcher = without_gpus
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_S))
    # Torch's launcher reports at length of processes that failed or were stopped; they have said so themselves.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # In memory and under this process's number: nothing is left when it is killed.
        os.environ[PRINTED] = f"/proc/{os.getpid()}/fd/{os.memfd_create('printed')}"
        os.environ[LAUNCHER] = str(os.getpid())
        launch.launch_command(given)
    except TrainingEnded as ended:
        return exit_code(ended.code)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return exit_code(failure.exitcode)
    except SignalException as stopped:
        return exit_code(-stopped.sigval)
    finally:
        for variable in (PRINTED, LAUNCHER):  # they are for the processes that were launched, not for this one
            os.environ.pop(variable, None)
    return 0


def parse(parser: argparse.ArgumentParser, words: list[str], prog: str) -> argparse.Namespace:
    """The options of `accelerate launch`; the script to launch is fastlt/train.py, and the recipe its first word."""
    parser.prog = prog
    parser.usage = f"{prog} [options of accelerate launch] RECIPE [key.sub=value ...]"
    for action in parser._actions:
        if action.dest == "training_script":
            action.metavar = "RECIPE"  # the name under which it is told to be missing
        if action.dest == "training_script_args":
            action.required = False
    given = parser.parse_args(words)
    given.training_script_args = [given.training_script, *given.training_script_args]
    given.training_script = str(TRAIN)
    return given


def without_gpus(given: argparse.Namespace) -> None:
    """Start one process, or on CPUs as many as are asked for, as on GPUs; Accelerate's own would start a single one."""
    from accelerate.commands.launch import multi_gpu_launcher

    on_cpus = given.cpu or getattr(given, "use_cpu", False)  # by an option, or by the file of `accelerate config`
    if on_cpus and given.mpirun_hostfile is None and (given.num_processes or 1) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        multi_gpu_launcher(given)
    else:
        one_process(given)


def one_process(given: argparse.Namespace) -> None:
    """Start the training in a session of its own, pass signals on to it, and raise TrainingEnded with its exit code."""
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    command, environment = prepare_simple_launcher_cmd_env(given)
    process, early = None, []

    def pass_on(number: int, frame: object) -> None:
        early.append(number) if process is None else process.send_signal(number)

    # Before it is started: a signal that ended this process alone would leave the training behind.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    # In a session of its own, so that Ctrl-C reaches it once, through us: a second one would stop it without saving.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    for number in early:
        process.send_signal(number)
    raise TrainingEnded(process.wait())


def exit_code(code: int) -> int:
    """An exit code as the shell tells it, 128 + N for death by signal N."""
    return code if code >= 0 else 128 - code
