"""`--class-names`: a file with names for classes that folders and lists call otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt import cli
from fastlt.recipe import RecipeError, load_recipe
from loaders.sources import open_source
from loaders.sources.classes import named_classes

IDS = ("n01", "n02", "n10")
NAMES = ("German shepherd, alsatian", "cockroach", "crane")
FORMS = {
    "tabs, further classes, another order": "n10\tcrane\nn99\tyak\nn01\tGerman shepherd, alsatian\nn02\tcockroach\n",
    "spaces": "n01 German shepherd, alsatian\nn02  cockroach\n\nn10 crane\n",
    "commas": "n01,German shepherd, alsatian\nn02,cockroach\nn10, crane\n",
    "names alone": "German shepherd, alsatian\ncockroach\ncrane\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_the_file(form, tmp_path):
    (tmp_path / "names.txt").write_text(FORMS[form])
    assert named_classes(tmp_path / "names.txt", IDS) == NAMES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01\tdog\nn02\tcockroach\nn03\tcrane\n", r"has 3 lines, and no name for 1 of 3 classes: n10\. Give lines"),
        ("dog\ncockroach\n", "has 2 lines, and no name for 3 of 3 classes: n01, n02, n10"),
        ("n01\tcrane\nn02\tcockroach\nn10\tcrane\n", "gives several classes one name: crane"),
        ("", "has 0 lines"),
    ],
)
def test_files_that_do_not_name_each_class_are_refused(text, message, tmp_path):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        named_classes(tmp_path / "names.txt", IDS)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name in IDS:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "names.txt").write_text(FORMS["spaces"])
    return tmp_path


def test_a_conversion_and_a_recipe_have_the_names(photos, capsys):
    words = ["image_folder", "--root", "photos", "--split", "0.5/0.25/0.25", "--class-names", "names.txt"]
    assert cli.main(["convert", *words, "--out", "data/mine", "--quiet"]) == 0
    assert "crane 4" in capsys.readouterr().out
    manifest = json.loads(Path("data/mine/manifest.json").read_text())
    assert (tuple(manifest["class_names"]), manifest["request"]["class_names"]) == (NAMES, "names.txt")
    assert cli.main(["convert", *words, "--out", "data/mine", "--quiet"]) == 0
    assert "already holds this data set" in capsys.readouterr().out
    assert cli.main(["convert", *words[:-2], "--out", "data/mine", "--quiet"]) == 2
    assert "class_names is 'names.txt', not None" in capsys.readouterr().err

    inspect = ["photos", *words[3:], "--quiet"]
    assert cli.main(["inspect", *inspect, "--recipe", "mine.yaml"]) == 0
    assert load_recipe("mine.yaml").data.class_names == "names.txt"
    assert "--class-names names.txt" in capsys.readouterr().out
    assert cli.main(["inspect", "data/mine", "--quiet", "--recipe", "other.yaml"]) == 0
    assert load_recipe("other.yaml").data.class_names is None


def test_a_recipe_without_conversion_has_them_too(photos):
    data = {"root": "photos", "class_names": "names.txt", "split": (0.5, 0.25, 0.25)}
    assert open_source("image_folder", **data).class_names == NAMES


def test_where_they_have_no_place_they_are_refused(photos, capsys):
    with pytest.raises(RecipeError, match=r"data\.class_names: is set, but data\.source is 'digits'"):
        load_recipe("digits_lt", ["data.class_names=names.txt"])
    with pytest.raises(SystemExit):
        cli.main(["convert", "digits", "--out", "data/digits", "--class-names", "names.txt"])
    assert "--class-names is for " in capsys.readouterr().err
    assert cli.main(["convert", "image_folder", "--root", "photos", "--out", "d", "--class-names", "no.txt"]) == 2
    assert "no.txt does not exist: give lines of `class name`" in capsys.readouterr().err
