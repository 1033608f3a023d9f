"""Tables in CSV, TSV and Parquet, and COCO's JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt import cli
from loaders.sources import Source, open_source
from loaders.stored.dataset import ConvertedDataset

PER_CLASS = {"ant": 12, "bee": 8, "crow": 6}


@pytest.fixture
def rows(tmp_path) -> list[tuple[str, str]]:
    """Images below images/, and the path and class of each, classes mixed."""
    (tmp_path / "images").mkdir()
    found = []
    for c, (name, count) in enumerate(PER_CLASS.items()):
        for i in range(count):
            path = f"{name[0]} {i:02d}.jpg"
            Image.new("RGB", (8, 6), (60 * c, 9 * i, 100)).save(tmp_path / "images" / path)
            found.append((path, name))
    return sorted(found, key=lambda row: row[0][2:])


def counts(source: Source) -> dict[str, list[int]]:
    return {
        name: np.bincount(split.labels, minlength=source.num_classes).tolist() for name, split in source.splits.items()
    }


def table(folder: Path, **options) -> Source:
    lists = {key: folder / value for key, value in options.items() if key.endswith("_list")}
    return open_source("table", root=folder / "images", **{"split": (0.5, 0.25, 0.25), **options, **lists})


def by_path(source: Source) -> dict[str, str]:
    return {
        path: source.class_names[label]
        for split in source.splits.values()
        for path, label in zip(split.paths, split.labels, strict=True)
    }


# --- tables


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolon", "parquet", "csv with a mark and Windows' line ends"])
def test_every_form_of_a_table_gives_the_same_images(tmp_path, rows, kind):
    name = "labels.parquet" if kind == "parquet" else "labels.tsv" if kind == "tsv" else "labels.csv"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        columns = {"file_name": [path for path, _ in rows], "label": [label for _, label in rows]}
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
    else:
        mark = {"tsv": "\t", "semicolon": ";"}.get(kind, ",")
        text = "".join(f"{mark.join(row)}\n" for row in [("file_name", "Label"), *rows])
        data = text.replace("\n", "\r\n").encode("utf-8-sig") if "Windows" in kind else text.encode()
        (tmp_path / name).write_bytes(data)
    source = table(tmp_path, train_list=name)
    assert source.class_names == tuple(PER_CLASS)
    assert counts(source) == {"train": [6, 4, 2], "meta": [3, 2, 2], "test": [3, 2, 2]}
    assert by_path(source) == dict(rows)


def test_numbers_are_sorted_by_value_and_need_not_be_without_gaps(tmp_path, rows):
    number = {"ant": 30, "bee": 4, "crow": 100}
    lines = [f"{path},{number[label]}\n" for path, label in rows]
    (tmp_path / "t.csv").write_text("".join(["image,target\n", *lines]))
    source = table(tmp_path, train_list="t.csv")
    assert source.class_names == ("4", "30", "100")
    assert by_path(source) == {path: str(number[label]) for path, label in rows}


def test_a_column_of_splits_says_which_image_is_where(tmp_path, rows):
    words = ["Train", "validation", "TEST", "train"]
    lines = [f'"{path}",{label},{words[i % 4]}\n' for i, (path, label) in enumerate(rows)]
    (tmp_path / "t.csv").write_text("".join(["path,class,split\n", *lines]))
    source = table(tmp_path, train_list="t.csv", split=None)
    assert set(source.splits["train"].paths) == {path for i, (path, _) in enumerate(rows) if i % 4 in (0, 3)}
    assert set(source.splits["test"].paths) == {path for i, (path, _) in enumerate(rows) if i % 4 == 2}
    (tmp_path / "u.csv").write_text((tmp_path / "t.csv").read_text().replace("split", "fold"))
    again = table(tmp_path, train_list="u.csv", split=None, split_column="fold")
    assert again.listing_sha256() == source.listing_sha256()
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("validation", "holdout"))
    with pytest.raises(ValueError, match=r"column 'split' has 'holdout', which are no splits; these are called train"):
        table(tmp_path, train_list="t.csv", split=None)


def test_a_table_for_each_split(tmp_path, rows):
    for name, part in (("a.csv", rows[:20]), ("b.csv", rows[20:])):
        (tmp_path / name).write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in part))
    source = table(tmp_path, train_list="a.csv", test_list="b.csv", split=None, meta_per_class=1)
    assert len(source.splits["test"]) == len(rows) - 20
    with pytest.raises(ValueError, match="split_column is for one table of all images, and there are several"):
        table(tmp_path, train_list="a.csv", test_list="b.csv", split=None, split_column="x")
    part = "".join(f"{path},{label},{'val' if k % 5 == 0 else 'train'}\n" for k, (path, label) in enumerate(rows[:20]))
    (tmp_path / "a.csv").write_text("path,label,split\n" + part)
    of_test = "".join(f"{path},{label},val\n" for path, label in rows[20:])
    (tmp_path / "val.csv").write_text("path,label,split\n" + of_test)
    (tmp_path / "c.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows[:20]))
    published = table(tmp_path, train_list="c.csv", test_list="val.csv", split=None, meta_per_class=1)
    assert len(published.splits["test"]) == len(rows) - 20, "a table of validation is often the test set"
    with pytest.raises(ValueError, match=r"a.csv is the table of split 'train', and its column 'split' says 'val'"):
        table(tmp_path, train_list="a.csv", test_list="b.csv", split=None, meta_per_class=1)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "a,b\nx.jpg,1\n",
            {},
            r"t.csv: no column holds the image by its name \('a', 'b'\); name it with --image-column",
        ),
        ("path,file,label\nx,y,1\n", {}, r"2 columns may hold the image \('path', 'file'\); name it with --image-col"),
        ("path,label,class\nx,y,1\n", {}, r"2 columns may hold the label \('label', 'class'\); name it with --label-"),
        ("path,label\nx,1\n", {"label_column": "labels"}, r"unknown column 'labels': .*did you mean 'label'"),
        ("path,label\nx.jpg,\n", {}, r"t.csv: 1 rows have no 'label': line 2"),
        ("path,label\nx.jpg\n", {}, r"1 lines have another number of fields than the header, 2: line 2 has 1"),
        ("path,path\nx.jpg,1\n", {}, r"two columns have one name"),
        ("path,label\n", {}, r"t.csv lists no images: give a CSV, TSV or Parquet file"),
        ("path,label\n" + "a" * 200_000 + ",1\n", {}, r"t.csv: line 2 cannot be read \(field larger"),
        ("path,label\nx.jpg,1\ny.jpg,2\n", {}, r"2 of 2 files of .*t.csv do not exist under .*: line 2: x.jpg; line 3"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path, rows, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        table(tmp_path, train_list="t.csv", **options)


def test_advice_duplicates_and_no_table_at_all(tmp_path, rows):
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"pictures/{path},{label}\n" for path, label in rows))
    with pytest.raises(ValueError, match="They are found if you remove 'pictures/' from the front of the lines"):
        table(tmp_path, train_list="t.csv")
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in [*rows, rows[3]]))
    with pytest.raises(ValueError, match=r"1 images of .*t.csv are listed more than once: line 5: .* and line 28"):
        table(tmp_path, train_list="t.csv")
    assert len(table(tmp_path, train_list="t.csv", allow_duplicates=True).splits["train"]) == 13
    (tmp_path / "t.csv").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"t.csv cannot be read as Parquet: |needs pyarrow"):
        table(tmp_path, train_list="t.csv")
    with pytest.raises(ValueError, match=r"absent.csv does not exist: give a CSV, TSV or Parquet file with a column"):
        table(tmp_path, train_list="absent.csv")


def test_the_table_of_a_conversion_makes_the_same_data_again(tmp_path, rows):
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f'"{path}",{label}\n' for path, label in rows))
    words = ["convert", "table", "--root", str(tmp_path / "images"), "--quiet"]
    drawn = ["--train-list", str(tmp_path / "t.csv"), "--split", "0.5/0.25/0.25", "--split-seed", "5"]
    assert cli.main([*words, *drawn, "--out", str(tmp_path / "one")]) == 0
    assert cli.main([*words, "--train-list", str(tmp_path / "one" / "images.tsv"), "--out", str(tmp_path / "two")]) == 0
    one, two = (ConvertedDataset.open(tmp_path / name) for name in ("one", "two"))
    assert one.manifest["contents"] == two.manifest["contents"]
    assert one.class_names == two.class_names == tuple(PER_CLASS)


def test_names_that_begin_with_a_space_come_back_from_the_table_of_a_conversion(tmp_path, rows):
    root = tmp_path / "folders"
    for path, label in rows:
        (root / f" {label}").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "images" / path, root / f" {label}" / f" {Path(path).name}")
    words = ["convert", "image_folder", "--root", str(root), "--split", "0.5/0.25/0.25", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    words = ["convert", "table", "--root", str(root), "--train-list", str(tmp_path / "one" / "images.tsv"), "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "two")]) == 0
    one, two = (ConvertedDataset.open(tmp_path / name) for name in ("one", "two"))
    assert one.manifest["contents"] == two.manifest["contents"]
    assert one.class_names == two.class_names == tuple(f" {name}" for name in PER_CLASS)


# --- COCO's JSON


def coco(rows, *, ids: dict[str, int], names: dict[str, str] | None = None) -> dict:
    categories = [{"id": number, "name": (names or {}).get(name, name)} for name, number in ids.items()]
    images = [{"id": 1000 + i, "file_name": path, "width": 8} for i, (path, _) in enumerate(rows)]
    annotations = [{"id": i, "image_id": 1000 + i, "category_id": ids[label]} for i, (_, label) in enumerate(rows)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def open_coco(folder: Path, **contents: dict) -> Source:
    options = {key: value for key, value in contents.items() if not isinstance(value, dict)}
    lists = {}
    for key, content in contents.items():
        if isinstance(content, dict):
            lists[f"{key}_list"] = folder / f"{key}.json"
            lists[f"{key}_list"].write_text(json.dumps(content))
    return open_source("coco", root=folder / "images", **lists, **options)


IDS = {"crow": 7, "ant": 9, "bee": 3, "unused": 5}


def test_categories_are_classes_in_the_order_of_their_ids(tmp_path, rows):
    source = open_coco(tmp_path, train=coco(rows, ids=IDS), split=(0.5, 0.25, 0.25))
    assert source.class_names == ("bee", "crow", "ant")
    assert by_path(source) == dict(rows)
    assert source.notes == (f"{tmp_path / 'train.json'}: 1 of 4 categories have no image and are left out",)


def test_a_file_for_each_split_as_inaturalist_has_them(tmp_path, rows):
    test = coco([row for row in rows[20:] if row[1] != "crow"], ids=IDS)
    source = open_coco(tmp_path, train=coco(rows[:20], ids=IDS), test=test, meta_per_class=1)
    assert counts(source)["test"][1] == 0
    as_meta = open_coco(tmp_path, train=coco(rows[:20], ids=IDS), meta=test, meta_per_class=1)
    assert as_meta.splits["test"].paths == source.splits["test"].paths
    assert "meta.json is the test set, there is no other" in as_meta.notes[-1]


def test_odd_json_is_read_or_refused(tmp_path, rows):
    whole = coco(rows, ids=IDS)
    split = {"split": (0.5, 0.25, 0.25)}
    bare = {**whole, "annotations": [a for a in whole["annotations"] if a["category_id"] != 3]}
    source = open_coco(tmp_path, train=bare, **split)
    assert source.notes[0] == f"{tmp_path / 'train.json'}: 8 images without an annotation are not read"
    twice = coco(rows, ids=IDS, names={"crow": "ant"})
    assert open_coco(tmp_path, train=twice, **split).class_names == ("bee", "ant (7)", "ant (9)")
    again = {**whole, "annotations": [*whole["annotations"], whole["annotations"][0]]}
    assert len(open_coco(tmp_path, train=again, **split).splits["train"]) == 12
    first = {"image_id": 1000, "category_id": 5}
    for change, message in (
        (
            {"annotations": [*whole["annotations"], first]},
            r"1 images have annotations of several categories \(a 00.jpg",
        ),
        ({"annotations": [{"image_id": 1, "category_id": 3}]}, "annotations have images that it does not list: 1"),
        (
            {"annotations": [{"image_id": 1000, "category_id": 4}]},
            "annotations have categories that it does not list: 4",
        ),
        ({"images": [*whole["images"], whole["images"][0]]}, "1 ids of 'images' stand there more than once .1000"),
        ({"categories": [*whole["categories"], {"id": 3}]}, "1 ids of 'categories' stand there more than once .3"),
        ({"annotations": []}, "has no annotated image"),
        ({"annotations": None}, "has no list 'annotations': .*a file without labels cannot be used"),
        ({"images": [{"id": 3}]}, "entry 0 of 'images' has no usable 'file_name'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_coco(tmp_path, train={**whole, **change}, **split)
    other = coco(rows[20:], ids=IDS, names={"ant": "wasp"})
    with pytest.raises(
        ValueError, match=r"test.json: category 9 is 'wasp', and 'ant' in another file: the files are of"
    ):
        open_coco(tmp_path, train=coco(rows[:20], ids=IDS), test=other)
    (tmp_path / "train.json").write_text("[1, 2")
    with pytest.raises(
        ValueError, match=r"train.json is no JSON .*: give a JSON file with images, annotations and cat"
    ):
        open_source("coco", root=tmp_path / "images", train_list=tmp_path / "train.json")
