"""tools/benchmark.py and its `step`: the rows agree on the gradient, absent packages are named, typing errors too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastlt import cli
from fastlt.benchmarks import meta_steps, step

SMALL = [
    *("--backbone", "cifar_resnet8", "--batch", "12", "--meta-batch", "8", "--image-size", "12"),
    *("--rounds", "1", "--threads", "1", "--device", "cpu"),
]


def run(capsys, *words):
    assert cli.main(["benchmark", "step", *SMALL, "--json", *words]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}


def test_every_row_computes_the_gradient_of_float64_and_absent_packages_are_named(capsys):
    rows = run(capsys, "--no-memory")
    names = ["plain", "ours_frozen", "ours_exact", "ours_rolling", "double_backward", "higher", "torchopt"]
    assert list(rows) == names
    for name, row in rows.items():
        if meta_steps.missing(name, of_all=True):
            assert row["ms"] is None
            assert f"{name} is not installed" in row["why"]
            assert "[bench]" in row["why"]
            continue
        assert row["ms"] > 0
        assert row["why"] is None
        if name == "plain":
            assert row["grad_rel_error"] is None
            assert row["ratio_plain"] == 1
        else:
            assert row["grad_rel_error"] < 1e-3


def test_several_processes_tell_what_they_communicate_and_what_of_it_is_exposed(capsys):
    rows = run(capsys, "--processes", "2", "--rows", "plain", "ours_exact")
    numbers, classes = sum(p.numel() for p in step.problem_of(step.parse(SMALL)).model.parameters()), 10
    assert rows["plain"]["collectives"] == 1
    assert rows["plain"]["sent_bytes"] == 4 * numbers
    # Lookahead, meta batch and update, each in one bucket; the counts of A and the gradient in the class weights.
    assert rows["ours_exact"]["collectives"] == 5
    assert rows["ours_exact"]["sent_bytes"] == 4 * (3 * numbers + 2 * classes)
    for row in rows.values():
        assert row["ms"] > 0
        assert row["exposed"] < 1
        assert row["exposed_at_once"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "5"], "--batch is 12, which does not divide into 5 parts"),
        (["--processes", "2", "--rows", "plain", "higher"], "higher is measured in one process"),
    ],
)
def test_what_several_processes_cannot_measure_is_refused(words, message, capsys):
    try:
        code = cli.main(["benchmark", "step", *SMALL, *words])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_what_comes_once_in_a_cycle_has_come_before_a_step_is_measured(monkeypatch):
    calls = {"often": 0, "in_turn": 0}

    def counting(name):
        return lambda: calls.update({name: calls[name] + 1})

    cycles = {"often": 1, "in_turn": meta_steps.WINDOW}
    times = step.interleaved({name: counting(name) for name in calls}, cycles, 2, torch.device("cpu"))
    assert calls == {name: cycle + 2 for name, cycle in cycles.items()}
    assert all(len(of_way) == 2 for of_way in times.values())
    problem = step.problem_of(step.parse(SMALL))
    assert [meta_steps.WAYS[name](problem).cycle for name in ("ours_frozen", "ours_rolling")] == [1, meta_steps.WINDOW]


def test_an_absent_package_is_a_row_that_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(meta_steps.importlib.util, "find_spec", lambda name: None)
    rows = run(capsys, "--no-memory", "--rows", "plain", "higher")
    assert rows["higher"]["ms"] is None
    assert "pip install" in rows["higher"]["why"]
    assert rows["plain"]["ratio_frozen"] is None


def test_a_wrong_gradient_is_seen():
    problem = step.problem_of(step.parse(SMALL))
    way = meta_steps.DoubleBackward(problem)
    right = way.theta_gradient

    def wrong():
        return 1.1 * right()

    way.theta_gradient = wrong
    assert step.gradient_errors(problem, {"way": way})["way"] == pytest.approx(0.1, rel=1e-2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_of_a_row_is_measured_in_a_process_of_its_own(capsys):
    rows = run(capsys, "--rows", "plain", "--batch", "64", "--image-size", "32")
    # The activations of 64 images alone: 16 channels of 32x32 float32 behind each of the first three convolutions.
    assert rows["plain"]["peak_bytes"] > 3 * 64 * 16 * 32 * 32 * 4


def test_a_wrong_word_is_one_message(capsys):
    assert cli.main(["benchmark", "stepp"]) == 2
    assert "did you mean 'step'" in capsys.readouterr().err
    threads = str(torch.get_num_threads())
    assert cli.main(["benchmark", "step", "--backbone", "cifar_resnet33", "--threads", threads]) == 2
    assert "cifar_resnet3" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["step", "data", "augment"])
def test_a_device_that_is_not_there_is_one_message(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["benchmark", command, "--device", "nope"])
    assert stopped.value.code == 2
    assert "'nope' is no device of this machine; allowed here: cpu" in capsys.readouterr().err


def test_what_cannot_be_compiled_is_measured_as_it_is_and_says_so(capsys):
    rows = run(capsys, "--no-memory", "--no-errors", "--compile", "cudagraph", "--rows", "plain", "double_backward")
    for row in rows.values():
        assert row["ms"] > 0
        assert row["grad_rel_error"] is None
        assert row["why"] == "not compiled: CUDA graphs need a CUDA device"


def test_the_operations_of_a_step_are_those_of_its_passes():
    ways = {name: meta_steps.WAYS[name](step.problem_of(step.parse(SMALL))) for name in ("plain", "ours_frozen")}
    plain, ours = (step.matrix_operations(way) for way in ways.values())
    # By count of forwards, a backward pass being two: 3 for the plain step, with 8 meta images for 12 of the batch
    # 1 + 2 + 8 / 12 * 3 + 2 + 2 for ours; the first layer's input needs no gradient and has no tangent.
    assert ours / plain == pytest.approx(3, rel=0.05)
    assert step.matrix_rate(step.problem_of(step.parse(SMALL))) > 1e8


def test_a_part_of_the_network_is_measured_where_the_way_can_train_one(capsys):
    part = ["--train", "norms", "--norm", "frozen"]
    names = ["plain", "ours_frozen", "general", "double_backward", "higher"]
    rows = run(capsys, "--no-memory", *part, "--rows", *names)
    assert rows["higher"]["ms"] is None
    assert "trained as a whole" in rows["higher"]["why"]
    assert all(rows[name]["grad_rel_error"] < 1e-3 for name in names[1:4])
    problem = step.problem_of(step.parse([*SMALL, *part]))
    assert not any(module.training for module in problem.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    kept = {}
    for name in ("ours_frozen", "general"):
        way = meta_steps.WAYS[name](problem)
        way.step()
        kept[name] = way.of_fastlt.trial.refused is None
    assert kept == {"ours_frozen": True, "general": False}


def test_adapters_are_measured(capsys):
    pytest.importorskip("peft")
    adapters = ["--adapt", "{lora: {rank: 2, targets: [qkv, fc1]}}"]
    words = [*("--backbone", "vit_tiny_patch16_224", "--image-size", "32"), *adapters]
    rows = run(capsys, "--no-memory", *words, "--rows", "ours_frozen", "double_backward")
    assert all(row["grad_rel_error"] < 1e-3 for row in rows.values())
    parameters = step.problem_of(step.parse([*SMALL, *words])).model.named_parameters()
    assert all("lora" in name or name.startswith("head") for name, p in parameters if p.requires_grad)
