"""What the entry points do to the streams that they print on."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Let no character end the program: one that the console cannot show is printed as its escape, such as \\xb1.

    Consoles that know ASCII or Latin-1 only have no plus-minus sign, and a file name may be no text in any encoding.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
