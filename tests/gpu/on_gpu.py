"""What the tests on a GPU share."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

# Read when cuBLAS is first used: deterministic algorithms ask for it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE = torch.device("cuda")


@contextmanager
def no_waiting():
    """Inside, an operation that makes the host wait for the GPU is an error; what ran before is waited for first."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
