"""`fastlt evaluate` and `Predictor.evaluate`: on the test images, the metrics of the run's own test."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from test_inference import CLASSES, model, root, trainer  # noqa: F401  fixtures
from test_packed_sources import write_tar

from fastlt import cli
from fastlt.inference.inputs import images_below
from fastlt.run.metrics import Metrics
from fastlt.run.recorded import readable_result

METRICS = ("top1", "top5", "many", "medium", "few", "balanced_accuracy", "macro_f1", "per_class_accuracy")


def test_the_test_images_give_the_metrics_of_the_run(root, trainer, model):  # noqa: F811
    result = readable_result(trainer.folder)
    found = model.evaluate(root / "test")
    for metric in METRICS:
        assert found[metric] == result[metric], metric
    assert found["ece"] == pytest.approx(result["ece"], abs=1e-6)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    paths = images_below(root / "test")
    names = [path.parent.name for path in paths]
    for labels in (names, found.labels.tolist(), found.labels):
        assert model.evaluate(paths, labels).metrics == found.metrics
    with pytest.raises(ValueError, match="labels are given, and options of a data set"):
        model.evaluate(paths, labels, split="test")
    transformed = torch.stack([model.transform(path) for path in paths])
    assert model.evaluate(transformed, names).metrics == found.metrics


def test_prior_and_temperature_count_and_absent_classes_do_not(root, model):  # noqa: F811
    paths = [path for path in images_below(root / "test") if path.parent.name != "bee"]
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    expected = Metrics(3)
    log_pi = torch.from_numpy(np.log(model.carried.shares))
    expected.update(model.logits(paths).double() / 0.5 - log_pi, labels)
    found = model.evaluate(paths, labels.tolist(), prior="uniform", temperature=0.5)
    summary = expected.summary(model.counts)
    assert found["ece"] == pytest.approx(summary.pop("ece"), abs=1e-6)
    assert {key: found[key] for key in summary} == summary
    assert found["per_class_accuracy"][1] is None
    assert found["classes_evaluated"]["all"] == 2


def test_the_command_prints_and_writes_what_it_measured(root, trainer, model, tmp_path, capsys):  # noqa: F811
    shutil.copytree(root / "test", tmp_path / "new")
    (tmp_path / "new" / "yak" / "bad.jpg").write_bytes(b"nothing")
    files = ["--csv", tmp_path / "wrong.csv", "--json", tmp_path / "measured.json", "--quiet", "--device", "cpu"]
    assert cli.main(["evaluate", *map(str, [trainer.folder, tmp_path / "new", *files])]) == 0
    told, found = capsys.readouterr(), model.evaluate(root / "test")
    assert told.out.startswith("12 images\n")
    assert f"overall                 3       21{100 * found['top1']:>10.2f}" in told.out
    assert f"yak                            3{100 * found['per_class_accuracy'][2]:>10.2f}" in told.out
    assert f"1 could not be read:\n  {tmp_path}/new/yak/bad.jpg: not an image" in told.err
    assert cli.main(["evaluate", *map(str, [trainer.folder, root, "--split", "val", "--quiet"])]) == 0
    assert capsys.readouterr().out.startswith("12 images of split val\n")
    tree = json.loads((tmp_path / "measured.json").read_text())
    assert (tree["images"], tree["top1"], tree["class_names"]) == (12, found["top1"], list(CLASSES))
    assert len(tree["unreadable"]) == 1
    with (tmp_path / "wrong.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == round(12 * (1 - found["top1"])) > 0
    assert all(row["image"].startswith(f"{tmp_path}/new/{row['class']}/") for row in rows)
    assert all(row["class"] != row["prediction"] for row in rows)
    confidence = [float(row["probability"]) for row in rows]
    assert confidence == sorted(confidence, reverse=True)


def test_folders_with_other_names_are_named_by_a_file(root, model, tmp_path):  # noqa: F811
    for number, name in enumerate(CLASSES):
        shutil.copytree(root / "test" / name, tmp_path / "new" / f"n{number}")
    (tmp_path / "names.txt").write_text("".join(f"n{number}\t{name}\n" for number, name in enumerate(CLASSES)))
    found = model.evaluate(tmp_path / "new", class_names=tmp_path / "names.txt")
    assert found.metrics == model.evaluate(root / "test").metrics


def test_features_are_what_the_head_gets(root, model):  # noqa: F811
    features = model.features(root / "test", batch_size=5)
    assert features.shape == (12, model.model.head.in_features)
    with torch.no_grad():
        torch.testing.assert_close(model.model.head(features), model.logits(root / "test"))


def paths_and_classes(root, split):  # noqa: F811
    """The images of a split, relative to `root`, and the names of their classes."""
    paths = [path.relative_to(root) for path in images_below(root / split)]
    return [(path.as_posix(), path.parent.name) for path in paths]


@pytest.fixture
def data_sets(root, tmp_path):  # noqa: F811
    """The test images in every form that `fastlt convert` reads, by its name: the data, and what else is said of it."""
    test, val = paths_and_classes(root, "test"), paths_and_classes(root, "val")
    table = [("file", "label", "split"), *((*row, "test") for row in test), *((*row, "val") for row in val)]
    for name, separator, rows in (("a.csv", ",", table), ("b.tsv", "\t", [row[:2] for row in (table[0], *test)])):
        (tmp_path / name).write_text("".join(separator.join(row) + "\n" for row in rows))
    (tmp_path / "list.txt").write_text("".join(f"{path} {CLASSES.index(name)}\n" for path, name in test))
    coco = {
        "images": [{"id": k, "file_name": path} for k, (path, _) in enumerate(test)],
        "annotations": [{"image_id": k, "category_id": 7 + CLASSES.index(name)} for k, (_, name) in enumerate(test)],
        "categories": [{"id": 7 + c, "name": name} for c, name in enumerate(CLASSES)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    members = {f"{k:03d}.jpg": (root / path).read_bytes() for k, (path, _) in enumerate(test)}
    write_tar(tmp_path / "shards/0.tar", members | {f"{k:03d}.cls": name for k, (_, name) in enumerate(test)})
    found = {
        "a folder of splits": (root, {}),
        "a folder": (root / "test", {}),
        "a table with splits": (tmp_path / "a.csv", {"root": root}),
        "a table": (tmp_path / "b.tsv", {"root": root, "image_column": "file"}),
        "a list": (tmp_path / "list.txt", {"root": root}),
        "JSON": (tmp_path / "coco.json", {"root": root}),
        "tar files": (tmp_path / "shards", {}),
    }
    return found


def test_a_data_set_in_every_form_gives_the_metrics_of_the_test(root, trainer, model, data_sets, tmp_path, caplog):  # noqa: F811
    expected = model.evaluate(root / "test")
    data_sets["a converted data set"] = (trainer.context.dataset.root, {})
    for name, (data, options) in data_sets.items():
        found = model.evaluate(data, **options)
        assert found.metrics == expected.metrics, name
        assert (found.split == "test") == ("split" in name or "converted" in name), name
    assert not caplog.records
    coco = json.loads(data_sets["JSON"][0].read_text())
    coco["images"].append({"id": 99, "file_name": coco["images"][0]["file_name"]})
    (tmp_path / "more.json").write_text(json.dumps(coco))
    assert model.evaluate(tmp_path / "more.json", root=root).metrics == expected.metrics
    assert "1 images without an annotation are not read" in caplog.text
    val = model.evaluate(root / "val").metrics
    table, options = data_sets["a table with splits"]
    assert model.evaluate(table, **options, split="val").metrics == val != expected.metrics
    assert len(model.evaluate(table, **options, split="all").labels) == 24
    assert model.evaluate(root, split="validation").metrics == val


def test_parquet_and_hugging_face_data_sets_are_measured_too(root, model, tmp_path):  # noqa: F811
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs the extra parquet")
    parquet = pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets", reason="datasets is the extra hf")
    expected = model.evaluate(root / "test").metrics
    paths, names = zip(*paths_and_classes(root, "test"), strict=True)
    parquet.write_table(pyarrow.table({"path": paths, "class": names}), tmp_path / "test.parquet")
    assert model.evaluate(tmp_path / "test.parquet", root=root).metrics == expected
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES[::-1])})
    rows = {"image": [str(root / path) for path in paths], "label": [CLASSES[::-1].index(name) for name in names]}
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=kinds)})
    saved.save_to_disk(tmp_path / "saved")
    assert model.evaluate(tmp_path / "saved").metrics == expected


def test_damaged_images_of_a_data_set_are_named(root, model, tmp_path):  # noqa: F811
    whole = (root / "test/ant/0.jpg").read_bytes()
    write_tar(tmp_path / "0.tar", {"a.jpg": whole, "a.cls": "ant", "b.jpg": whole[:200], "b.cls": "bee"})
    found = model.evaluate(tmp_path)
    assert found.labels.tolist() == [0]
    assert found.predictions.sources == (f"{tmp_path}/0.tar/a",)
    (bad,) = found.predictions.unreadable
    assert bad.source == f"{tmp_path}/0.tar/b"
    assert bad.reason.startswith("damaged")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("a table with splits", {"split": "train"}, "has no split train, only test and val"),
        ("a table with splits", {"split": "tset"}, "allowed are train, val, test and all"),
        ("a table with splits", {"image_column": "flie"}, "did you mean 'file'"),
        ("a table with splits", {"root": "."}, "12 files of .*do not exist|24 of 24 files of .* do not exist"),
        ("a list", {"label_column": "x"}, "label_column, which is for table and webdataset .* not for list_file"),
        (
            "tar files",
            {"image_column": "x"},
            "image_column, which is for table and hf_dataset only, not for",
        ),
        ("a table", {"source": "image_folder"}, "is a list, which is for .* only, not for image_folder"),
        ("a table", {"source": "tabel"}, "did you mean 'table'"),
    ],
)
def test_a_data_set_that_is_asked_for_wrongly_is_refused(model, data_sets, data, options, message):  # noqa: F811
    path, right = data_sets[data]
    with pytest.raises(ValueError, match=message):
        model.evaluate(path, **{**right, **options})


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("test", ["ant"] * 3, "3 labels were given for 12 images"),
        ("test", ["ant"] * 11 + ["bea"], r"classes that the network does not know: bea.*did you mean bee\?"),
        ("test", [3] * 12, "labels has 3, and the network has classes 0 to 2"),
        ("test", [0.5] * 12, "give the name or the number"),
        ("test/ant", None, "holds no images in folders: .*4 directly in ant"),
        ("nowhere", None, "does not exist"),
        ("test/ant/0.jpg", None, "neither a list of images nor a folder"),
    ],
)
def test_what_is_not_labelled_so_is_refused(root, model, images, labels, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model.evaluate(root / images, labels)
