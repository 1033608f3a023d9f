"""The subcommands of `fastlt`, one module each: its arguments, what it prints, and its exit codes.

Each has `main(words, prog)`: the words after the command's name, and the name by which it was called.
"""

from __future__ import annotations

import importlib
import sys

from fastlt.device.openmp import load_llvm_openmp


def run(module: str, words: list[str], prog: str) -> int:
    """Call a module's `main(words, prog)`; returns the exit code.

    A ValueError is one message and code 2, and so is a file that cannot be read or written. A reader that failed is
    one message and code 1.
    """
    try:
        load_llvm_openmp()
        return importlib.import_module(module).main(words, prog)
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None or isinstance(error, ConnectionError):
            raise
        print(f"{prog}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from loaders.stored.damage import ReaderError

        if not isinstance(error, ReaderError):
            raise
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
