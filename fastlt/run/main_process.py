"""Work that one process does for all processes of a run, or one on each node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from fastlt.run.processes import Processes, connect

T = TypeVar("T")


def on_main(state: Accelerator | PartialState, work: Callable[[], T]) -> T:
    """Run `work` on the main process; every process returns its result, or raises its ValueError.

    An OSError, as of a file that cannot be read or written, becomes a ValueError: it is a matter of the user's data.
    The other processes wait, without a limit of time. What is returned has to be small: it is sent to all of them;
    `from_main` sends tensors.
    """
    outcome: list = _outcome(work) if state.is_main_process else [None, None]
    if state.num_processes > 1:
        _meet()
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] from None
    return outcome[0]


def on_nodes(processes: Processes, work: Callable[[], None]) -> None:
    """Run `work` on one process of every node but the main process's; a ValueError of any is raised on all, with hosts.

    The other processes wait, without a limit of time.
    """
    nodes = {placement.node for placement in processes.placements}
    if len(nodes) == 1:
        return
    mine = processes.first_of_node and 0 not in processes.on_node
    error = _outcome(work)[1] if mine else None
    _meet()
    failed = gather_object([error])
    told = [
        f"on host {processes.placements[rank].host}: {text}" for rank, text in enumerate(failed) if text is not None
    ]
    if told:
        raise ValueError("\n".join(dict.fromkeys(told)))


def from_main(state: Accelerator, work: Callable[[], T]) -> T:
    """As `on_main`, for results with tensors in nested dicts, lists and tuples; each is on the device of its kind here.

    Tensors are sent one by one, from memory to memory.
    """
    if state.num_processes == 1:
        return on_main(state, work)
    tensors: list[Tensor] = []
    outline = on_main(state, lambda: _outline(work(), tensors))
    sent = iter(tensors)
    return cast("T", _filled(outline, state, lambda: next(sent)))


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in an outline, and what of it has to be known before it is received."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    on_host: bool


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """The value with places for its tensors, which are appended to `tensors`, dense in memory."""
    if isinstance(value, Tensor):
        dense = value.is_contiguous() or (value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last))
        tensors.append(value.detach() if dense else value.detach().contiguous())
        sent = tensors[-1]
        return _Place(tuple(sent.shape), sent.stride(), sent.dtype, sent.device.type == "cpu")
    return _nested(value, lambda part: _outline(part, tensors))


def _filled(outline: Any, state: Accelerator, next_sent: Callable[[], Tensor]) -> Any:
    if isinstance(outline, _Place):
        # On the device by which processes communicate, and as bytes: backends differ in the types that they take.
        device = torch.device("cpu") if state.device.type == "cpu" else state.device
        if state.is_main_process:
            original = next_sent()
            on_way = original.to(device)
        else:
            original = on_way = torch.empty_strided(outline.shape, outline.stride, dtype=outline.dtype, device=device)
        if on_way.numel():
            dist.broadcast(on_way.as_strided((on_way.numel(),), (1,)).view(torch.uint8), 0)
        if state.is_main_process:
            return original
        return on_way.cpu() if outline.on_host else on_way
    return _nested(outline, lambda part: _filled(part, state, next_sent))


def _nested(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container with each of its values changed; anything else as it is."""
    if isinstance(value, dict):
        return {key: change(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(change(part) for part in value)
    return value


def _outcome(work: Callable[[], Any]) -> list:
    """What `work` returns, and None; or None, and its error for the user."""
    try:
        return [work(), None]
    except ValueError as error:
        return [None, error]
    except OSError as error:
        return [None, ValueError(f"{error.filename}: {error.strerror}" if error.filename else str(error))]


def _meet() -> None:
    """Wait for all processes, also for one that works longer than a collective would wait."""
    peers = connect().peers
    assert peers is not None
    peers.meet()
