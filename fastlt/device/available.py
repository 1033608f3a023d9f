"""A device that this machine has, and the wait for its work."""

from __future__ import annotations

import torch


def usable_device(device: str | torch.device | None) -> torch.device:
    """A device of torch that this machine has; ValueError for another one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # an unknown name, and a torch that was built without CUDA
        allowed = "cpu, cuda, cuda:0, …" if torch.cuda.is_available() else "cpu; there is no CUDA device"
        raise ValueError(f"{str(device)!r} is no device of this machine; allowed here: {allowed}") from None
    return torch.device(device)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
