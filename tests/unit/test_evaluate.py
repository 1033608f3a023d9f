"""`fastlt evaluate` and `Predictor.evaluate`: on the test images, the metrics of the run's own test."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from test_inference import CLASSES, model, root, trainer  # noqa: F401  fixtures

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


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ("test", ["ant"] * 3, "3 labels were given for 12 images"),
        ("test", ["ant"] * 11 + ["bea"], r"no classes of the network: bea.*did you mean bee\?"),
        ("test", [3] * 12, "labels has 3, and the network has classes 0 to 2"),
        ("test", [0.5] * 12, "give the name or the number"),
        ("test/ant", None, "4 images in no class folder"),
        (".", None, r"folders that are no classes of the network: test, train, val.*classes are ant.*whose folders"),
        ("nowhere", None, "is no folder of class folders"),
        ("test/ant/0.jpg", None, "is no folder of class folders"),
    ],
)
def test_what_is_not_labelled_so_is_refused(root, model, images, labels, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        model.evaluate(root / images, labels)
