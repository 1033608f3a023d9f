"""Seeds of generators, and the states of the default ones, taken and put back."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^63) that follows from numbers and names."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
