"""docs/streaming.md: its conversion makes shuffled shards, and its recipe trains on them from a URL."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt import cli
from fastlt.run.preflight import is_sorted
from loaders.stored.dataset import ConvertedDataset

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")
COMMAND = re.search(r"^    (fastlt convert .*)$", PAGE, flags=re.MULTILINE)
RECIPE = re.search(r"^    # streamed\.yaml\n((?:    .*\n)+)", PAGE, flags=re.MULTILINE)
URL, CACHE = "https://server/shards", "/scratch/shards"
# What makes a training of the page short.
SHORT = [
    *("stages.end_to_end.epochs=2", "stages.end_to_end.batch_size=16", "stages.end_to_end.meta_batch_size=4"),
    *("precision=fp32", "num_threads=1", "data.augment=[flip]", "data.loader=torch", "data.num_workers=0"),
    *("stages.end_to_end.accuracy.batch_size=16", "model.name=resnet10", "data.image_size=32", "data.eval_crop=none"),
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with the images that the page names: of three classes 25, 15 and 5 to train on, and held-out ones."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name, count in (("ant", 40), ("bee", 30), ("crow", 20)):
        for i in range(count):
            path = Path("photos", "test" if i < 5 else "train", name, f"{i}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path


def convert(*more: str) -> np.ndarray:
    assert COMMAND is not None
    assert cli.main([*shlex.split(COMMAND[1])[1:], "--quiet", *more]) == 0
    return ConvertedDataset.open("shards").labels("train")


def test_from_the_images_to_a_training_from_a_url(here, capsys):
    labels = convert("--shard-images", "10")
    assert not is_sorted(labels)
    assert np.bincount(labels).tolist() == [25, 15, 5]
    assert len(list(Path("shards/dali").glob("train-*.tar"))) == 5
    assert RECIPE is not None
    text = re.sub("^    ", "", RECIPE[1], flags=re.MULTILINE)
    assert URL in text
    assert CACHE in text
    Path("streamed.yaml").write_text(text.replace(URL, f"file://{here}/shards").replace(CACHE, "cache"))
    assert cli.main(["train", "streamed.yaml", *SHORT]) == 0
    assert "stored class by class" not in capsys.readouterr().out
    assert json.loads(Path("runs/streamed/result.json").read_text())["classes_evaluated"]["all"] == 3
    assert len(list(Path("cache").glob("*/dali/train-*.tar"))) == 5


def test_a_run_says_that_shards_are_sorted_by_class(here, capsys):
    assert COMMAND is not None
    words = [word for word in shlex.split(COMMAND[1])[1:] if word != "--shuffle"]
    assert cli.main([*words, "--quiet"]) == 0
    assert is_sorted(ConvertedDataset.open("shards").labels("train"))
    assert RECIPE is not None
    text = re.sub("^    ", "", RECIPE[1], flags=re.MULTILINE)
    Path("streamed.yaml").write_text(text.replace(URL, f"file://{here}/shards").replace(CACHE, "cache"))
    assert cli.main(["train", "streamed.yaml", *SHORT, "stages.end_to_end.epochs=1"]) == 0
    assert "are stored class by class, so shards have few classes" in capsys.readouterr().out


def test_shuffled_and_unshuffled_are_two_conversions(here, capsys):
    convert()
    capsys.readouterr()
    assert COMMAND is not None
    words = [word for word in shlex.split(COMMAND[1])[1:] if word != "--shuffle"]
    assert cli.main([*words, "--quiet"]) == 2
    assert "shards holds another data set: shuffle is True, not None" in capsys.readouterr().err


def test_a_size_of_shards_is_for_shards(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", "digits", "--out", "x", "--shard-images", "10"])
    assert "--shard-images is for shards: add --format dali or both" in capsys.readouterr().err
