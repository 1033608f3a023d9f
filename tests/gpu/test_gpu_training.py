"""Whole runs on a GPU: every loader, precision and way to compile, and runs that were stopped."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from on_gpu import DEVICE, no_waiting
from short_runs import RECIPE, STAGE, assert_same, comparable, log_lines, stop_after
from small_betons import needs_dali, needs_ffcv

from fastlt.recipe import load_recipe
from fastlt.run import result as result_module
from fastlt.run.dataset import ensure_converted
from fastlt.run.loading import endless
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer

pytestmark = pytest.mark.gpu

ITERATIONS = 12
# Relative to the loss, over the iterations of a run: the fused optimizer rounds its sums in another order, and in
# bfloat16 a weight that is rounded to its neighbour is 4e-3 off.
LOSS_TOLERANCE = {"fp32": 1e-2, "bf16": 6e-2}
LOADERS = {"resident": [], "torch": [], "ffcv": [needs_ffcv], "dali": [needs_ffcv, needs_dali]}


@pytest.fixture(autouse=True)
def no_versions(monkeypatch):
    """A result names the versions of all packages; a machine for tests may lack one that a run does not use."""
    monkeypatch.setattr(result_module, "versions", dict)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Where the digits are for a loader: both formats, or nowhere for what reads them from scikit-learn."""
    folder = tmp_path_factory.mktemp("data") / "both"

    def words(loader: str) -> list[str]:
        if loader not in ("ffcv", "dali"):
            return ["data.convert=false"]
        if not folder.exists():
            ensure_converted(replace(load_recipe(RECIPE).data, loader="dali"), folder)
        return [f"data.converted={folder}"]

    return words


@pytest.fixture
def make(converted, tmp_path):
    def make(loader, precision="fp32", compile="none", *more, name="run"):
        words = [f"runs={tmp_path}", f"name={name}", f"data.loader={loader}", *converted(loader), "num_threads=1"]
        words += [f"precision={precision}", f"compile={compile}", "log_every=1", "data.num_workers=1"]
        words += [f"{STAGE}.iterations={ITERATIONS}", f"{STAGE}.warmup=2", f"{STAGE}.evaluate_every=6", *more]
        return Trainer(prepare(load_recipe(RECIPE, words)))

    return make


def losses(trainer):
    return [line["loss"] for line in log_lines(trainer.folder) if line["kind"] == "train"]


def cases(*cells):
    """(loader, precision, compile) with the loader's marks."""
    return [pytest.param(*cell, marks=LOADERS[cell[0]], id="-".join(cell)) for cell in cells]


@pytest.mark.parametrize(
    ("loader", "precision"),
    cases(
        ("resident", "fp32"),
        ("resident", "bf16"),
        ("torch", "fp32"),
        ("ffcv", "fp32"),
        ("dali", "bf16"),
    ),
)
def test_a_captured_run_says_so_and_ends_as_an_ordinary_one(make, capsys, loader, precision):
    runs = {}
    for compile in ("none", "cudagraph"):
        trainer = make(loader, precision, compile, name=compile)
        assert trainer.context.device.type == DEVICE.type
        result = trainer.fit()
        said = capsys.readouterr().out
        assert "not compiled" not in said
        assert ("compiled in" in said) == (compile == "cudagraph")
        assert result["device"] == torch.cuda.get_device_name(trainer.context.device)
        assert result["precision"] == precision
        assert 0 <= result["top1"] <= 1
        assert math.isclose(sum(result["class_weights"]), 10, rel_tol=1e-3)
        runs[compile] = losses(trainer)
        assert len(runs[compile]) == ITERATIONS
    assert runs["cudagraph"] == pytest.approx(runs["none"], rel=LOSS_TOLERANCE[precision])


def test_a_run_that_cannot_be_captured_says_why_and_trains(make, capsys):
    make("resident", "fp32", "cudagraph", f"{STAGE}.options={{approximate: {{every: 2}}}}").fit()
    assert "not compiled: approximate.every" in capsys.readouterr().out


@pytest.fixture
def deterministic():
    """Kernels without atomic sums, where there are some; where not, torch warns."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def resumed(make, *words):
    """A run that was stopped after two thirds, and went on."""
    with pytest.raises(Interrupted):
        stop_after(make(*words, name="stopped"), 8).fit()
    trainer = make(*words, name="stopped")
    assert trainer.progress.done == 8
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("loader", "precision"),
    cases(("resident", "fp32"), ("resident", "bf16"), ("ffcv", "fp32"), ("dali", "fp32")),
)
def test_a_resumed_run_ends_as_an_uninterrupted_one_bit_for_bit(make, deterministic, loader, precision):
    whole = make(loader, precision, name="whole")
    whole.fit()
    again = make(loader, precision, name="again")
    again.fit()
    assert_same(comparable(whole.folder), comparable(again.folder))  # else the kernels are not deterministic
    other = resumed(make, loader, precision)
    assert losses(other) == losses(whole)
    assert_same(comparable(whole.folder), comparable(other.folder))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_run_is_resumed(make, capsys, precision):
    """Deterministic sums read their indices on the host, which no capture allows: equal up to the order of sums."""
    whole = make("resident", precision, "cudagraph", name="whole")
    whole.fit()
    capsys.readouterr()
    other = resumed(make, "resident", precision, "cudagraph")
    assert capsys.readouterr().out.count("compiled in") == 2
    assert losses(other) == pytest.approx(losses(whole), rel=LOSS_TOLERANCE[precision])
    one, same = comparable(whole.folder), comparable(other.folder)
    assert one["progress"]["images"] == same["progress"]["images"]
    for key in ("augment", "meta_augment"):
        assert_same(one["processes"][0]["step"][key], same["processes"][0]["step"][key])


@pytest.mark.parametrize("compile", ["none", "cudagraph"])
@pytest.mark.parametrize("loader", [pytest.param(name, marks=LOADERS[name]) for name in ("resident", "ffcv")])
def test_the_loop_does_not_wait_between_two_logs(make, loader, compile):
    """Batches, learning rates and iterations, in the middle of an epoch: positions of an epoch are uploaded once."""
    trainer = make(loader, "fp32", compile)
    stage = trainer.build_stage("end_to_end")
    train, meta = stage.loaders.train, stage.loaders.meta
    stage.step.train_mode()
    stage.step.start_epoch(0)
    batches = endless(train, 0)
    pairs = [(next(batches), next(endless(meta, 0))) for _ in range(2)]
    iterate = trainer.compiled(stage, *pairs[0])
    for pair in pairs:
        stage.set_learning_rate(1)
        iterate(*pair)
    assert len(train) > 5
    with no_waiting():
        for position in range(3):
            stage.set_learning_rate(2 + position)
            output = iterate(next(batches), pairs[0][1])
    assert torch.isfinite(output.loss)
    stage.loaders.close()
