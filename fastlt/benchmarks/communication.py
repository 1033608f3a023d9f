"""What several processes of this machine communicate in a training step, and how long the step waits for it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlt.benchmarks.meta_steps import WAYS, Problem, Way
from fastlt.benchmarks.rounds import median_ratio
from fastlt.device.available import wait_for
from fastlt.device.distributed import Reducer
from fastlt.device.host_memory import keep_freed_memory
from loaders.cores import available_cores

# The variants of a step: as in training, with gradients communicated when all are there, and without communication.
TRAINING, AT_ONCE, SILENT = "training", "at once", "silent"


@dataclass(frozen=True)
class Row:
    """A step of one process, the median over rounds of the slowest process.

    collectives, sent_bytes: what a process communicates; the bytes of the tensors that are summed, gathered or sent.
    exposed: the share of the step's time that a step without communication does not take.
    exposed_at_once: the same where no gradient is on its way before all of them are computed.
    """

    name: str
    ms: float
    ratio_plain: float | None
    collectives: float
    sent_bytes: float
    exposed: float
    exposed_at_once: float


class Traffic:
    """Counts what this process communicates by torch.distributed.

    collectives: how many. sent_bytes: of the tensors that are summed or sent, and of all that are gathered.
    """

    def __init__(self) -> None:
        self.collectives = self.sent_bytes = 0

    def take(self) -> tuple[int, int]:
        """Collectives and bytes since the last call."""
        counts = self.collectives, self.sent_bytes
        self.collectives = self.sent_bytes = 0
        return counts

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, collectives are counted."""

        def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
            def call(first: Tensor | list[Tensor], *args: Any, **kwargs: Any) -> Any:
                self.collectives += 1
                self.sent_bytes += sum(t.nbytes for t in (first if isinstance(first, list) else [first]))
                return collective(first, *args, **kwargs)

            return call

        with _replaced({name: counting(getattr(dist, name)) for name in ("all_reduce", "all_gather", "broadcast")}):
            yield


@contextmanager
def silence() -> Iterator[None]:
    """Inside, collectives do nothing: sums are this process's own, and what is gathered is its own part repeated."""

    def nothing(*args: Any, **kwargs: Any) -> _Done:
        return _Done()

    def repeated(parts: list[Tensor], own: Tensor, *args: Any, **kwargs: Any) -> None:
        for part in parts:
            part.copy_(own)

    with _replaced({"all_reduce": nothing, "all_gather": repeated, "broadcast": nothing}):
        yield


class _Done:
    """In the place of a collective that has begun."""

    def wait(self) -> None:
        pass


@contextmanager
def _replaced(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    before = {name: getattr(dist, name) for name in functions}
    for name, function in functions.items():
        setattr(dist, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def measure(words: argparse.Namespace, problem_of: Callable[..., Problem]) -> list[Row]:
    """A row for each way that was asked for, from `words.processes` processes on this machine.

    problem_of: the problem of a process, from the options and what it has in their place. ValueError for more
    processes than there are devices, and for batches that do not divide.
    """
    if words.device != "cpu" and words.processes > torch.cuda.device_count():
        raise ValueError(f"--processes is {words.processes}, but there are {torch.cuda.device_count()} GPUs")
    for option in ("batch", "meta_batch"):
        if getattr(words, option) % words.processes:
            name = option.replace("_", "-")
            raise ValueError(
                f"--{name} is {getattr(words, option)}, which does not divide into {words.processes} parts"
            )
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (words, problem_of, folder), nprocs=words.processes, start_method="spawn"
        )
        return [Row(**row) for row in json.loads((Path(folder) / "rows.json").read_text())]


def _process(rank: int, words: argparse.Namespace, problem_of: Callable[..., Problem], folder: str) -> None:
    """One of the processes; the first writes the rows."""
    device = torch.device(words.device if words.device == "cpu" else f"cuda:{rank}")
    if device.type == "cpu":
        torch.set_num_threads(words.threads or max(1, available_cores() // words.processes))
        keep_freed_memory()
    else:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=words.processes)
    try:
        reducer = Reducer(rank, words.processes, compressed=words.reduce_precision == "bf16")
        sizes = {option: getattr(words, option) // words.processes for option in ("batch", "meta_batch")}
        rows = _rows(words, problem_of(words, device=device, reducer=reducer, **sizes))
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json.dumps([asdict(row) for row in rows]))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _rows(words: argparse.Namespace, problem: Problem) -> list[Row]:
    counts, steps = {}, {}
    for name in words.rows:
        counts[name] = _counted(WAYS[name](problem))
        for variant in (TRAINING, AT_ONCE, SILENT):
            whole = replace(problem, reducer=replace(problem.reducer, bucket_bytes=sys.maxsize))
            way = WAYS[name](whole if variant == AT_ONCE else problem)
            steps[name, variant] = way.step if words.compile == "none" else way.compiled()[0]
            for _ in range(way.cycle):
                steps[name, variant]()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(words.rounds):
        for key, step in steps.items():
            times[key].append(_seconds(step, silent=key[1] == SILENT, device=problem.device))
    return [
        Row(
            name,
            ms=1e3 * statistics.median(times[name, TRAINING]),
            ratio_plain=median_ratio(times[name, TRAINING], times["plain", TRAINING])
            if "plain" in words.rows
            else None,
            collectives=counts[name][0],
            sent_bytes=counts[name][1],
            exposed=1 - median_ratio(times[name, SILENT], times[name, TRAINING]),
            exposed_at_once=1 - median_ratio(times[name, SILENT], times[name, AT_ONCE]),
        )
        for name in words.rows
    ]


def _counted(way: Way) -> tuple[float, float]:
    """Collectives and bytes of a step, the mean over a cycle after a first step."""
    traffic = Traffic()
    with traffic.counted():
        way.step()
        traffic.take()
        for _ in range(way.cycle):
            way.step()
    collectives, sent_bytes = traffic.take()
    return collectives / way.cycle, sent_bytes / way.cycle


def _seconds(step: Callable[[], object], *, silent: bool, device: torch.device) -> float:
    """How long the slowest process takes for a step that all begin together."""
    dist.barrier()
    wait_for(device)
    started = time.perf_counter()
    with silence() if silent else nullcontext():
        step()
        wait_for(device)
    taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def print_table(rows: list[Row]) -> None:
    """The rows for people."""
    print(f"{'':16} {'ms':>8} {'x plain':>8} {'collectives':>12} {'MB':>8} {'exposed':>8} {'at once':>8}")
    for row in rows:
        ratio = "" if row.ratio_plain is None else f"{row.ratio_plain:.2f}"
        print(
            f"{row.name:16} {row.ms:8.1f} {ratio:>8} {row.collectives:12g} {row.sent_bytes / 1e6:8.1f} "
            f"{row.exposed:8.1%} {row.exposed_at_once:8.1%}"
        )
