"""The page of a report: what it is made from, against slow references, and what becomes of odd folders."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from made_up_runs import long_tail, metrics, predictions, write_run

from fastlt import cli, file_lock
from fastlt.recipe import load_recipe
from fastlt.report.blocks import Column, TableBlock
from fastlt.report.calibration import calibration
from fastlt.report.confusion import class_groups, confused_pairs, confusion, where_errors_go
from fastlt.report.figures import Series, accuracy_of_classes, binned, class_history, over_seeds
from fastlt.report.files import to_csv
from fastlt.report.runs import open_run
from fastlt.report.seeds import Group, group_runs
from fastlt.report.style import spaced
from fastlt.report.wrong_images import most_confidently_wrong, rare_classes
from fastlt.run.folder import log_file, predictions_file, result_file
from fastlt.run.predictions import Predictions, read_predictions
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.state import ClassCounts

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"


def counts_of(numbers, shots=(60, 20)):
    return ClassCounts(np.array(numbers, dtype=np.int64), tuple(f"c{i}" for i in range(len(numbers))), shots)


# Numbers


def test_the_confusion_of_a_few_classes_is_counted_over_seeds_with_the_largest_class_first():
    counts = counts_of([10, 100, 30])
    seeds = [predictions(counts.counts, 90, seed) for seed in (0, 1)]
    found = confusion(seeds, counts)
    assert found.names == ["c1", "c2", "c0"]
    assert found.edges == {"many": 0, "medium": 1, "few": 2}
    for row, true in enumerate([1, 2, 0]):
        pairs = [(int(p),) for s in seeds for t, p in zip(s.labels, s.predicted, strict=True) if t == true]
        expected = [sum(p == (other,) for p in pairs) / len(pairs) for other in [1, 2, 0]]
        assert found.share[row] == pytest.approx(expected)


def test_many_classes_are_grouped_by_size_and_no_group_is_of_two_kinds():
    counts = counts_of(long_tail(500), shots=(100, 20))
    groups = class_groups(counts)
    assert 15 <= len(groups) <= 22
    assert sorted(np.concatenate(groups).tolist()) == list(range(500))
    sizes = [counts.counts[group] for group in groups]
    assert all(a.min() >= b.max() for a, b in itertools.pairwise(sizes))
    for mask in counts.shot_masks().values():
        assert all(mask[group].all() or not mask[group].any() for group in groups)
    found = confusion([predictions(counts.counts, 2000, 0)], counts)
    assert np.nansum(found.share, axis=1) == pytest.approx(np.ones(len(groups)))


def test_confused_pairs_are_the_most_frequent_first():
    counts = counts_of([10, 100, 30, 5])
    seeds = [predictions(counts.counts, 200, seed) for seed in (0, 1, 2)]
    wrong = Counter((int(t), int(p)) for s in seeds for t, p in zip(s.labels, s.predicted, strict=True) if t != p)
    total = Counter(int(t) for s in seeds for t in s.labels)
    pairs = confused_pairs(seeds, 4)
    assert {(p.true, p.taken_for) for p in pairs} == set(wrong)
    assert [p.images for p in pairs] == sorted((n / 3 for n in wrong.values()), reverse=True)
    for pair in pairs:
        assert pair.images == wrong[pair.true, pair.taken_for] / 3
        assert pair.share == wrong[pair.true, pair.taken_for] / total[pair.true]


def test_where_errors_go():
    counts = counts_of([100, 30, 5])
    labels, predicted = np.array([0, 0, 0, 0, 2, 2]), np.array([0, 0, 1, 2, 0, 0])
    one = Predictions(np.arange(6), labels, predicted[:, None], np.ones((6, 1), np.float32))
    assert where_errors_go([one], counts) == [
        ("many", {"right": 0.5, "many": 0.0, "medium": 0.25, "few": 0.25}),
        ("few", {"right": 0.0, "many": 1.0, "medium": 0.0, "few": 0.0}),
    ]


def test_the_calibration_error_is_that_of_the_metrics():
    counts = counts_of(long_tail(12))
    seeds = [predictions(counts.counts, 500, seed) for seed in (0, 1)]
    found = calibration(seeds)
    assert found.errors == pytest.approx([metrics(seed, counts)["ece"] for seed in seeds])
    confidence = np.concatenate([seed.confidence for seed in seeds])
    right = np.concatenate([seed.right for seed in seeds])
    inside = (confidence > 9 / 15) & (confidence <= 10 / 15)
    assert found.images[9] == inside.sum()
    assert found.accuracy[9] == pytest.approx(right[inside].mean())
    assert found.confidence[9] == pytest.approx(confidence[inside].mean())
    assert np.isnan(found.accuracy[0]), "no image has a confidence below 1/15"


def test_wrong_images_come_by_their_mean_probability_and_a_class_has_few_of_them():
    labels = np.array([2, 2, 2, 0, 1])
    top = [np.array([0, 1, 0, 1, 1]), np.array([0, 2, 0, 1, 1])]
    sure = [np.array([0.9, 0.99, 0.3, 1, 1]), np.array([0.7, 0.99, 0.5, 1, 1])]
    seeds = [
        Predictions(np.arange(5), labels, t[:, None], s[:, None].astype(np.float32))
        for t, s in zip(top, sure, strict=True)
    ]
    rare = np.array([False, False, True])
    found = most_confidently_wrong(seeds, rare)
    assert [(w.index, w.taken_for, w.seeds) for w in found] == [(0, 0, 2), (1, 1, 1), (2, 0, 2)]
    assert [w.probability for w in found] == pytest.approx([0.8, 0.495, 0.4])
    assert [w.index for w in most_confidently_wrong(seeds, rare, of_one_class=2)] == [0, 1]


def test_without_few_shot_classes_the_smallest_quarter_is_rare():
    assert rare_classes(counts_of([100, 5, 30]))[0].tolist() == [False, True, False]
    mask, kind = rare_classes(counts_of([100, 50, 30, 70]))
    assert mask.tolist() == [False, False, True, False]
    assert "none is few-shot" in kind


def test_names_beside_a_plot_keep_their_distance_and_their_order():
    placed = spaced([0.0, 0.01, 0.02, 5.0], 0.1)
    assert np.diff(placed).min() >= 0.0999
    assert placed[3] == pytest.approx(5.0)
    assert spaced([3.0, 1.0], 0.5) == [3.0, 1.0]


def test_means_over_classes_of_like_size():
    images, values = np.array([100, 1, 10, 1]), np.array([1.0, 0.0, 0.5, 0.2])
    centres, means = binned(images, values)
    assert centres == pytest.approx([1, np.sqrt(1000)])
    assert means == pytest.approx([0.1, 0.75])


# Runs


@pytest.fixture
def runs(tmp_path):
    """Three seeds of one recipe, one of another, and one that stopped."""
    counts = long_tail(10)
    for seed in (0, 1, 2):
        write_run(tmp_path, "ours", counts, seed=seed)
    write_run(tmp_path, "other", counts, "stages.end_to_end.lr=0.3", weights=False)
    write_run(tmp_path, "stopped", counts, "stages.end_to_end.lr=0.2", finished=False)
    return tmp_path


def report(runs, *words, folders=None):
    folders = sorted(p for p in runs.iterdir() if p.is_dir()) if folders is None else folders
    out = runs / "page" / "report.html"
    code = cli.main(["report", *map(str, folders), "--out", str(out), *words])
    return code, out.read_text() if out.exists() else ""


def test_seeds_are_merged(runs):
    groups = group_runs([open_run(folder) for folder in sorted(runs.iterdir())])
    assert [(group.name, len(group.runs), len(group.finished)) for group in groups] == [
        ("other", 1, 1),
        ("ours", 3, 3),
        ("stopped", 1, 0),
    ]
    ours = groups[1]
    results = [json.loads(result_file(runs / f"ours-{seed}").read_text()) for seed in (0, 1, 2)]
    accuracy = np.array([result["per_class_accuracy"] for result in results])
    assert ours.class_accuracy is not None
    assert ours.class_accuracy[0] == pytest.approx(accuracy.mean(0))
    assert ours.class_accuracy[1] == pytest.approx(accuracy.std(0, ddof=1))
    history = class_history(ours, "weight")
    assert history is not None
    assert history[1].shape == (12, 10)
    assert history[1].mean(axis=1) == pytest.approx(np.ones(12), rel=1e-5)
    assert class_history(groups[0], "weight") is None
    iterations, mean, low, high = over_seeds(ours.runs, "evaluation", "top1")
    assert iterations.tolist() == list(range(50, 601, 50))
    top1 = [result["top1"] for result in results]
    assert (mean[-1], low[-1], high[-1]) == pytest.approx((np.mean(top1), min(top1), max(top1)))


def test_a_long_log_is_drawn_with_few_points(runs):
    run = open_run(runs / "ours-0")
    iterations, mean, _, _ = over_seeds([run], "train", "loss", at_most=10)
    assert len(iterations) == 10
    losses = [json.loads(line) for line in log_file(run.folder).read_text().splitlines()]
    losses = [line["loss"] for line in losses if line["kind"] == "train"]
    assert len(losses) == 60
    assert mean[0] == pytest.approx(np.mean(losses[:6]))


def test_a_page_tells_of_every_run_and_names_what_it_cannot_read(runs, capsys):
    (runs / "holidays").mkdir()
    damaged = write_run(runs, "damaged", long_tail(10), "stages.end_to_end.lr=0.7")
    result_file(damaged).write_text("{")
    lost = write_run(runs, "lost", long_tail(10), "stages.end_to_end.lr=0.8")
    (lost / "recipe.yaml").write_text("name: [")
    odd = write_run(runs, "odd", long_tail(10), "stages.end_to_end.lr=0.9")
    result_file(odd).write_text(json.dumps({"top1": 0.5}))
    code, page = report(runs)
    told = capsys.readouterr().err
    assert code == 2
    for text in ("holds no run: recipe.yaml is missing", str(lost / "recipe.yaml")):
        assert text in told
        assert text in page
    assert f"{result_file(odd)} is not of a training: it has no per_class_accuracy" in page
    assert "result.json is damaged; the command that trained the run measures it again" in page
    assert "unfinished: stopped at stage end_to_end, iteration 600" in page
    assert "4 of 6 runs finished" in page
    results = [json.loads(result_file(runs / f"ours-{seed}").read_text()) for seed in (0, 1, 2)]
    top1 = [100 * result["top1"] for result in results]
    assert f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}" in page


def test_unfinished_runs_alone_have_a_page(runs):
    code, page = report(runs, folders=[runs / "stopped-0"])
    assert code == 0
    assert "Training loss" in page
    assert "Reliability" not in page


def test_without_any_run_there_is_no_page(tmp_path, capsys):
    (tmp_path / "holidays").mkdir()
    code, page = report(tmp_path)
    assert code == 2
    assert not page
    assert "there is no run to report on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--out", "report.pdf"], "ends in .html"), (["--files"], "add --out FILE.html")],
)
def test_a_wrong_option_is_refused(runs, capsys, words, message):
    assert cli.main(["report", str(runs / "ours-0"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_trained_now_is_called_so(runs):
    run = runs / "stopped-0"
    descriptor = file_lock.open_locked(run / ".lock")
    assert descriptor is not None
    assert open_run(run).status == "in training: stage end_to_end, iteration 600"
    (run / "diverged.json").write_text(json.dumps({"stage": "end_to_end", "iteration": 77, "places": ["loss"]}))
    assert open_run(run).status == "diverged in stage end_to_end, iteration 77"


def test_predictions_of_another_model_are_not_shown(runs):
    wrong = json.loads(result_file(runs / "other-0").read_text())
    result_file(runs / "other-0").write_text(json.dumps({**wrong, "top1": wrong["top1"] - 0.1}))
    predictions_file(runs / "ours-1").write_bytes(b"nothing")
    _, page = report(runs)
    assert "predictions.npz is not of the model that result.json is of" in page
    assert "predictions.npz cannot be read" in page
    assert "--measure" in page
    assert open_run(runs / "other-0").predictions == {}


def test_a_page_needs_nothing_from_elsewhere_and_names_do_not_become_markup(tmp_path):
    names = [f"<script>alert({c})</script> & $x^{c}$" for c in range(10)]
    write_run(tmp_path, "ours", long_tail(10), class_names=names)
    _, page = report(tmp_path)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(3)&lt;/script&gt; &amp; $x^3$" in page
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, (
        "names of SVG, which are not read"
    )


def test_figures_and_numbers_are_files_too(runs):
    code, _ = report(runs, "--files")
    beside = runs / "page" / "report_files"
    assert code == 0
    names = {path.name for path in beside.iterdir()}
    for figure in ("accuracy_by_count", "accuracy_by_shots", "curve_loss", "weight_ours", "confusion_ours", "time"):
        assert (beside / f"{figure}.svg").read_text().startswith("<?xml")
        assert (beside / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    for table in ("metrics", "runs", "classes", "confused_pairs_ours", "curves", "class_history", "reliability_other"):
        assert f"{table}.csv" in names, table
    with (beside / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    result = json.loads(result_file(runs / "other-0").read_text())
    of_class = dict(zip(result["class_names"], result["per_class_accuracy"], strict=True))
    for row in rows:
        assert float(row["test accuracy %, other"]) == pytest.approx(100 * of_class[row["class"]])
        assert row["test accuracy %, other sd"] == ""
        assert float(row["test accuracy %, ours sd"]) >= 0


def test_a_cell_of_a_table_file_is_empty_where_nothing_is_known():
    columns = [Column("run"), Column("top-1", 2), Column("few", 2)]
    table = TableBlock("t", columns, [["a", (1.23456, 0.5), None], ["b", (2.0, float("nan")), 3.0]])
    assert table.texts == [["a", "1.23 ± 0.50", "-"], ["b", "2.00", "3.00"]]
    assert to_csv(table) == "run,top-1,top-1 sd,few\na,1.23456,0.5,\nb,2.0,,3.0\n"


def test_runs_on_other_classes_are_compared_apart(runs):
    write_run(runs, "wide", long_tail(30), "stages.end_to_end.lr=0.4")
    _, page = report(runs, "--files")
    assert "30 classes with" in page
    assert {p.name for p in (runs / "page" / "report_files").glob("classes*.csv")} == {"classes_1.csv", "classes_2.csv"}


def test_runs_with_other_shot_groups_are_compared_apart(runs):
    write_run(runs, "shots", long_tail(10), "stages.end_to_end.lr=0.4", "data.shots=[30, 10]")
    _, page = report(runs, "--files")
    assert "Runs have different data.shots, [60, 20] and [30, 10]" in page
    assert {p.name for p in (runs / "page" / "report_files").glob("classes*.csv")} == {"classes_1.csv", "classes_2.csv"}


def test_points_of_a_class_stay_in_its_row(runs):
    """Whatever numbers the finished runs have among all."""
    groups = group_runs([open_run(folder) for folder in sorted(runs.iterdir())])
    finished = [group for group in groups if group.finished]
    figure = accuracy_of_classes([Series(group, 5 + k, group.name, group.name) for k, group in enumerate(finished)])
    heights = [points.get_offsets()[:, 1] for points in figure.axes[0].collections if len(points.get_offsets()) == 10]
    assert len(heights) == len(finished) == 2
    for of_run in heights:
        assert (abs(of_run - np.arange(10)) < 0.2).all()


def test_as_many_classes_as_inaturalist_has(tmp_path):
    counts = long_tail(8142)
    for seed in (0, 1):
        write_run(tmp_path, "large", counts, seed=seed, images=24426)
    began = time.process_time()
    code, page = report(tmp_path)
    assert code == 0
    assert time.process_time() - began < 20  # 4 s on an idle core
    assert len(page) < 10e6
    assert "species number 8141" in page
    assert (tmp_path / "large-0" / "predictions.npz").stat().st_size < 2e6


# Of a run that was trained


@pytest.fixture
def trained(digits, digits_words, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    words = [*digits_words, f"data.converted={data}"]
    trainer = Trainer(prepare(load_recipe(RECIPE, words)))
    trainer.fit()
    return trainer.folder, data


def test_the_predictions_of_an_earlier_version_can_be_made_again(trained, capsys):
    folder, data = trained
    before = read_predictions(predictions_file(folder))
    predictions_file(folder).unlink()
    _, page = report(folder.parent, folders=[folder])
    assert f"fastlt report {folder} --measure" in page
    assert cli.main(["report", str(folder), "--measure"]) == 0
    assert f"{predictions_file(folder)} is made" in capsys.readouterr().out
    after = read_predictions(predictions_file(folder))
    for split in ("test", "meta"):
        assert np.array_equal(after[split].index, before[split].index)
        assert np.array_equal(after[split].labels, before[split].labels)
        assert np.array_equal(after[split].predicted, before[split].predicted)
        assert after[split].probabilities == pytest.approx(before[split].probabilities, abs=1e-5)
    assert cli.main(["report", str(folder), "--measure"]) == 0
    predictions_file(folder).unlink()
    shutil.rmtree(data)
    assert cli.main(["report", str(folder), "--measure"]) == 2
    assert str(data) in capsys.readouterr().err


def test_wrong_images_are_shown_from_the_data_set_or_from_the_source(trained):
    folder, data = trained
    _, page = report(folder.parent, folders=[folder])
    pictures = re.findall(r'<img src="(data:image/png[^"]+)"', page)
    assert pictures
    shutil.rmtree(data)
    _, from_source = report(folder.parent, folders=[folder])
    assert re.findall(r'<img src="(data:image/png[^"]+)"', from_source) == pictures


def test_an_image_that_cannot_be_read_costs_its_picture_alone(trained, monkeypatch):
    def damaged(data, labels):
        def image(index):
            raise ValueError("damaged: it has no end")

        return image

    monkeypatch.setattr("fastlt.report.sections.test_images", damaged)
    code, page = report(trained[0].parent, folders=[trained[0]])
    assert code == 0
    assert "damaged: it has no end" in page
    assert "These images" in page


def test_a_run_of_an_earlier_version_has_the_values_of_classes_in_its_log(trained):
    folder, _ = trained
    run = open_run(folder)
    lines = [json.loads(line) for line in log_file(folder).read_text().splitlines()]
    records = iter(run.history)
    for line in lines:
        if line["kind"] == "evaluation":
            values = next(records).values
            line["per_class_accuracy"] = values["accuracy"].tolist()
            line["weight"] = values["weight"].tolist()
    log_file(folder).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "class_history.npy").unlink()
    old = Group([open_run(folder)])
    for name in ("accuracy", "weight"):
        now, before = class_history(old, name), class_history(Group([run]), name)
        assert now is not None
        assert before is not None
        assert np.array_equal(now[1], before[1])
