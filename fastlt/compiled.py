"""torch.compile: what is compiled, how it is warmed up, and what happens where it does not work.

The only file that knows the compiler. A step asks for `parts.compiler(function)` once, when it is made, and calls what
it gets; with `compile: none` that is the function itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from fastlt import checkpoint

MODES = ("none", "inductor")


class Compiler:
    """Compiles functions of a step's arithmetic, all of them or, after `give_up`, none.

    active: whether anything is compiled. warm: whether `warm_up` has been called.
    mode: "none", or "inductor" for torch.compile's default backend with the shapes of the first batch.
    """

    def __init__(self, mode: str = "none") -> None:
        assert mode in MODES, mode
        self.active = mode != "none"
        self.warm = False
        if self.active:
            # One forward is gone backward through twice: the first time must not overwrite what it saved. Of the
            # process, not of this compiler: the backward pass is compiled when it is first run, wherever that is.
            torch._functorch.config.donated_buffer = False

    def __call__(self, function: Callable) -> Callable:
        """`function`, compiled when it is first called. It must not change anything but the buffers of a module."""
        if not self.active:
            return function
        compiled = torch.compile(function, dynamic=False)

        def run(*args: Any) -> Any:
            return (compiled if self.active else function)(*args)

        return run

    def give_up(self) -> None:
        """From now on every function runs as it was written."""
        self.active = False


def warm_up(step: Any, batch: Any, meta_batch: Any) -> str | None:
    """Compile everything one iteration needs, by taking it and taking all of it back; a no-op without a compiler.

    step: a `fastlt.steps.Step`. batch, meta_batch: of the shapes that training has. What the step owns and the default
    generators are afterwards as they were before, bit for bit. Returns None, or why the step runs uncompiled.
    """
    compiler = step.parts.compiler
    compiler.warm = True
    if not compiler.active:
        return None
    reason = step.why_not_compiled()
    if reason is not None:
        compiler.give_up()
        return reason
    state, random = copy.deepcopy(step.state_dict()), checkpoint.random_states()
    try:
        # The first iteration makes the optimizers' state, the second one is like all that follow.
        for _ in range(2):
            step(batch, meta_batch)
    except Exception as error:
        compiler.give_up()
        lines = str(error).strip().splitlines() or ["no message"]
        return f"{type(error).__name__}: {lines[0]}"
    finally:
        step.load_state_dict(state)
        checkpoint.restore_random_states(random)
    return None
