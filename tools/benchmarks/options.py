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
    """A device of torch that is there."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # an unknown name, and a torch that was built without CUDA
        raise argparse.ArgumentTypeError(f"{text!r} is no device here ({str(error).splitlines()[0]})") from None
    return text
