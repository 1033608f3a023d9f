"""Two processes with half a batch each take the steps of one process with the whole batch, and resume as one would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import balms_reference
import pytest
import torch
from short_runs import assert_same, comparable
from two_processes import (
    BATCH_NORMS,
    CASES,
    CLASSES,
    COUNTS,
    IN_PIECES,
    ITERATIONS,
    SHAPES,
    Scaled,
    balms_batches,
    balms_step,
    train,
)

from fastlt.device.distributed import Reducer
from fastlt.run.predictions import read_predictions

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
IDS = ["-".join(case) for case in CASES]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of all cases, as each of the two processes has them."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=ENVIRONMENT) for rank in range(2)]
    try:
        assert [p.wait(timeout=240) for p in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_two_processes_equal_one(case, ranks):
    for part, tensors in train(*case, Reducer()).items():
        for name, alone in tensors.items():
            first, second = (r["-".join(case)][part][name] for r in ranks)
            assert torch.equal(first, second), f"{part}.{name} differs between the processes"
            assert torch.allclose(first.double(), alone.double(), rtol=1e-10, atol=1e-12), f"{part}.{name}"


@pytest.mark.parametrize("case", [case for case in CASES if "lean" in case[0]], ids="-".join)
def test_lean_steps_release_activations_in_every_process(case, ranks):
    # Without BatchNorm samples do not couple, and there is nothing that the meta batch would have to make room for.
    expected = [] if case[2] == "none" else [1] * ITERATIONS
    for results in ranks:
        released = results["-".join(case)]["released"]["activations"]
        assert released.tolist() == expected, "the ReLU's output, which follows from the convolution's"


def test_two_processes_draw_their_shares_as_the_reference_of_balms_does(ranks):
    step = balms_step(Reducer())
    head = {name: p.detach().clone() for name, p in step.model.head.named_parameters()}
    with torch.no_grad():
        pairs = [[(step.inputs(Scaled()(b.images)), b.labels) for b in pair] for pair in balms_batches()]
    counts = torch.from_numpy(COUNTS.counts).double()
    options = {"power": 0.3, "factor": 3, "processes": 2, "seed": 0}
    head["rates"] = balms_reference.follow(head, lambda features: features, pairs, counts, **options)
    for name, expected in head.items():
        first, second = (r["balms"][name] for r in ranks)
        assert torch.equal(first, second), f"{name} differs between the processes"
        assert torch.allclose(first, expected, rtol=1e-9, atol=1e-11), name


def test_sharded_adam_takes_the_steps_of_adam_and_its_state_goes_to_any_number_of_processes(ranks):
    """Against torch's Adam in one process, over both halves: the second one began from the gathered state."""
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    adam = torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01, foreach=True)
    for part in ("first", "later"):
        for _ in range(ITERATIONS):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape)
            adam.step()
        first, second = (r["sharded_adam"][part] for r in ranks)
        for ours, expected, others in zip(first["parameters"], parameters, second["parameters"], strict=True):
            assert torch.equal(ours, others)
            assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-7)
        assert second["whole"]["state"] == {}
        assert [len(r["share"]["exp_avg"]) for r in (first, second)] == [37, 37]
        whole = adam.state_dict()
        assert first["whole"]["param_groups"] == whole["param_groups"]
        for i, entry in whole["state"].items():
            assert first["whole"]["state"][i].keys() == entry.keys()
            for name, value in entry.items():
                ours = first["whole"]["state"][i][name]
                assert ours.shape == value.shape
                assert torch.allclose(ours, value, rtol=1e-6, atol=1e-7), (i, name)
    # An Adam in one process goes on from it.
    alone = torch.optim.Adam(parameters, lr=0.1, weight_decay=0.01, foreach=True)
    alone.load_state_dict(first["whole"])
    alone.step()


def test_a_difficulty_net_whose_adam_is_sharded_learns_the_same(ranks):
    for part, tensors in train("difficulty", "exact", "group", Reducer()).items():
        for name, alone in tensors.items():
            first, second = (r["sharded theta"][part][name] for r in ranks)
            assert torch.equal(first, second), f"{part}.{name} differs between the processes"
            assert torch.allclose(first.double(), alone.double(), rtol=1e-10, atol=1e-12), f"{part}.{name}"


def parameters_of(results):
    """Trained numbers of the network of a case."""
    return sum(t.numel() for name, t in results["model"].items() if "running" not in name and "num_batches" not in name)


# Collectives and bytes of an iteration, in float64, from the number of trained parameters; `CLASSES` counts of A are
# float32, and a batch has 12 losses. The gradients are needed before the next thing can be computed: the update's,
# alone in plain training, the lookahead's and the meta batch's. So are the counts of A and the gradient in the class
# weights, or the losses and the gradient in the weights of all samples.
TRAFFIC = {
    "plain": lambda size: (1, 8 * size),
    "cdb": lambda size: (1 + 1 / ITERATIONS, 8 * size + 4 * CLASSES / ITERATIONS),  # A once, in the only epoch
    "difficulty": lambda size: (5, 3 * 8 * size + (4 + 8) * CLASSES),
    "mwn": lambda size: (5, 3 * 8 * size + 2 * 8 * 12),
    "sample_difficulty": lambda size: (5, 3 * 8 * size + 2 * 8 * 12),
    "cb_da": lambda size: (3, 3 * 8 * size),
}


@pytest.mark.parametrize("case", [case for case in CASES if case[0].split()[0] in TRAFFIC], ids="-".join)
def test_an_iteration_communicates_no_more_than_it_must(case, ranks):
    method, _, normalisation = case
    for results in ranks:
        results = results["-".join(case)]
        collectives, sent = TRAFFIC[method.split()[0]](parameters_of(results))
        if normalisation == "batch":
            # Forward and backward; with a meta-step the lookahead's backward, the meta batch's two passes, and the
            # tangent, which carries the values along. Mean and variance of 8 channels of both processes each time.
            exchanges = BATCH_NORMS * (2 if method == "plain" else 7)
            collectives, sent = collectives + exchanges, sent + exchanges * 2 * 2 * 8 * 8
        assert results["traffic"] == pytest.approx((ITERATIONS * collectives, ITERATIONS * sent))


@pytest.mark.parametrize("case", IN_PIECES, ids="-".join)
def test_gradients_in_buckets_have_the_bits_of_gradients_in_one_piece(case, ranks):
    """A sum of two is the same in either order."""
    for results in ranks:
        results = results["-".join(case)]
        for other in ("flat", "in pieces"):
            for part, tensors in results[other].items():
                for name, tensor in tensors.items():
                    assert torch.equal(tensor, results[part][name]), (other, part, name)


@pytest.mark.parametrize("case", IN_PIECES, ids="-".join)
def test_gradients_in_bfloat16_lose_little_and_are_the_same_in_all_processes(case, ranks):
    first, second = (results["-".join(case)]["compressed"]["model"] for results in ranks)
    exact = ranks[0]["-".join(case)]["model"]
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    moved = {name for name in exact if not torch.equal(first[name], exact[name])}
    assert moved
    for name in moved:
        assert torch.allclose(first[name], exact[name], rtol=1e-2, atol=1e-2), name


def test_the_error_of_gradients_in_bfloat16_is_that_of_its_eight_bits(ranks):
    """A number in 2^k has a spacing of 2^(k-7): rounded twice, 0.2 to 0.3 % of the norm."""
    exact, rounded = (torch.cat([g.flatten() for g in ranks[0]["bfloat16"][key]]) for key in ("exact", "rounded"))
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-3 < error < 4e-3, error


def test_a_parameter_that_one_process_does_not_use_counts_as_zero_there(ranks):
    """Though BatchNorm communicates in the same pass, before the one process has the gradient and after."""
    first, second = (results["some"] for results in ranks)
    assert not any(gradient.any() for gradient in second["own"][2:4])
    assert first["own"][2].any()
    for mean, others, one, two in zip(first["mean"], second["mean"], first["own"], second["own"], strict=True):
        assert torch.equal(mean, others)
        assert torch.equal(mean, one / 2 + two / 2)


def launch(words, name, *last_words):
    """The digits on two processes; `accelerate launch --cpu` would start only one of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    stage = "stages.end_to_end"
    more = [f"{stage}.iterations=40", f"{stage}.evaluate_every=10", "log_every=2", f"name={name}", *last_words]
    return subprocess.Popen(
        [*command, "fastlt/train.py", "recipes/digits_lt.yaml", *words, *more],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children(process):
    listed = subprocess.run(
        ["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True, check=True
    )
    return [int(pid) for pid in listed.stdout.split()]


def test_two_processes_train_a_network_in_which_no_statistics_move(digits_words, tmp_path):
    """Where nothing is averaged before an evaluation: a head alone, most transformers. Each has its own masks."""
    short = ["stages.end_to_end.iterations=4", "stages.end_to_end.evaluate_every=2", "stages.end_to_end.warmup=0"]
    process = launch(digits_words, "head", "model.train=head", "model.drop_rate=0.2", *short)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert json.loads((tmp_path / "runs" / "head" / "result.json").read_text())["processes"] == 2
    state = torch.load(tmp_path / "runs" / "head" / "checkpoints" / "last.pt", weights_only=True)
    first, second = (own["random"]["cpu"] for own in state["processes"])
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "one process"])
def test_two_processes_stop_together_and_resume_bit_for_bit(digits_words, tmp_path, to):
    runs = tmp_path / "runs"
    process = launch(digits_words, "stopped")
    last = runs / "stopped" / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid if to == "launcher" else children(process)[-1], signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped by signal 15 at iteration" in output
    assert not (runs / "stopped" / "result.json").exists()
    for name in ("stopped", "whole"):
        process = launch(digits_words, name)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        assert ("resuming" in output) == (name == "stopped")
    assert_same(comparable(runs / "whole"), comparable(runs / "stopped"))
    result = json.loads((runs / "whole" / "result.json").read_text())
    assert result["processes"] == 2
    for split, predictions in read_predictions(runs / "whole" / "predictions.npz").items():
        assert predictions.index.tolist() == list(range(len(predictions))), f"{split}: each image once, in order"
        assert predictions.right.mean() == result["top1" if split == "test" else "validation_top1"]


@pytest.mark.slow
def test_two_processes_save_by_the_clock_between_evaluations(digits_words, tmp_path):
    last = tmp_path / "runs" / "timed" / "checkpoints" / "last.pt"
    words = ["stages.end_to_end.evaluate_every=40", "checkpoint_every_s=0.001", "sync_batch_norm=true"]
    process = launch(digits_words, "timed", *words)
    saved = set()
    while process.poll() is None:
        if last.exists():
            saved.add(torch.load(last, weights_only=True)["progress"]["done"])
        time.sleep(0.02)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert min(saved) < 40, saved
    assert all(done % 2 == 0 for done in saved), "off the log interval the processes have not agreed"
    buffers = [p["buffers"] for p in torch.load(last, weights_only=True)["processes"]]
    assert_same(*buffers)
