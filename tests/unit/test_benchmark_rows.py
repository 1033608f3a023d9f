"""tools/benchmark.py's `data`, `augment` and `train`: the rows that --json prints, and what is refused."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_betons import needs_dali, smooth_images

from fastlt import cli
from fastlt.augment import Augment, build_augment
from fastlt.benchmarks import augment as benchmark_augment
from fastlt.benchmarks import train as benchmark_train
from fastlt.device import compiled
from fastlt.run.stage import Stage
from fastlt.steps.difficulty import DifficultyStep

ROOT = Path(__file__).resolve().parents[2]

RECIPE = str(ROOT / "recipes" / "digits_lt.yaml")
KEYS = {"name", "img_s", "ratio_bare", "ratio_torchvision"}


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    """Python up to 3.11.7 fails in an `ast.parse` during which the garbage collector finalises what numba compiled."""
    yield
    gc.collect()


def run(capsys, *words: str) -> tuple[dict[str, dict], dict]:
    """The rows by name, and the settings."""
    capsys.readouterr()
    assert cli.main(["benchmark", *words, "--rounds", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert all(row.keys() == KEYS and row["img_s"] > 0 for row in printed["rows"])
    rows = {row["name"]: row for row in printed["rows"]}
    assert len(rows) == len(printed["rows"])
    return rows, printed["settings"]


def compared(rows: dict[str, dict]) -> dict[str, tuple[bool, bool]]:
    """Which rows have a ratio over the bare library, and over torchvision."""
    return {name: (row["ratio_bare"] is not None, row["ratio_torchvision"] is not None) for name, row in rows.items()}


def test_augment_stands_against_torchvision(capsys):
    rows, settings = run(capsys, "augment", "--batch", "8", "16", "--size", "16", "--policy", "svhn")
    of_batch = {"fastlt": (False, True), "torchvision, tensors": (False, False), "torchvision, PIL": (False, True)}
    assert compared(rows) == {f"batch {n}: {name}": has for n in (8, 16) for name, has in of_batch.items()}
    assert settings["policy"] == "svhn"


def test_train_stands_against_one_batch_for_ever(capsys, digits_words):
    rows, settings = run(capsys, "train", RECIPE, *digits_words, "--iterations", "3")
    assert compared(rows) == {"training loop": (True, False), "one batch for ever": (False, False)}
    assert 0 <= settings["data_wait_share"] < 1
    assert settings["loader"] == "resident"
    assert (settings["compile"], "not_compiled" in settings) == ("none", False)
    assert settings["augment_ms"] > 0
    assert 0 < settings["augment_share"] < 1


def test_trains_share_of_augmentation_is_that_of_the_batches_an_iteration_augments(capsys, digits_words, monkeypatch):
    sizes, call, measure = [], Augment.__call__, benchmark_train._Loop.augment_s
    monkeypatch.setattr(
        Augment, "__call__", lambda self, images, *args: sizes.append(len(images)) or call(self, images, *args)
    )
    monkeypatch.setattr(benchmark_train._Loop, "augment_s", lambda self, rounds: sizes.clear() or measure(self, rounds))
    for words, expected in ([], [64, 100]), (["stages.end_to_end.method=plain"], [64]):
        run(capsys, "train", RECIPE, *digits_words, *words, "--iterations", "2")
        assert sizes == 2 * 2 * expected  # two iterations in a round, and a round to warm up


def test_train_says_why_iterations_are_not_captured(capsys, digits_words):
    words = ["train", RECIPE, *digits_words, "compile=cudagraph", "--iterations", "2", "--rounds", "1"]
    assert cli.main(["benchmark", *words, "--json"]) == 0
    said = capsys.readouterr()
    assert "fastlt benchmark train: not compiled: CUDA graphs need a CUDA device" in said.err
    assert json.loads(said.out)["settings"]["not_compiled"] == "CUDA graphs need a CUDA device"
    assert cli.main(["benchmark", *words]) == 0
    assert "not_compiled CUDA graphs need a CUDA device" in capsys.readouterr().out


def test_trains_iterations_and_augmentation_are_replayed_where_they_are_captured(capsys, digits_words, monkeypatch):
    captured, replayed = [], []

    class Capture:
        """As if a graph: runs everything again."""

        def __call__(self, function):
            captured.append(self)
            result = function()

            def replay():
                replayed.append(self)
                function()

            return replay, result

    monkeypatch.setitem(compiled.CAPTURES, "cudagraph", Capture)
    monkeypatch.setattr(benchmark_augment, "CudaCapture", Capture)
    monkeypatch.setattr(compiled, "why_no_graph", lambda step, capture: None)
    _, settings = run(capsys, "train", RECIPE, *digits_words, "compile=cudagraph", "--iterations", "3")
    assert "not_compiled" not in settings
    trial, iterations, augmentation = captured
    # Both rows, and then the augmentation, are run once to warm up and once measured.
    assert [replayed.count(capture) for capture in (trial, iterations, augmentation)] == [1, 2 * 2 * 3, 2 * 3]


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch):
    monkeypatch.setattr(benchmark_augment, "CudaCapture", lambda: lambda function: (lambda: None, function()))
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    chain = build_augment(["flip"], image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, seed=0, device="cpu")
    replayed, alive = benchmark_augment.Captured([(chain, images)]), weakref.ref(chain.held.block)
    del chain
    gc.collect()
    assert alive() is not None
    del replayed
    gc.collect()
    assert alive() is None


def test_train_begins_epochs_and_sets_learning_rates_as_training_does(capsys, digits_words, monkeypatch):
    epochs, rates = [], []
    start_epoch, set_learning_rate = DifficultyStep.start_epoch, Stage.set_learning_rate
    monkeypatch.setattr(
        DifficultyStep, "start_epoch", lambda self, epoch: epochs.append(epoch) or start_epoch(self, epoch)
    )
    monkeypatch.setattr(
        Stage,
        "set_learning_rate",
        lambda self, iteration: set_learning_rate(self, iteration) or rates.append(self.step.lr),
    )
    run(capsys, "train", RECIPE, *digits_words, "--iterations", "4")
    assert sorted(set(epochs)) == [0, 1, 2]  # 16 iterations of 6 an epoch
    assert len(set(rates)) > 10  # of the stage's 12 iterations, after which the schedule starts again
    assert rates[1:5] == rates[13:17]


@needs_dali
def test_predict_stands_against_the_evaluation_loop(capsys, tmp_path):
    for i, image in enumerate(smooth_images([(50, 70), (80, 60)], seed=0)):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    words = ["--images", str(tmp_path), "--count", "6", "--batch", "4", "--size", "24", "--workers", "1"]
    rows, settings = run(capsys, "predict", *words, "--model", "cifar_resnet8", "--storage", "jpg/own", "raw/256")
    evaluation, predict = (False, False), (True, False)
    expected = {f"{storage}: evaluation loop": evaluation for storage in ("jpg/own", "raw/256")}
    assert compared(rows) == expected | {f"{storage}: predict": predict for storage in ("jpg/own", "raw/256")}
    assert settings["model"] == "cifar_resnet8"


def test_data_has_the_bare_pipelines_as_rows_of_their_own(capsys, tmp_path):
    for i, image in enumerate(smooth_images([(50, 70), (80, 60)], seed=0)):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg")
    words = ["--images", str(tmp_path), "--count", "8", "--small-count", "16", "--batch", "4", "--size", "24"]
    rows, settings = run(capsys, "data", *words, "--workers", "1", "--storage", "jpg/own")
    both, one, none = (True, True), (False, True), (False, False)
    common = {"fastlt ffcv": both, "fastlt dali": both, "fastlt resident_jpeg": both, "fastlt torch": one}
    common |= {"bare ffcv": one, "bare dali": one, "torchvision": none}
    expected = {f"jpg/own to 24 px: {name}": has for name, has in common.items()}
    expected |= {f"32 px: {name}": has for name, has in common.items()}
    assert compared(rows) == expected | {
        "jpg/own to 24 px: bare dali, its defaults": one,
        "32 px: fastlt resident": one,
    }
    assert settings["workers"] == 1


@needs_dali
def test_data_takes_the_small_images_from_cifar(capsys, real_data):
    root = real_data("cifar-10-batches-py").parent
    rows, _ = run(capsys, "data", "--cifar", str(root), "--small-count", "16", "--batch", "4", "--workers", "1")
    assert {"CIFAR-10: fastlt ffcv", "CIFAR-10: bare ffcv", "CIFAR-10: torchvision"} <= rows.keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "--rounds", "0"], "'0' is not a whole number from 1 on"),
        (["data", "--batch", "-4"], "--batch"),
        (["data", "--device", "cudaa"], "'cudaa' is no device of this machine"),
        (["augment", "--batch", "0"], "'0' is not a whole number from 1 on"),
        (["augment", "--policy", "svhnn"], "svhnn"),
        (["train", "--iterations", "0"], "'0' is not a whole number from 1 on"),
    ],
)
def test_words_that_make_no_sense_are_one_message_and_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["benchmark", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "--images", "/nowhere"], "/nowhere has no file that ends in .jpg or .jpeg"),
        (["data", "--cifar", "/nowhere"], "cifar10 is not under /nowhere"),
        (["train", RECIPE, "data.loader=fcv"], "did you mean 'ffcv'"),
        (["train", RECIPE, "--stage", "second"], "has no stage 'second'"),
    ],
)
def test_data_and_recipes_that_are_not_there_are_one_message_and_code_2(capsys, words, message):
    assert cli.main(["benchmark", *words]) == 2
    assert message in capsys.readouterr().err
