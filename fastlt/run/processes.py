"""The processes of a run: that all of them see each other, where each of them is, and that they end together."""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import parse_flag_from_env
from accelerate.utils.environment import get_cpu_distributed_information
from tqdm import tqdm

from fastlt.device.peers import Failure, Peers, is_broken_connection
from fastlt.device.placement import Placement, core_share, node_ranks
from fastlt.device.rendezvous import find_processes
from fastlt.error_message import print_error

# How Slurm's srun and MPI tell a process how many it has started; they start them without telling torch.
OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
TORCHRUN = "torchrun --nproc_per_node {count} -m fastlt train RECIPE"


class Ended(Exception):  # noqa: N818  (not always an error)
    """A training has ended before its time; the text is for the user. code: exit code. said: whether it is no error."""

    def __init__(self, message: str, code: int, *, said: bool = False) -> None:
        super().__init__(message)
        self.code, self.said = code, said


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as process `rank` sees them.

    placements: of each, by rank. peers: by which they learn of each other's failures. store: by which torch.distributed
    connects them. Both are None where there is only one.
    """

    rank: int
    placements: tuple[Placement, ...]
    peers: Peers | None = None
    store: dist.Store | None = None

    @cached_property
    def on_node(self) -> list[int]:
        """The processes that are on this one's node, in order."""
        return node_ranks(self.placements, self.rank)

    @property
    def cores(self) -> int:
        """How many cores this process has for itself."""
        return core_share(self.placements, self.rank)

    @property
    def first_of_node(self) -> bool:
        """Whether this process does what is done once on each node."""
        return self.rank == self.on_node[0]

    def first_failure(self, error: BaseException) -> Failure | None:
        """Tell the others of an error that ends this process; returns which failure it was that came first.

        None when it is the error of all processes, or the only process. Waits for a few seconds else.
        """
        if self.peers is None:
            return None
        code = error.code if isinstance(error, Ended) else 1
        return self.peers.fail(_text_of(error), code, broken=is_broken_connection(error))

    def end(self, error: BaseException) -> int:
        """The exit code for an error, after its message; what is not `Ended` is raised, or printed with its traceback.

        The error of another process is told in its place, where that one came first.
        """
        failure = self.first_failure(error)
        if failure is None:
            if not isinstance(error, Ended):
                raise error
            if error.said and self.rank == 0:
                tqdm.write(str(error))
            elif not error.said and self.first_of_node:
                print_error(error)
            if dist.is_initialized():
                dist.destroy_process_group()  # its threads would be ended by force with the process, which can abort it
            return error.code
        assert self.peers is not None
        if failure.rank == self.rank and not isinstance(error, Ended):
            traceback.print_exception(error)
        self.peers.tell(failure)
        return failure.code

    def close(self) -> None:
        """This process is done; it may end before the others."""
        global _connected
        if self.peers is not None:
            self.peers.close()
            _connected = None


_connected: Processes | None = None  # as torch.distributed's group, it is that of the process


def _text_of(error: BaseException) -> str:
    if isinstance(error, Ended):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def find() -> Processes:
    """Find the processes that a launcher has started with this one, and learn of their failures from now on.

    ConnectionError when one of them does not come.
    """
    global _connected
    if _connected is None:
        started = get_cpu_distributed_information()  # not of CPUs alone: it knows the variables of all launchers
        if started.world_size == 1 or "MASTER_ADDR" not in os.environ:
            return Processes(0, (Placement.here(),))
        os.environ.setdefault("MASTER_PORT", "29500")  # as Accelerate does
        start = find_processes(started.rank, started.world_size, Placement.here())
        peers = Peers(started.rank, start.placements, run=start.name)
        _connected = Processes(started.rank, start.placements, peers, start.store)
    return _connected


def connect() -> Processes:
    """`find`, and let torch.distributed connect the processes.

    ValueError when Accelerate sees another number of processes than were started: each would train by itself.
    """
    found = find()
    others = (
        {} if found.store is None else {"store": found.store, "rank": found.rank, "world_size": len(found.placements)}
    )
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **others)
    check_all_seen(state.num_processes)
    return found


def check_all_seen(seen: int) -> None:
    """ValueError unless as many processes as were started are `seen` by Accelerate."""
    started = os.environ.get("WORLD_SIZE")
    if started is not None and int(started) != seen:
        raise ValueError(
            f"{started} processes were started, but {_why_alone(seen)}: start them by\n  {_command(started)}"
        )
    if started is not None or seen > 1:
        return
    for variable, launcher in OTHER_LAUNCHERS.items():
        count = os.environ.get(variable, "1")
        if count != "1":
            raise ValueError(
                f"{launcher} has started {count} processes, of which torch knows nothing: each would train the whole "
                f"run by itself. Start torchrun by {launcher}, once on each machine, as docs/distributed.md says, or "
                "set WORLD_SIZE=1 if these are runs of their own"
            )
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate launch --cpu starts one process on each machine, which knows nothing of others, although more "
            f"were asked for: start them by\n  {_command('N')}\nor set WORLD_SIZE=1 if one is meant"
        )


def _why_alone(seen: int) -> str:
    if seen > 1:
        return f"Accelerate sees {seen}"
    if not torch.cuda.is_available():
        return "torch sees no GPU here and each would train by itself"
    return "without LOCAL_RANK each would train by itself"


def _command(count: str) -> str:
    """The command that starts so many processes here, or on several machines."""
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    words = TORCHRUN.format(count=os.environ.get("LOCAL_WORLD_SIZE", count))
    if nodes != "1":
        words = words.replace("torchrun", f"torchrun --nnodes {nodes} --rdzv_backend c10d --rdzv_endpoint HOST:PORT")
    return words if torch.cuda.is_available() else f"ACCELERATE_USE_CPU=true {words}"
