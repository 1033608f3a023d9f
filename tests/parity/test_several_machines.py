"""Several machines without a shared disk train one run: what process 0 has is enough, and they end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from machines import Machines
from short_runs import stop_after
from test_processes import assert_same, comparable

from fastlt.benchmarks.file_server import free_port
from fastlt.models import build_model
from fastlt.recipe import load_recipe
from fastlt.run.dataset import ensure_converted
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
STAGE = "stages.end_to_end"
RECIPE = """
base: [{base}]
data: {{converted: data/digits, loader: resident}}
model: {{checkpoint: weights.pt}}
log_every: 1
stages:
  end_to_end: {{iterations: 12, warmup: 2, evaluate_every: 6, schedule: constant}}
  second: {{method: crt, loss: balanced_softmax, iterations: 4, evaluate_every: 2, batch_size: 32, lr: 0.01}}
"""


@pytest.fixture
def folders(digits, tmp_path):
    """Two machines: each has the data set, and the first one has the recipe and the weights."""
    found = [tmp_path / f"machine{node}" for node in range(2)]
    for folder in found:
        shutil.copytree(digits, folder / "data" / "digits")
    (found[0] / "mine.yaml").write_text(RECIPE.format(base=ROOT / "recipes" / "digits_lt.yaml"))
    torch.manual_seed(3)
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), found[0] / "weights.pt")
    return found


def test_a_run_of_one_process_goes_on_on_two_machines_that_share_nothing(folders, monkeypatch):
    monkeypatch.chdir(folders[0])
    with pytest.raises(Interrupted):
        stop_after(Trainer(prepare(load_recipe("mine.yaml"))), 7).fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    with Machines(folders) as machines:
        machines.start("mine.yaml")
        (code, out, told), (other_code, other_out, other_told) = machines.ends()
    assert (code, other_code) == (0, 0), told + other_told
    assert "resuming runs/mine at iteration 7 of stage end_to_end" in out
    assert "1 processes saved it, 2 go on: the batches stay the same" in out
    assert "run folder: runs/mine" in out
    assert not other_out
    run = folders[0] / "runs" / "mine"
    result = json.loads((run / "result.json").read_text())
    assert [(part["from_iteration"], part["processes"]) for part in result["parts"]] == [(0, 1), (7, 2)]
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert [line["iteration"] for line in lines if line["kind"] == "train"] == list(range(1, 17))
    last = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert_same(*(process["buffers"] for process in last["processes"]))
    assert (run / "model" / "model.safetensors").is_file()
    assert sorted(path.name for path in folders[1].iterdir()) == ["data"], "nothing else is needed or written there"


def test_a_machine_with_another_data_set_is_named(folders, monkeypatch):
    monkeypatch.chdir(folders[0])
    shutil.rmtree(folders[1] / "data")
    recipe = load_recipe("mine.yaml", ["data.storage={mode: jpg}"])
    ensure_converted(recipe.data, folders[1] / "data" / "digits")
    with Machines(folders) as machines:
        machines.start("mine.yaml")
        ends = machines.ends()
    for code, _, told in ends:
        assert code == 2
        assert f"fastlt: on host {os.uname().nodename}: data/digits is not the data set that process 0 has" in told
        assert "train has as many images of each class, but they are other images" in told
        assert "Traceback" not in told
    assert not (folders[0] / "runs" / "mine").exists()


def test_the_error_of_one_process_ends_all_with_its_message(folders):
    with Machines(folders) as machines:
        machines.start("mine.yaml", fault="error")
        (code, out, told), (failed_code, _, failed_told) = machines.ends()
    assert (code, failed_code) == (1, 1)
    message = f"fastlt: process 1, on host {os.uname().nodename}: KeyError: 'made up'"
    assert message in told.splitlines()
    assert "Traceback" not in told
    assert "gloo" not in told
    assert failed_told.splitlines()[-1] == message
    assert failed_told.count("Traceback") == 1
    assert "raise KeyError" in failed_told
    assert "stopping after this iteration" not in out


@pytest.mark.slow
def test_four_processes_on_two_machines_stop_and_go_on_bit_for_bit(folders):
    runs = folders[0] / "runs"
    with Machines(folders, per_node=2) as machines:
        machines.launch("mine.yaml", "name=stopped", f"{STAGE}.iterations=60")
        last = runs / "stopped" / "checkpoints" / "last.pt"
        deadline = time.monotonic() + 200
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(machines.started[1].pid, signal.SIGTERM)
        assert "stopped by signal 15 at iteration" in machines.ends()[0][1]
        for name in ("stopped", "whole"):
            machines.launch("mine.yaml", f"name={name}", f"{STAGE}.iterations=60")
            ends = machines.ends(300)
            assert [code for code, *_ in ends] == [0, 0], ends
            assert ("resuming" in ends[0][1]) == (name == "stopped")
    assert_same(comparable(runs / "whole"), comparable(runs / "stopped"))
    assert not (folders[1] / "runs").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(folders):
    with Machines(folders) as machines:
        machines.start("mine.yaml", fault="kill")
        (code, _, told), (killed, _, _) = machines.ends()
        assert (code, killed) == (1, -signal.SIGKILL)
        assert f"fastlt: process 1, on host {os.uname().nodename}: it ended without a word, as by a kill" in told
        assert "Traceback" not in told


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_processes_are_started_again(folders, nodes):
    """By their launcher, or by two that have to agree."""
    with Machines(folders[:nodes], per_node=3 - nodes) as machines:
        machines.launch("mine.yaml", fault="kill once", options=["--max-restarts", "2"])
        ends = machines.ends(400)
    assert {code for code, *_ in ends} == {0}, ends
    assert (folders[nodes - 1] / "failed").exists()
    assert (folders[0] / "runs" / "mine" / "result.json").is_file()


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_start_of_which_one_process_does_not_come_is_tried_again(folders):
    with Machines(folders[:1], per_node=2) as machines:
        machines.launch("mine.yaml", fault="absent once", options=["--max-restarts", "2"])
        ((code, _, told),) = machines.ends(400)
    assert code == 0, told
    assert "process 1 has not come within 15 s" in told
    assert (folders[0] / "runs" / "mine" / "result.json").is_file()


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_machine_that_was_lost_is_replaced(folders, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    port = free_port()

    def launch(machines, node):
        holds_endpoint = ["--rdzv_conf", f"is_host={int(node == 0)}"]
        machines.launch_node(
            node, port, "mine.yaml", fault="lose once", options=["--max-restarts", "2", *holds_endpoint]
        )

    with Machines(folders) as machines:
        launch(machines, 0)
        launch(machines, 1)
        machines.started[1].wait(250)
        launch(machines, 1)
        (code, _, told), (lost, _, _), (new_code, _, new_told) = machines.ends(250)
    assert (code, lost, new_code) == (0, -signal.SIGKILL, 0), told + new_told
    assert (folders[0] / "runs" / "mine" / "result.json").is_file()


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(folders):
    """Four, then two, then one."""
    for per_node, nodes, more in ((2, 2, "8"), (2, 1, "10"), (1, 1, "12")):
        with Machines(folders[:nodes], per_node=per_node) as machines:
            machines.start("mine.yaml", "stages.second=null", f"{STAGE}.iterations={more}")
            ends = machines.ends()
        assert {code for code, *_ in ends} == {0}, ends
    result = json.loads((folders[0] / "runs" / "mine" / "result.json").read_text())
    assert [(part["from_iteration"], part["processes"]) for part in result["parts"]] == [(0, 4), (8, 2), (10, 1)]
