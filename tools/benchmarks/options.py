"""Types of the benchmarks' options, for argparse: what makes no sense is one message and exit code 2."""

from __future__ import annotations

import argparse

import torch


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def usable_device(text: str) -> str:
    """A device of torch that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):  # an unknown name, and a torch that was built without CUDA
        allowed = "cpu, cuda, cuda:0, ..." if torch.cuda.is_available() else "cpu; there is no CUDA device"
        raise argparse.ArgumentTypeError(f"{text!r} is no device of this machine; allowed here: {allowed}") from None
    return text
