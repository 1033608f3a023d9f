"""docs/own_data.md: its commands run, on small images made here and on real ones where they are."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (fastlt .*)$", PAGE, flags=re.MULTILINE)
RECIPE = re.search(r"^    # mine\.yaml\n((?:    .*\n)+)", PAGE, flags=re.MULTILINE)
FIRST = next(command for command in COMMANDS if "--split" in command)
PER_CLASS = {"ant": 30, "bee": 14, "crow": 8, "dog": 2}
COMMON = ("ant", "bee")  # where ten images of each class are held out, the others have too few
# What makes a training of the page short.
SHORT = [
    *("stages.end_to_end.epochs=1", "stages.end_to_end.batch_size=16", "stages.end_to_end.meta_batch_size=4"),
    *(
        "stages.end_to_end.evaluate_every=1",
        "precision=fp32",
        "num_threads=1",
        "data.augment=[flip]",
        "data.loader=torch",
    ),
    *("data.num_workers=0", "stages.end_to_end.accuracy.batch_size=16", "model.name=resnet10"),
]


def run(command: str, *more: str) -> None:
    assert cli.main([*shlex.split(command)[1:], *more]) == 0, command


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[tuple[str, str, bytes]]:
    """(path, class, JPEG file) of each image."""
    rng = np.random.default_rng(0)
    found = []
    for name, count in PER_CLASS.items():
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
            found.append((f"{name}/{i:02d}.jpg", name, file.getvalue()))
    return found


@pytest.fixture
def here(tmp_path, monkeypatch, photos) -> Path:
    """A folder with all that the commands of the page name."""
    monkeypatch.chdir(tmp_path)
    for path, name, data in photos:
        places = [Path("photos") / path]
        if name in COMMON:
            places.append(Path("folders") / ("test" if path[-5] == "1" else "train") / path)
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    write_lists(photos)
    write_shards(photos)
    return tmp_path


def write_lists(photos: list[tuple[str, str, bytes]]) -> None:
    classes = list(PER_CLASS)
    rows = [(path, name, i, path[-5] == "1") for i, (path, name, _) in enumerate(photos) if name in COMMON]
    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((path, name) for path, name, _, _ in rows)])
    for split, other, test in (("train", "train", False), ("test", "val", True)):
        part = [row for row in rows if row[3] == test]
        Path(f"{split}.txt").write_text("".join(f"{path} {classes.index(name)}\n" for path, name, _, _ in part))
        content = {
            "images": [{"id": i, "file_name": path} for path, _, i, _ in part],
            "annotations": [{"id": i, "image_id": i, "category_id": classes.index(name)} for _, name, i, _ in part],
            "categories": [{"id": c, "name": name} for c, name in enumerate(classes)],
        }
        Path(f"{other}.json").write_text(json.dumps(content))


def write_shards(photos: list[tuple[str, str, bytes]]) -> None:
    Path("shards").mkdir()
    with tarfile.open("shards/000.tar", "w") as tar:
        for i, (_, name, image) in enumerate(photos):
            for ending, data in (("jpg", image), ("cls", name.encode())):
                member = tarfile.TarInfo(f"{i:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def save_dataset(photos: list[tuple[str, str, bytes]]) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(PER_CLASS))})
    rows = {
        "image": [{"bytes": data, "path": None} for _, _, data in photos],
        "label": [list(PER_CLASS).index(name) for _, name, _ in photos],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk("saved")


OTHERS = [command for command in COMMANDS if command.startswith("fastlt convert") and command != FIRST]


def test_from_the_folder_to_a_training(here, capsys):
    run(FIRST, "--quiet")
    said = capsys.readouterr().out
    assert "4 classes of 24 to 2 training images: ant 24, bee 12, crow 6, dog 2" in said
    assert "warning: the test split has no image of 1 of 4 classes: dog" in said
    assert RECIPE is not None
    Path("mine.yaml").write_text(re.sub("^    ", "", RECIPE.group(1), flags=re.MULTILINE))
    done = ("fastlt convert", "fastlt inspect", "fastlt benchmark")  # the last one needs weights, and has its own test
    after = [command for command in COMMANDS if not command.startswith(done)]
    assert [command.split()[1] for command in after] == ["verify", "check", "train", "report"]
    run(after[0])
    run(after[1])
    run(after[2], *SHORT)
    run(after[3])
    assert "Most confused pairs" in (here / "report.html").read_text()
    result = json.loads((here / "runs" / "mine" / "result.json").read_text())
    assert result["classes_evaluated"]["all"] == 3
    assert result["class_names"] == list(PER_CLASS)
    said = capsys.readouterr().out
    assert "warning: the meta split has no image of 1 of 4 classes: dog; their accuracy counts as the mean" in said


def test_looking_at_them(here, capsys):
    to_picture, to_json = (command for command in COMMANDS if command.startswith("fastlt inspect"))
    run(to_picture, "--quiet")
    assert "4 classes, 24 to 2 training images, imbalance factor 12" in capsys.readouterr().out
    assert (here / "classes.png").stat().st_size
    assert cli.main(["check", "suggested.yaml"]) == 0
    capsys.readouterr()
    run(to_json, "--quiet")
    assert json.loads(capsys.readouterr().out)["source"] == "table"


@pytest.mark.parametrize("command", OTHERS, ids=lambda command: command.split()[2])
def test_the_other_forms_of_data(here, photos, command):
    if "hf_dataset" in command:
        save_dataset(photos)
    run(command, "--quiet")
    assert (here / command.split()[-1] / "manifest.json").is_file()


def test_the_first_command_on_real_images(real_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(real_data("tiny100_lt") / "images" / "train")
    assert cli.main([*shlex.split(FIRST)[1:], "--quiet"]) == 2
    assert "1 files of equal contents are in both the train split and the test split" in capsys.readouterr().err
    run(FIRST, "--quiet", "--allow-duplicates")
    said = capsys.readouterr().out
    assert "100 classes of " in said
    splits = json.loads((tmp_path / "data" / "photos" / "manifest.json").read_text())["splits"]
    assert sum(split["count"] for split in splits.values()) == 20_183
    assert max(splits["meta"]["class_counts"]) == 10
    assert "warning" not in said or 0 in splits["test"]["class_counts"] + splits["meta"]["class_counts"]
