"""No iteration of any method makes the host wait for the device: nothing in it reads a number back from a tensor."""

from __future__ import annotations

import functools

import pytest
import torch
from test_combinations import FIRST, SECOND, load, stage
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.steps import STEPS

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default}


class NothingIsRead(TorchDispatchMode):
    """An error where a tensor's values decide what the host does next, but for the step counts of Adam.

    Those it keeps on the host, on a GPU too.
    """

    optimizing = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in READS and not NothingIsRead.optimizing:
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


# What fetches a whole tensor; on a CPU nothing is dispatched for it. (`numpy` refuses a GPU's tensor by itself.)
FETCHES = {Tensor.cpu, Tensor.tolist}


class NothingIsFetched(TorchFunctionMode):
    """An error where a tensor is brought to the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FETCHES:
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """Every step is watched; returns the names of the methods whose iterations were."""
    seen = []

    def watch(name, call):
        @functools.wraps(call)
        def iterate(*args):
            seen.append(name)
            with NothingIsRead(), NothingIsFetched():
                return call(*args)

        return iterate

    for name, kind in STEPS.items():
        monkeypatch.setattr(kind, "__call__", watch(name, kind.__call__))

    step = torch.optim.Adam.step

    def optimize(*args, **kwargs):
        NothingIsRead.optimizing = True
        try:
            return step(*args, **kwargs)
        finally:
            NothingIsRead.optimizing = False

    monkeypatch.setattr(torch.optim.Adam, "step", optimize)
    return seen


def test_no_method_reads_a_number_back(digits, tmp_path, watched):
    methods = [*FIRST, *SECOND]
    words = [f"data.converted={digits}", f"runs={tmp_path}", "data.loader=resident", "num_threads=1", "data.augment=[]"]
    Trainer(prepare(load([stage(method) for method in methods], *words, "log_every=1000"))).fit()
    assert set(methods) <= set(watched)


READERS = {
    "item": Tensor.item,
    "bool": bool,
    "cpu": Tensor.cpu,
    "tolist": lambda t: t.detach().tolist(),
}


@pytest.mark.parametrize("read", READERS)
def test_what_reads_a_number_back_is_found(digits, tmp_path, watched, monkeypatch, read):
    kind = STEPS["plain"]
    monkeypatch.setattr(kind, "descend", lambda self, objective: READERS[read](objective))
    words = [f"data.converted={digits}", f"runs={tmp_path}", "data.loader=resident", "num_threads=1"]
    with pytest.raises(AssertionError, match="makes the host wait"):
        Trainer(prepare(load([stage("plain")], *words))).fit()
