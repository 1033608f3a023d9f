"""`fastlt inspect`: what it finds in a data set, how it prints that, and the recipe that it writes."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlt import cli
from fastlt.inspection import profile as measuring
from fastlt.inspection import suggestion as suggesting
from fastlt.inspection.loading import measure_loading
from fastlt.inspection.profile import Copies, Decoding, Profile, SplitProfile, profile_source
from fastlt.inspection.recognition import recognise
from fastlt.inspection.suggestion import suggest
from fastlt.inspection.text import BARS, to_text
from fastlt.recipe import load_recipe
from loaders.sources import open_source
from loaders.sources.decode import decode_bytes, header_size

PER_CLASS = {"ant": 40, "bee": 12, "cow": 4}


def picture(rng: np.random.Generator, width: int = 48, height: int = 32, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """CLASS/IMAGE below the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, count in PER_CLASS.items():
        folder = Path("photos") / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i:02d}.jpg").write_bytes(picture(rng))
    return Path("photos")


def inspect(*words: str) -> int:
    return cli.main(["inspect", *words, "--quiet"])


def refused(*words: str) -> object:
    """The exit code, also of a usage error."""
    try:
        return inspect(*words)
    except SystemExit as error:
        return error.code


def inspected(capsys, *words: str) -> dict:
    capsys.readouterr()
    assert inspect(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def write_tar(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "train-000.tar", "w") as tar:
        for ending, data in (("jpg", picture(np.random.default_rng(0))), ("cls", b"0")):
            member = tarfile.TarInfo(f"a.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_every_form_is_recognised(photos):
    Path("list.txt").write_text("ant/00.jpg 0\nbee/00.jpg 1\n")
    Path("labels.csv").write_text("path,label\nant/00.jpg,ant\n")
    Path("semicolons.txt").write_text("file;species\nant/00.jpg;ant\n")
    Path("coco.json").write_text('\n {"images": []}')
    Path("rows.parquet").write_bytes(b"PAR1....")
    write_tar(Path("shards"))
    for folder, name in (("hf", "dataset_dict.json"), ("one", "state.json"), ("made", "manifest.json")):
        Path(folder).mkdir()
        (Path(folder) / name).write_text("{}")
    Path("cifar/cifar-100-python").mkdir(parents=True)
    found = {
        "photos": "image_folder",
        "list.txt": "list_file",
        "labels.csv": "table",
        "semicolons.txt": "table",
        "coco.json": "coco",
        "rows.parquet": "table",
        "shards": "webdataset",
        "hf": "hf_dataset",
        "one": "hf_dataset",
        "made": "converted",
        "cifar": "cifar100",
        "digits": "digits",
    }
    assert {name: recognise(Path(name)).source for name in found} == found
    assert recognise(photos, train_list=Path("labels.csv")).source == "table"
    assert recognise(Path("list.txt"), root=photos).root == photos


def test_what_is_none_of_them_is_one_sentence(photos, capsys):
    write_tar(Path("shards"))
    for words, said in (
        (["nowhere"], "does not exist"),
        (["shards/train-000.tar"], "give the folder that holds the tar files"),
        (["photos/ant/00.jpg"], "neither a list of images nor a folder"),
        (["photos", "--root", "photos"], "leave --root out"),
        (["photos", "--backbone", "resnet5o"], "is no network of timm"),
        (["photos", "--recipe", "nowhere/mine.yaml"], "lies in no folder that exists"),
    ):
        assert refused(*words) == 2
        assert said in capsys.readouterr().err, words


def test_what_is_measured(photos, capsys):
    rng = np.random.default_rng(1)
    (photos / "ant" / "large.png").write_bytes(picture(rng, 300, 150, "PNG"))
    (photos / "bee" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    (photos / "cow" / "same.jpg").write_bytes((photos / "bee" / "00.jpg").read_bytes())
    os.link(photos / "ant" / "01.jpg", photos / "ant" / "linked.jpg")
    found = inspected(capsys, "photos", "--split", "0.9/0.05/0.05")
    assert found["source"] == "image_folder"
    counts = np.sum([split["class_counts"] for split in found["splits"].values()], axis=0)
    assert counts.tolist() == [42, 13, 5]
    assert found["sizes"]["width"] == {"min": 48, "median": 48, "max": 300}
    assert found["sizes"]["aspect"]["max"] == 2.0
    assert [one["image"] for one in found["unreadable"]] == ["photos/bee/broken.jpg"]
    groups = found["duplicates"]["groups"]
    assert groups["two_labels"] + groups["two_splits"] + groups["one_label"] == 2
    named = [{Path(name).name for name in one["images"]} for one in found["duplicates"]["named"]]
    assert {"00.jpg", "same.jpg"} in named
    assert {"01.jpg", "linked.jpg"} in named
    files = {path.stat().st_ino: path.stat().st_size for path in photos.rglob("*") if path.is_file()}
    assert found["disk_bytes"] == sum(files.values())
    train = sum(found["splits"]["train"]["class_counts"])
    assert found["loading"]["needed_bytes"]["resident"]["train"] > 0
    decoding = found["decoding"]
    seconds = train / decoding["images_per_s_per_core"] / found["loading"]["cores"]
    assert found["loading"]["decoding_train_s"] == pytest.approx(seconds)


def test_a_file_is_read_once_and_hashed_only_where_it_may_be_a_copy(photos, monkeypatch):
    for i in range(20):
        os.link(photos / "cow" / "00.jpg", photos / "cow" / f"link{i}.jpg")
    twin = photos / "cow" / "twin.jpg"
    twin.write_bytes((photos / "cow" / "00.jpg").read_bytes())
    headers, hashes = [], []
    header, hashed = measuring._header, measuring._hash
    monkeypatch.setattr(measuring, "_header", lambda path: (headers.append(path), header(path))[1])
    monkeypatch.setattr(measuring, "_hash", lambda path: (hashes.append(path), hashed(path))[1])
    source = open_source("image_folder", root=photos, split=(0.5, 0.2, 0.3), allow_duplicates=True)
    found = profile_source(source, "photos", progress=False)
    paths = [source.splits[s].name(i) for s in source.splits for i in range(len(source.splits[s]))]
    inodes = {os.stat(path).st_ino for path in paths}
    assert len(headers) == len(inodes) < len(paths)
    sizes = {os.stat(path).st_ino: os.stat(path).st_size for path in paths}
    several = [size for size in sizes.values() if list(sizes.values()).count(size) > 1]
    assert len(hashes) == len(several) < len(headers)
    assert sum(found.copies.images.values()) == 22


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_by_the_header_is_that_of_the_decoded_image(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(np.random.default_rng(0), 30, 20, kind, exif=exif)
    assert header_size(io.BytesIO(data)) == decode_bytes(data).shape[:2]


def made_up(counts: list[int], side: int = 32, meta: int = 10) -> Profile:
    """A profile of square images with so many training images a class."""
    classes = len(counts)

    def split(labels: np.ndarray) -> SplitProfile:
        return SplitProfile(labels, np.full((len(labels), 2), side), np.full(len(labels), 999), "made up")

    train = np.repeat(np.arange(classes), counts)
    held = np.repeat(np.arange(classes), meta)
    decoding = Decoding(10, 0.5, "nothing", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    names = tuple(f"a class with the long name {c}" for c in range(classes))
    return Profile(
        "image_folder",
        "here",
        False,
        names,
        {"train": split(train), "meta": split(held), "test": split(held)},
        [],
        Copies({"two_splits": 0, "two_labels": 0, "one_label": 0}),
        999 * len(train),
        decoding,
    )


DATA = {"source": "image_folder", "root": ".", "converted": "data/here"}


@pytest.mark.parametrize("classes", [3, 8142])
def test_narrow_ascii_consoles_are_served(classes):
    profile = made_up(np.linspace(1, 60, classes).astype(int).tolist(), meta=1)
    suggestion = suggest(profile, DATA)
    narrow = to_text(
        profile, measure_loading(profile, suggestion.data, torch.device("cpu")), suggestion, width=40, encoding="ascii"
    )
    narrow.encode("ascii")
    assert max(map(len, narrow.splitlines())) <= 40
    wide = to_text(profile, None, suggestion, width=100, encoding="utf-8")
    bars = [line for line in wide.splitlines() if "█" in line]
    assert len(bars) == min(classes, BARS)
    lengths = [line.count("█") for line in bars]
    assert lengths == sorted(lengths, reverse=True)
    assert ("rank 1-408" in wide) == (classes == 8142)


def test_the_method_follows_the_imbalance():
    stages = {
        counts: suggest(made_up(list(counts)), DATA).stage for counts in ((99, 90, 80), (90, 50, 20), (900, 50, 5))
    }
    assert [(of["method"], of["loss"]) for of in stages.values()] == [
        ("plain", "cross_entropy"),
        ("plain", "balanced_softmax"),
        ("difficulty", "balanced_softmax"),
    ]
    without_meta = made_up([900, 50, 5])
    only = without_meta.splits["meta"]
    meta = SplitProfile(only.labels[:5], only.sizes[:5], only.file_bytes[:5], "made up")
    object.__setattr__(without_meta, "splits", {**without_meta.splits, "meta": meta})
    found = suggest(without_meta, DATA)
    assert found.stage["method"] == "plain"
    assert "2 of 3 classes have no validation image" in " ".join(found.reasons)


def test_the_network_follows_sizes_and_number():
    small = suggest(made_up([60, 9, 3]), DATA)
    assert small.model == {"name": "cifar_resnet32"}
    assert (small.data["image_size"], small.data["train_crop"], small.data["mean"]) == (32, "none", [0.5, 0.4, 0.3])
    few, many = suggest(made_up([60, 9, 3], 300), DATA), suggest(made_up([6000, 9, 3], 300), DATA)
    assert few.model == {"name": "resnet18", "pretrained": True}
    assert many.model == {"name": "resnet50", "pretrained": True}
    assert many.data["mean"] == many.data["std"] == many.data["eval_ratio"] == "model"
    assert many.interpolation == "bicubic"
    assert few.stage["batch_size"] <= 72 < many.stage["batch_size"]
    asked = suggest(made_up([60, 9, 3]), DATA, "vit_tiny_patch16_224")
    assert asked.model == {"name": "vit_tiny_patch16_224", "pretrained": True}
    assert asked.data["image_size"] == 224


def test_weights_that_cannot_be_had_are_said(tmp_path, monkeypatch):
    def refuse(name: str) -> dict:
        raise ValueError(name)

    monkeypatch.setattr(suggesting, "check_reachable", refuse)
    suggesting.write_recipe(tmp_path / "mine.yaml", made_up([60, 9, 3], 300), DATA, None)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.model.name, recipe.model.pretrained) == ("resnet18", False)
    assert "cannot be fetched" in " ".join((tmp_path / "mine.yaml").read_text().replace("\n# ", " ").split())


def test_a_recipe_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"mine.yaml cannot be written: No space left"):
        suggesting.write_recipe(tmp_path / "mine.yaml", made_up([60, 9, 3], 300), DATA, "cifar_resnet8")
    assert not list(tmp_path.iterdir())


def test_the_recipe_can_be_trained_and_is_never_overwritten(photos, capsys):
    (photos / "cow" / "same.jpg").write_bytes((photos / "bee" / "00.jpg").read_bytes())
    assert inspect("photos", "--split", "0.5/0.2/0.3", "--recipe", "mine.yaml", "--picture", "classes.svg") == 0
    told = capsys.readouterr()
    assert "difficulty" not in told.err
    assert "--recipe" not in told.out
    text = Path("mine.yaml").read_text()
    assert Path("classes.svg").read_text().count("<svg") == 1
    assert cli.main(["check", "mine.yaml"]) == 0
    command = next(line for line in text.splitlines() if "fastlt convert" in line).removeprefix("#")
    assert "--allow-duplicates" in command
    assert told.out.splitlines()[-2:] == [f"  {command.strip()}", "  fastlt train mine.yaml"]
    assert cli.main([*shlex.split(command)[1:], "--quiet"]) == 0
    recipe = load_recipe("mine.yaml")
    assert (recipe.data.num_classes, recipe.data.converted) == (3, "data/photos")

    assert inspect("photos", "--recipe", "mine.yaml") == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == text

    of_files = inspected(capsys, "photos", "--split", "0.5/0.2/0.3")
    converted = inspected(capsys, "data/photos", "--recipe", "other.yaml", "--picture", "classes.png")
    assert Path("classes.png").read_bytes().startswith(b"\x89PNG")
    for split, found in of_files["splits"].items():
        assert converted["splits"][split]["class_counts"] == found["class_counts"]
    assert converted["duplicates"]["groups"] == of_files["duplicates"]["groups"]
    assert converted["sizes"] == of_files["sizes"]
    assert cli.main(["check", "other.yaml"]) == 0
    assert load_recipe("other.yaml").data.split == (0.5, 0.2, 0.3)


def test_a_table_with_columns_of_its_own(photos, capsys):
    with open("mine.csv", "w", newline="") as file:
        rows = [(f"{name}/{i:02d}.jpg", name) for name, count in PER_CLASS.items() for i in range(count)]
        csv.writer(file).writerows([("where", "species"), *rows])
    words = ["mine.csv", "--root", "photos", "--image-column", "where", "--meta-per-class", "2"]
    assert inspect(*words, "--recipe", "mine.yaml") == 0
    data = load_recipe("mine.yaml").data
    assert (data.source, data.train_list, data.root, data.image_column) == ("table", "mine.csv", "photos", "where")
    assert data.meta_per_class == 2
