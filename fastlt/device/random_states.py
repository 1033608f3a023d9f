"""The states of the default random generators, taken and put back."""

from __future__ import annotations

from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """The default generators of torch and CUDA: dropout draws from them, everything else has a generator of its own."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the states of `random_states` back; with another number of CUDA devices theirs are left as they are."""
    torch.set_rng_state(states["cpu"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in states["cuda"]])
