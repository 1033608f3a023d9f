"""Compiling a step: which of its functions are compiled, how that is tried, and what happens where it does not work.

With `compile: inductor` a step asks for `parts.compiler(function)` once, when it is made, and calls what it gets. With
`compile: cudagraph`, and on a CPU with `compile: replay`, whole iterations are captured and replayed, see
`fastlt.device.replay`. With `compile: none` nothing is different from ordinary Python.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from timm.optim import NAdamW
from torch import Tensor

from fastlt.device.distributed import Reducer
from fastlt.device.random_states import random_states, restore_random_states
from fastlt.device.recorded_operations import CpuCapture
from fastlt.device.replay import Capture, CudaCapture, GraphedStep, ReplayedParts, ReplayedStep
from fastlt.state import Batch, StepOutput

MODES = ("none", "inductor", "cudagraph", "replay")
# Weights from which Adam is fused: those of Difficulty-Net for 1,450 classes.
FUSED_FROM = 2**23


def mode_for(asked: str, device: torch.device, processes: int, *, on_features: bool = False) -> str:
    """What a recipe's `compile` is on a device: `auto` captures iterations where that pays, and else compiles nothing.

    on_features: whether a head is trained on features. On a CPU, Python takes most of the time of such an iteration,
    and little of that of a network on images.
    """
    if asked != "auto":
        return asked
    if processes > 1:
        return "none"
    if device.type == "cuda":
        return "cudagraph"
    return "replay" if on_features else "none"


def is_captured(mode: str) -> bool:
    """Whether whole iterations are captured in a mode, so that what changes between them has to stand in tensors."""
    return mode in ("cudagraph", "replay")


class Compiler:
    """Compiles functions of a step's arithmetic, all of them or, after `give_up`, none.

    active: whether anything is compiled.
    mode: "none"; "inductor" for torch.compile's default backend with the shapes of the first batch; "cudagraph" and
        "replay", which leave functions as they are.
    """

    def __init__(self, mode: str = "none") -> None:
        assert mode in MODES, mode
        self.mode = mode
        self.active = mode != "none"
        if mode == "inductor":
            from torch._functorch import config as functorch_config  # here, for it is heavy and for this mode alone

            # One forward is gone backward through twice: the first time must not overwrite what it saved. Of the
            # process, not of this compiler: the backward pass is compiled when it is first run, wherever that is.
            functorch_config.donated_buffer = False

    @property
    def captures(self) -> bool:
        """Whether whole iterations are captured in this mode, see `is_captured`."""
        return is_captured(self.mode)

    @property
    def traces(self) -> bool:
        """Whether functions are taken apart into their operations now, so that Python must not watch them run."""
        return self.active and self.mode == "inductor"

    def __call__(self, function: Callable) -> Callable:
        """`function`, compiled when it is first called. It must not change anything but the buffers of a module."""
        if self.mode != "inductor":
            return function
        compiled = torch.compile(function, dynamic=False)

        def run(*args: Any) -> Any:
            return (compiled if self.active else function)(*args)

        return run

    def give_up(self) -> None:
        """From now on every function runs as it was written."""
        self.active = False


class CompilableParts(ReplayedParts, Protocol):
    """What compiling a step needs of its parts; see `fastlt.steps.StepParts`."""

    @property
    def compiler(self) -> Compiler: ...


class CompilableStep(ReplayedStep, Protocol):
    """What compiling needs of a step; see `fastlt.steps.Step`."""

    @property
    def parts(self) -> CompilableParts: ...
    @property
    def parameters(self) -> Sequence[Tensor]: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def reducer(self) -> Reducer: ...

    def why_not_compiled(self, batch: Batch) -> str | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def make_sgd(groups: list[dict[str, Any]], mode: str, lr: float, device: torch.device, **options: Any):
    """torch.optim.SGD, with learning rates on `device` where a captured iteration is to read them there."""
    if not is_captured(mode):
        return torch.optim.SGD(groups, lr=lr, foreach=True, **options)
    # A tensor for each group: the optimizer would share one among them.
    groups = [{**group, "lr": torch.tensor(lr, device=device)} for group in groups]
    return torch.optim.SGD(groups, lr=lr, fused=True, **options)


# Optimizers whose whole state is tensors that begin at zero and that they change on the device.
_CAPTURED: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, NAdamW)


def capturable(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether the steps of an optimizer can be captured and replayed: others count in Python, which is not replayed."""
    return kind in _CAPTURED


def capturable_options(kind: type[torch.optim.Optimizer], device: torch.device) -> dict[str, Any]:
    """The implementation of a `capturable` optimizer whose steps are captured."""
    fused = {"fused": True} if kind.__module__.startswith("torch.") else {}
    return {**fused, "capturable": device.type == "cuda"}


def laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in memory as its parameter is.

    Fused optimizers go through memory as if both were laid out alike, whether they are or not.
    """
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def adam_options(mode: str, device: torch.device, weights: int = 0) -> dict[str, Any]:
    """The implementation of Adam: a captured iteration counts its steps on the device.

    weights: how many it moves. Of many, the fused one goes through memory once, and rounds otherwise in the last bit.
    """
    if is_captured(mode):
        return {"fused": True, "capturable": device.type == "cuda"}
    return {"fused": True} if weights >= FUSED_FROM else {"foreach": True}


# Options of a group that say how torch computes a step, and not what.
_IMPLEMENTATION = ("foreach", "fused", "capturable")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict(state)`, of whatever implementation `state` is; the optimizer keeps its own.

    So a run that was captured goes on where it is not, and the other way round. Step counts go where the implementation
    reads them: Adam's ordinary one would otherwise wait for a GPU in every iteration.
    """
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group = {**saved, **{key: own[key] for key in _IMPLEMENTATION if key in own}}
        if isinstance(own["lr"], Tensor):
            group["lr"] = torch.as_tensor(saved["lr"], dtype=own["lr"].dtype, device=own["lr"].device).clone()
        else:
            group["lr"] = float(saved["lr"])
        groups.append(group)
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for entry in (optimizer.state[p] for p in group["params"] if p in optimizer.state):
            if isinstance(entry.get("step"), Tensor) and not on_device:
                entry["step"] = entry["step"].cpu()


CAPTURES: dict[str, Callable[[], Capture]] = {"cudagraph": CudaCapture, "replay": CpuCapture}


def ready(
    step: CompilableStep, batch: Batch, meta_batch: Batch | None, capture: Capture | None = None
) -> tuple[Callable[[Batch, Batch | None], StepOutput], str | None]:
    """What takes the iterations of `step` as its compiler says, and None or why it is the step itself, uncompiled.

    batch, meta_batch: of the shapes that training has. Everything is tried with them and
    taken back: what the step owns and the default generators are afterwards as they were, bit for bit. capture: that of
    the mode unless given.
    """
    compiler = step.parts.compiler
    if not compiler.active:
        return step, None
    before, random = copy.deepcopy(step.state_dict()), random_states()
    try:
        reason = step.why_not_compiled(batch) or (why_no_graph(step, capture) if compiler.captures else None)
        if reason is not None:
            compiler.give_up()
            return step, reason
        # The first iteration makes the optimizers' state, the second one is like all that follow.
        for _ in range(2):
            step(batch, meta_batch)
        if compiler.mode == "inductor":
            return step, None
        give_optimizers_state(before, step.state_dict())
        make_capture = CAPTURES[compiler.mode]
        GraphedStep(step, batch, meta_batch, capture or make_capture())(batch, meta_batch)
        # Another one, since the optimizers' state is about to be put into new memory; and a pool of its own, since
        # nothing can be captured into one whose graphs are all gone.
        return GraphedStep(step, batch, meta_batch, capture or make_capture()), None
    except Exception as error:
        compiler.give_up()
        for augment in (step.parts.augment, step.parts.meta_augment):
            if compiler.captures and augment is not None:
                augment.release()
        lines = str(error).strip().splitlines() or ["no message"]
        return step, f"{type(error).__name__}: {lines[0]}"
    finally:
        step.load_state_dict(before)
        restore_random_states(random)


def why_no_graph(step: CompilableStep, capture: Capture | None) -> str | None:
    """Why the iterations of `step` cannot be captured, None when they can."""
    device = step.parameters[0].device.type
    if capture is None and step.parts.compiler.mode == "cudagraph" and device != "cuda":
        return "CUDA graphs need a CUDA device"
    if capture is None and step.parts.compiler.mode == "replay" and device != "cpu":
        return "iterations are replayed on a CPU; a CUDA device has compile: cudagraph for that"
    if any(group.get("dampening") for group in step.optimizer.param_groups):
        return "the first step of SGD with dampening is another than those that follow"
    if step.reducer.world_size > 1:
        return "with several processes an iteration waits for the others, which is not captured"
    return None


def give_optimizers_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Give optimizers that had no state in `before` that of `after`, with zeros: the same, and a graph can refer to it.

    before, after: state_dicts of a step. Changes `before`. The first step of SGD copies the gradient where later ones
    add it to a momentum; on a momentum of zero both do the same. Adam starts at zero anyway.
    """
    for key, value in before.items():
        if isinstance(value, dict) and "param_groups" in value and not value["state"]:
            value["state"] = {
                index: {name: torch.zeros_like(t) if isinstance(t, Tensor) else t for name, t in entry.items()}
                for index, entry in after[key]["state"].items()
            }
