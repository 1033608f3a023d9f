"""Images within larger files: WebDataset's tar files, and folders that Hugging Face datasets wrote."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastlt import cli
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.sources import Source, open_source
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.unconverted import UnconvertedDataset

CLASSES = ("ant", "bee", "crow")


def picture(c: int, i: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (70 * c, 5 * i, 100)).save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard(images: list[tuple[int, int]], *, label=lambda c: {"cls": str(c)}) -> dict[str, bytes | str]:
    """A sample for each (class, number)."""
    members: dict[str, bytes | str] = {}
    for c, i in images:
        members[f"{c}-{i:03d}.jpg"] = picture(c, i)
        members |= {f"{c}-{i:03d}.{kind}": text for kind, text in label(c).items()}
    return members


def every(count: int, first: int = 0) -> list[tuple[int, int]]:
    return [(c, i) for i in range(first, first + count) for c in range(3)]


def counts(source: Source) -> dict[str, list[int]]:
    return {
        name: np.bincount(split.labels, minlength=source.num_classes).tolist() for name, split in source.splits.items()
    }


def shards(root: Path, **options) -> Source:
    return open_source("webdataset", root=root, **options)


# --- tar files


LABELS = {
    "numbers": lambda c: {"cls": f"{c}\n"},
    "names": lambda c: {"cls": CLASSES[c]},
    "json": lambda c: {"json": json.dumps({"label": CLASSES[c], "url": "x"})},
    "json beside cls": lambda c: {"json": json.dumps({"label": 7}), "cls": CLASSES[c]},
}


@pytest.mark.parametrize("kind", LABELS)
def test_shards_without_splits_are_cut_by_shares(tmp_path, kind):
    for number in range(2):
        write_tar(tmp_path / f"{number:05d}.tar", shard(every(10, 10 * number), label=LABELS[kind]))
    source = shards(tmp_path, split=(0.8, 0.1, 0.1))
    assert source.class_names == (("0", "1", "2") if kind == "numbers" else CLASSES)
    assert counts(source) == {"train": [16] * 3, "meta": [2] * 3, "test": [2] * 3}
    for split in source.splits.values():
        for i, label in enumerate(split.labels):
            key = Path(split.name(i)).name
            assert split.contents(i) == picture(int(key[0]), int(key[2:])), key
            assert label == int(key[0])
            assert abs(int(split.image(i)[0, 0, 0]) - 70 * label) < 4


@pytest.mark.parametrize("layout", ["{split}-{number:05d}.tar", "{split}/{number:05d}.tar", "my_{split}.{number}.tar"])
def test_the_split_is_a_word_of_the_name(tmp_path, layout):
    for split, first in (("train", 0), ("val", 20), ("test", 40)):
        for number in range(2):
            images = every(3, first + 3 * number)
            write_tar(tmp_path / layout.format(split=split, number=number), shard(images))
    source = shards(tmp_path, meta_per_class=4)
    assert counts(source) == {"train": [6] * 3, "meta": [4] * 3, "test": [6] * 3}
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncrow\nwasp\n")
    assert shards(tmp_path).class_names == CLASSES
    (tmp_path / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(
        ValueError, match=r"classnames.txt names 2 classes, but labels are 0 to 2: give a line for each"
    ):
        shards(tmp_path)


def test_shards_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .tar files: expected tar files of KEY.jpg and KEY.cls"):
        shards(tmp_path)
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match=r"it has a.tar.gz: unpack these to .tar first"):
        shards(tmp_path)
    good = shard(every(10))
    for change, message in (
        ({"1-003.png": picture(1, 3, "PNG")}, r"a.tar: sample 1-003 has 2 images \(.jpg, .png\): keep"),
        ({"9.jpg": b"x"}, r"sample 9 has no label: expected tar files of"),
        ({"9.jpg": b"x", "9.cls": " "}, r"sample 9 has an empty .cls"),
        ({"9.jpg": b"x", "9.json": "{"}, r"sample 9: its .json cannot be read"),
        ({"9.jpg": b"x", "9.json": "[1]"}, r"sample 9: its .json is no mapping with a label"),
        (
            {"9.jpg": b"x", "9.json": '{"name": 1}'},
            r"sample 9: no column holds the label by its name \('name'\); name it",
        ),
        ({"9.jpg": b"x", "9.json": '{"label": [1]}'}, r"its label is \[1\], and must be a number or a name"),
    ):
        write_tar(tmp_path / "a.tar", {**good, **change})
        with pytest.raises(ValueError, match=message):
            shards(tmp_path)
    write_tar(tmp_path / "a.tar", {**good, "README": "hello", "notes.txt": "x"})
    assert shards(tmp_path).notes[0] == f"{tmp_path}: 2 samples without an image are not read"
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"a.tar cannot be read as a plain tar file"):
        shards(tmp_path)
    write_tar(tmp_path / "a.tar", good)
    write_tar(tmp_path / "val-1.tar", good)
    with pytest.raises(ValueError, match=r"1 tar files have no split in their name \(a.tar\), and others have"):
        shards(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match="holds no tar files of split train, only of meta"):
        shards(tmp_path)


def test_two_samples_of_one_key_are_refused(tmp_path):
    path = write_tar(tmp_path / "0.tar", shard(every(2)))
    with tarfile.open(path, "a") as tar:
        for name in ("0-001.jpg", "0-001.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(ValueError, match=r"0.tar: sample 0-001 has two files .jpg: give each sample a key of its own"):
        shards(tmp_path)


def test_a_key_of_json_may_be_named(tmp_path):
    write_tar(tmp_path / "a.tar", shard(every(10), label=lambda c: {"cls": "0", "json": json.dumps({"kind": c})}))
    assert shards(tmp_path, label_column="kind").class_names == ("0", "1", "2")


def test_shards_are_converted_checked_and_read_without_conversion(tmp_path, capsys):
    members = shard(every(10))
    members["9.jpg"], members["9.cls"] = members["0-000.jpg"][:200], "0"
    write_tar(tmp_path / "in" / "a.tar", members)
    words = ["convert", "webdataset", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--quiet"]
    words += ["--mode", "jpg", "--format", "both"]
    assert cli.main(words) == 2
    assert "1 of 31 images cannot be converted" in capsys.readouterr().err
    assert cli.main([*words, "--on-error", "skip"]) == 0
    made = ConvertedDataset.open(tmp_path / "out")
    assert made.class_counts().counts.tolist() == [8, 8, 8]
    assert "9" in (tmp_path / "out" / "skipped.txt").read_text()
    # The converted shards are such tar files themselves.
    again = shards(tmp_path / "out" / "dali")
    assert counts(again) == {"train": [8] * 3, "meta": [1] * 3, "test": [1] * 3}


def test_every_image_of_packed_files_comes_through_worker_processes_as_it_is(tmp_path):
    write_tar(tmp_path / "a.tar", shard(every(10)))
    check_workers(shards(tmp_path), tmp_path)


def check_workers(source: Source, root: Path) -> None:
    """The torch loader's processes get the split by pickle; the pixels are those of the source."""
    dataset = UnconvertedDataset.open(source, root, num_workers=1, progress=False)
    options = {"batch_size": 5, "device": "cpu", "train": False, "crop": CropSpec("none", 6), "num_workers": 1}
    loader = make_loader(dataset, "train", backend="torch", **options)
    try:
        batches = list(loader.epoch(0))
    finally:
        loader.close()
    split = source.splits["train"]
    assert torch.cat([batch.labels for batch in batches]).tolist() == split.labels.tolist()
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    for i in range(len(split)):
        np.testing.assert_array_equal(images[i], split.image(i))
    assert dataset.identity().class_counts["train"] == np.bincount(split.labels).tolist()


def test_equal_contents_in_two_splits_are_refused(tmp_path, capsys):
    write_tar(tmp_path / "train.tar", shard(every(12)))
    write_tar(tmp_path / "test.tar", shard(every(3)))
    words = ["convert", "webdataset", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main(words) == 2
    assert "6 files of equal contents are in both the train split and the test split" in capsys.readouterr().err
    assert cli.main([*words, "--allow-duplicates"]) == 0


# --- Hugging Face datasets


def hf_folder(root: Path, splits: dict[str, list], *, names: bool = True) -> Path:
    """A dictionary of data sets by split; one data set where the only split is called "". A class may be None."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=[*CLASSES, "wasp"]) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label, "note": datasets.Value("string")})
    tables = {}
    for split, images in splits.items():
        rows = {
            "image": [{"bytes": picture(c or 0, i), "path": None} for c, i in images],
            "label": [c for c, _ in images],
            "note": [f"{i}" for _, i in images],
        }
        tables[split] = datasets.Dataset.from_dict(rows, features=features)
    found = tables[""] if set(tables) == {""} else datasets.DatasetDict(tables)
    found.save_to_disk(str(root), num_proc=None)
    return root


def test_one_data_set_is_cut_by_shares(tmp_path):
    root = hf_folder(tmp_path / "saved", {"": every(10)})
    source = open_source("hf_dataset", root=root)
    assert source.class_names == CLASSES
    assert counts(source) == {"train": [8] * 3, "meta": [1] * 3, "test": [1] * 3}
    assert f"{root}, split train: 1 of 4 classes have no image" in source.notes
    for split in source.splits.values():
        for i, label in enumerate(split.labels):
            number = int(split.listed(i)[6:-1])
            assert (label, split.contents(i)) == (number % 3, picture(number % 3, number // 3))
    assert source.splits["test"].name(0).startswith(f"{root}/train[")
    check_workers(source, root)


def test_a_dictionary_of_splits(tmp_path):
    parts = {"train": every(12), "validation": every(3, 20), "test": every(2, 30), "extra": every(1, 40)}
    source = open_source("hf_dataset", root=hf_folder(tmp_path / "saved", parts, names=False), meta_per_class=2)
    assert source.class_names == ("0", "1", "2")
    assert counts(source) == {"train": [12] * 3, "meta": [2] * 3, "test": [2] * 3}
    assert source.notes == (f"{tmp_path / 'saved'}: not read are the splits extra",)
    words = ["convert", "hf_dataset", "--root", str(tmp_path / "saved"), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main([*words, "--meta-per-class", "2"]) == 0
    assert ConvertedDataset.open(tmp_path / "out").class_counts().counts.tolist() == [12] * 3


def test_folders_of_datasets_that_cannot_be_used_are_refused(tmp_path):
    root = hf_folder(tmp_path / "saved", {"train": every(12), "test": every(2, 30)})
    for options, message in (
        ({"image_column": "note"}, r"column 'note' holds no images, but Value"),
        ({"label_column": "lable"}, r"unknown column 'lable': .*did you mean 'label'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("hf_dataset", root=root, **options)
    some = hf_folder(tmp_path / "some", {"train": every(12), "test": [(None, 30), (0, 31)]})
    with pytest.raises(ValueError, match="split test: 1 rows have no label: 0"):
        open_source("hf_dataset", root=some)
    bare = open_source("hf_dataset", root=hf_folder(tmp_path / "bare", {"train": every(12), "test": [(None, 30)]}))
    assert f"{tmp_path / 'bare'}: split test has no labels and is not read" in bare.notes
    assert counts(bare)["test"] == [1] * 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be opened as a folder of datasets' save_to_disk: "):
        open_source("hf_dataset", root=tmp_path / "empty")
