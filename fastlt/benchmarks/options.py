"""Options that several benchmarks have."""

from __future__ import annotations

import argparse

from fastlt.device.available import usable_device


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device; one that is not there is one message and exit code 2."""
    parser.add_argument("--device", type=_device, default=str(usable_device(None)))


def _device(text: str) -> str:
    try:
        usable_device(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
