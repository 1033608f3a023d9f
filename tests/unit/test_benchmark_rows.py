"""tools/benchmark.py's `data`, `augment` and `train`: the rows that --json prints, and what is refused."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_betons import needs_dali, smooth_images

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import benchmark  # noqa: E402

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
    assert benchmark.main([*words, "--rounds", "1", "--json"]) == 0
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


@needs_dali
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
        (["data", "--rounds", "0"], "'0' is not a whole number of at least 1"),
        (["data", "--batch", "-4"], "--batch"),
        (["data", "--device", "cudaa"], "'cudaa' is no device of this machine"),
        (["augment", "--batch", "0"], "'0' is not a whole number of at least 1"),
        (["augment", "--policy", "svhnn"], "svhnn"),
        (["train", "--iterations", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_words_that_make_no_sense_are_one_message_and_code_2(capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(words)
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
    assert benchmark.main(words) == 2
    assert message in capsys.readouterr().err
