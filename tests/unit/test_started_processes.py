"""As many processes as were started have to see each other, or the run is refused with the command to give."""

from __future__ import annotations

import pytest
import torch

from fastlt.run import processes
from fastlt.run.processes import check_all_seen, connect

VARIABLES = (
    *("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU"),
    *processes.OTHER_LAUNCHERS,
)


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refusal(monkeypatch, seen=1, **environment):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match="process") as refused:
        check_all_seen(seen)
    return str(refused.value)


def test_one_process_has_nobody_to_see():
    alone = connect()
    assert (alone.rank, alone.on_node, alone.peers) == (0, [0], None)
    check_all_seen(1)


def test_what_agrees_is_taken(monkeypatch):
    for started, seen in (("1", 1), ("4", 4)):
        monkeypatch.setenv("WORLD_SIZE", started)
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # two launchers
        check_all_seen(seen)


def test_torchrun_on_cpus_is_told_the_command(monkeypatch):
    said = refusal(monkeypatch, WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4", GROUP_WORLD_SIZE="1")
    assert said == (
        "4 processes were started, but torch sees no GPU here and each would train by itself: start them by\n"
        "  ACCELERATE_USE_CPU=true torchrun --nproc_per_node 4 -m fastlt train RECIPE"
    )


def test_torchrun_on_cpus_of_several_machines_is_told_the_command(monkeypatch):
    said = refusal(monkeypatch, WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", GROUP_WORLD_SIZE="2")
    command = "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT --nproc_per_node 2 -m fastlt train"
    assert f"\n  ACCELERATE_USE_CPU=true {command} RECIPE" in said


def test_gpus_without_the_number_on_the_node_are_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = refusal(monkeypatch, WORLD_SIZE="2")
    assert "without LOCAL_RANK each would train by itself" in said
    assert said.endswith("\n  torchrun --nproc_per_node 2 -m fastlt train RECIPE")


def test_other_numbers_are_refused_too(monkeypatch):
    assert "4 processes were started, but Accelerate sees 2" in refusal(monkeypatch, seen=2, WORLD_SIZE="4")


@pytest.mark.parametrize(("variable", "launcher"), processes.OTHER_LAUNCHERS.items())
def test_processes_of_another_launcher_do_not_train_alone(monkeypatch, variable, launcher):
    said = refusal(monkeypatch, **{variable: "8"})
    assert said.startswith(f"{launcher} has started 8 processes")
    assert "docs/distributed.md" in said
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_all_seen(1)


def test_accelerate_launch_on_cpus_does_not_pretend_to_start_several(monkeypatch):
    said = refusal(monkeypatch, ACCELERATE_USE_CPU="True", MASTER_ADDR="10.0.0.1")
    assert "accelerate launch --cpu starts one process" in said
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m fastlt train RECIPE" in said
