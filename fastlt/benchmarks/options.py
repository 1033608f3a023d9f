"""A benchmark's --device, checked: a device that is not there is one message and exit code 2."""

from __future__ import annotations

import argparse

import torch


def usable_device(text: str) -> str:
    """A device of torch that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):  # an unknown name, and a torch that was built without CUDA
        allowed = "cpu, cuda, cuda:0, ..." if torch.cuda.is_available() else "cpu; there is no CUDA device"
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; allowed here: {allowed}") from None
    return text
