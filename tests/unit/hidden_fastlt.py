"""Python in a process in which fastlt cannot be imported, as on the machine of whoever uses an exported model."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastlt", "loaders"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""


def without_fastlt(code: str, folder: Path) -> str:
    """Run `code` in `folder`; returns what it printed."""
    words = [sys.executable, "-c", HIDDEN + textwrap.dedent(code)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
