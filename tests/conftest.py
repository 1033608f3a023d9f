"""Shared pieces of the tests: a converted data set, a short recipe, and where real data may be found."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[1]
# Small tensors: a second thread costs more than it brings, and results do not depend on the machine.
torch.set_num_threads(1)


def pytest_runtest_setup(item):
    """Tests marked gpu are skipped, before any fixture works for them, where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def full_float32(request):
    """On a GPU float32 is not cut to TF32, which torch does in convolutions: bounds are those of float32.

    Nor does cuDNN time its algorithms, but where a test or the trainer asks for it.
    """
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, convolutions.benchmark, products.allow_tf32
    convolutions.allow_tf32, convolutions.benchmark, products.allow_tf32 = False, False, False
    yield
    convolutions.allow_tf32, convolutions.benchmark, products.allow_tf32 = before


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch):
    """On a busy machine a run gives advice, see `fastlt.device.openmp`; tests see the same output on each."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate allows one configuration a process; each test gets its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def real_data():
    """Path of one piece of real data below FASTLT_TEST_DATA; the test is skipped, by name, where it is absent."""

    def find(name: str) -> Path:
        folder = os.environ.get("FASTLT_TEST_DATA")
        if folder is None or not (Path(folder) / name).exists():
            pytest.skip(f"real data: {name} is not below FASTLT_TEST_DATA")
        return Path(folder) / name

    return find


@pytest.fixture
def no_shared_memory_left():
    """Afterwards, no segment of shared memory is left that was not there before.

    The folder is the whole machine's: segments of other programs come and go, one that was leaked stays.
    """

    def segments() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("psm_*")}

    before = segments()
    yield
    new = segments() - before
    deadline = time.monotonic() + 30
    while new & segments() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not new & segments()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The long-tailed digits of recipes/digits_lt.yaml, converted once for all tests."""
    from fastlt.recipe import load_recipe
    from fastlt.run.dataset import ensure_converted

    folder = tmp_path_factory.mktemp("data") / "digits"
    ensure_converted(load_recipe(ROOT / "recipes" / "digits_lt.yaml").data, folder)
    return folder


@pytest.fixture
def digits_words(digits, tmp_path):
    """Override words for a run of a few seconds on the digits, below `tmp_path`."""
    stage = "stages.end_to_end"
    return [
        f"data.converted={digits}",
        f"runs={tmp_path / 'runs'}",
        "data.loader=resident",
        "num_threads=1",
        "log_every=1",
        f"{stage}.iterations=12",
        f"{stage}.warmup=2",
        f"{stage}.evaluate_every=6",
    ]
