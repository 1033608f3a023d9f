"""Which images train, validate and test: drawn shares, what serves as what, and classes that a split lacks."""

from __future__ import annotations

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt import cli
from loaders.sources import Source, open_source
from loaders.sources.cut import drawn_counts
from loaders.sources.source import absent_classes
from loaders.stored.dataset import ConvertedDataset

CLASSES = {"ant": 40, "bee": 20, "cow": 9, "dog": 4, "eel": 1}


def images(folder: Path, classes: dict[str, int]) -> Path:
    """Images that differ, as many of each class as `classes` says."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = (hash_of(folder.name), hash_of(name), i)
            Image.new("RGB", (3, 2), colour).save(folder / name / f"{i:02d}.png")
    return folder


def hash_of(name: str) -> int:
    return sum(map(ord, name)) % 256


def opened(root: Path, **options) -> Source:
    return open_source("image_folder", root=root, **options)


def counts(source: Source) -> dict[str, list[int]]:
    return {
        name: np.bincount(split.labels, minlength=source.num_classes).tolist() for name, split in source.splits.items()
    }


@pytest.fixture
def flat(tmp_path) -> Path:
    return images(tmp_path / "flat", CLASSES)


# --- drawn shares


@pytest.mark.parametrize("shares", [{"test": 0.1, "meta": 0.1}, {"test": 0.25}, {"meta": 0.3, "test": 0.6}])
@pytest.mark.parametrize("most", [3, 1000])
def test_drawn_counts_are_rounded_shares_that_leave_an_image(shares, most):
    for count in range(1, 200):
        drawn = drawn_counts(count, shares, most)
        room = count - 1
        for name, share in shares.items():
            exact = Fraction(share).limit_denominator(1000) * count
            rounded = int(exact + Fraction(1, 2))
            expected = min(rounded, room, most) if name == "meta" else min(rounded, room)
            assert drawn[name] == expected, (count, name)
            room -= expected
        assert count - sum(drawn.values()) >= 1


def test_a_flat_folder_is_cut_by_shares_of_each_class(flat):
    source = opened(flat, split=(0.8, 0.1, 0.1))
    assert source.class_names == tuple(CLASSES)
    assert counts(source) == {"train": [32, 16, 7, 4, 1], "meta": [4, 2, 1, 0, 0], "test": [4, 2, 1, 0, 0]}
    paths = [path for split in source.splits.values() for path in split.paths]
    assert len(set(paths)) == len(paths) == sum(CLASSES.values())
    assert counts(opened(flat, split=(0.5, 0.25, 0.25), meta_per_class=3))["meta"] == [3, 3, 2, 1, 0]
    assert absent_classes(source.class_names, counts(source)) == (
        "warning: the meta split has no image of 2 of 5 classes: dog, eel; their accuracy counts as the mean of the "
        "other classes, for methods that go by it",
        "warning: the test split has no image of 2 of 5 classes: dog, eel; metrics are over the other classes",
    )


def test_without_a_word_a_flat_folder_is_cut_all_the_same_and_it_is_said(flat):
    source = opened(flat)
    assert source.listing_sha256() == opened(flat, split=(0.8, 0.1, 0.1)).listing_sha256()
    assert source.notes == (
        f"{flat} has no test set: 10% of each class are drawn as the test set, and 10%, at most 10 images, as the meta "
        "set (validation); --split sets other shares",
    )


def test_the_seed_and_the_names_decide_what_is_drawn(flat, tmp_path):
    first = opened(flat, split=(0.8, 0.1, 0.1))
    flat.rename(tmp_path / "moved")
    again = opened(tmp_path / "moved", split=(0.8, 0.1, 0.1))
    assert again.listing_sha256() == first.listing_sha256()
    other = opened(tmp_path / "moved", split=(0.8, 0.1, 0.1), split_seed=1)
    assert other.splits["test"].paths != first.splits["test"].paths
    # Of a data set that grows most images keep their split, and of other classes all.
    images(tmp_path / "more", {"bee": 20})
    for path in sorted((tmp_path / "more" / "bee").iterdir()):
        path.rename(tmp_path / "moved" / "bee" / f"new {path.name}")
    grown = opened(tmp_path / "moved", split=(0.8, 0.1, 0.1))
    before, after = (set(source.splits["train"].paths) for source in (first, grown))
    assert {path for path in before - after if not path.startswith("bee/")} == set()
    assert len(before - after) <= 4


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((0.8, 0.1, 0.2), r"split is 0.8/0.1/0.2: it must be the shares"),
        ((0.0, 0.5, 0.5), "train has more than 0"),
        ((1.2, -0.1, -0.1), "it must be the shares"),
        ((0.9, 0.1, 0.0), "has no test set: give the last share more than 0"),
    ],
)
def test_shares_that_are_none_are_refused(flat, split, message):
    with pytest.raises(ValueError, match=message):
        opened(flat, split=split)


def test_classes_too_small_for_any_share_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no image \(0.1 of each class .*drawn with seed 0\); its classes are"):
        opened(images(tmp_path, {"a": 4, "b": 3}))


# --- any subset of train, val and test


def test_each_subset_of_the_folders(tmp_path):
    images(tmp_path / "train", {"ant": 30, "bee": 20})
    alone = opened(tmp_path)
    assert counts(alone) == {"train": [24, 16], "meta": [3, 2], "test": [3, 2]}
    assert f"{tmp_path / 'train'} has no test set: 10% of each class" in alone.notes[0]

    images(tmp_path / "val", {"ant": 12, "bee": 2})
    with_val = opened(tmp_path)
    assert counts(with_val) == {"train": [20, 10], "meta": [10, 10], "test": [12, 2]}
    assert with_val.notes == (
        f"{tmp_path / 'val'} is the test set, there is no other; the meta set (validation) is held out of "
        f"{tmp_path / 'train'}",
    )
    assert counts(opened(tmp_path, split=(0.9, 0, 0.1))) == {"train": [27, 18], "meta": [10, 2], "test": [3, 2]}
    with pytest.raises(ValueError, match=r"split is 0.8/0.1/0.1, but .*val is the meta set \(validation\): give 0"):
        opened(tmp_path, split=(0.8, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"no test set: give the last share more than 0; .*val serves as one when"):
        opened(tmp_path, split=(1, 0, 0))

    images(tmp_path / "test", {"bee": 3})
    whole = opened(tmp_path)
    assert counts(whole) == {"train": [30, 20], "meta": [10, 2], "test": [0, 3]}
    assert whole.notes == ()
    shutil.rmtree(tmp_path / "val")
    assert counts(opened(tmp_path)) == {"train": [20, 10], "meta": [10, 10], "test": [0, 3]}
    assert counts(opened(tmp_path, split=(0.9, 0.1, 0))) == {"train": [27, 18], "meta": [3, 2], "test": [0, 3]}
    with pytest.raises(ValueError, match="test is the test set: give 0 for it, or leave split out"):
        opened(tmp_path, split=(0.8, 0.1, 0.1))


def test_a_rare_class_is_named_when_nothing_is_left_of_it(tmp_path):
    images(tmp_path / "train", {"ant": 30, "bee": 4})
    images(tmp_path / "test", {"ant": 3})
    with pytest.raises(
        ValueError, match=r"\(class bee has 4\): hold out fewer .* or a share of each class \(--split 0"
    ):
        opened(tmp_path)
    assert counts(opened(tmp_path, split=(0.75, 0.25, 0)))["meta"] == [8, 1]


def test_what_is_no_flat_folder_is_refused_with_the_way_out(tmp_path):
    images(tmp_path / "up" / "pictures", {"a": 6, "b": 6})
    with pytest.raises(ValueError, match=r"images in one folder only, 'pictures', .*: give .*/up/pictures as root"):
        opened(tmp_path / "up")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tar").touch()
    with pytest.raises(ValueError, match=r"holds no images in folders: .*; it holds 1 directly in other"):
        opened(tmp_path / "other")
    (tmp_path / "up" / "pictures" / "notes").mkdir()
    (tmp_path / "up" / "pictures" / "notes" / "readme.txt").touch()
    assert "not read are 1 folders without images (notes); 1 files" in opened(tmp_path / "up" / "pictures").notes[0]


# --- through the command line


def test_the_command_says_the_classes_and_the_same_command_makes_the_same_split(flat, tmp_path, capsys):
    words = ["convert", "image_folder", "--root", str(flat), "--split", "0.8/0.1/0.1", "--split-seed", "3", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    out = capsys.readouterr().out
    assert "5 classes of 32 to 1 training images: ant 32, bee 16, cow 7, dog 4, eel 1" in out
    assert "warning: the test split has no image of 2 of 5 classes: dog, eel; metrics are over the other" in out
    assert "meta: 7 images of 3x2" in out
    assert "0.1 of each class (at most 10) of" in out
    assert cli.main([*words, "--out", str(tmp_path / "two")]) == 0
    one, two = (ConvertedDataset.open(tmp_path / name) for name in ("one", "two"))
    assert one.manifest["contents"] == two.manifest["contents"]
    assert one.manifest["request"]["split"] == [0.8, 0.1, 0.1]
    assert one.manifest["request"]["split_seed"] == 3
    assert (tmp_path / "one" / "images.tsv").read_bytes() == (tmp_path / "two" / "images.tsv").read_bytes()
    capsys.readouterr()
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    assert "nothing to do" in capsys.readouterr().out
    words[words.index("3")] = "4"
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 2
    assert "split_seed is 3, not 4" in capsys.readouterr().err


def test_damaged_images_are_left_out_before_the_shares_are_drawn(flat, tmp_path):
    for i in range(20):
        (flat / "ant" / f"{i:02d}.png").write_bytes(b"damaged")
    words = ["convert", "image_folder", "--root", str(flat), "--split", "0.8/0.1/0.1", "--on-error", "skip", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    made = ConvertedDataset.open(tmp_path / "out")
    assert [made.manifest["splits"][name]["class_counts"][0] for name in ("train", "meta", "test")] == [16, 2, 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("0.8", "argument --split: '0.8' is not the shares of train, validation and test, such as 0.8/0.1/0.1"),
        ("0.8/0.1/x", "is not the shares of"),
        ("80/10/10", "split is 80/10/10: it must be the shares of train, validation and test, such as 0.8/0.1/0.1"),
    ],
)
def test_words_that_are_no_shares(flat, capsys, word, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", "image_folder", "--root", str(flat), "--out", "x", "--split", word])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
