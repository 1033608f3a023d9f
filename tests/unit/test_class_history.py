"""The file of every class's accuracy, weight and difficulty: what a kill, damage and a resumed run leave of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from short_runs import RECIPE, stop_after

from fastlt.recipe import load_recipe
from fastlt.run.class_history import ClassHistory, read_class_history
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer


@pytest.fixture
def path(tmp_path):
    """A history of iterations 1 to 5, three classes each; the second stage has no weights."""
    history = ClassHistory(tmp_path / "class_history.npy", enabled=True)
    history.open(0)
    for iteration in range(1, 6):
        weight = {"weight": np.full(3, iteration)} if iteration < 4 else {}
        history.write(iteration, "first" if iteration < 4 else "second", {"accuracy": [0.5, None, 0.25], **weight})
    history.close()
    return history.path


def iterations(path):
    records, broken = read_class_history(path)
    return [record.iteration for record in records], broken


def test_what_was_written_is_read(path):
    records, broken = read_class_history(path)
    assert not broken
    assert [(r.iteration, r.stage) for r in records] == [
        *((i, "first") for i in (1, 2, 3)),
        (4, "second"),
        (5, "second"),
    ]
    assert np.array_equal(records[0].values["accuracy"], np.float32([0.5, np.nan, 0.25]), equal_nan=True)
    assert records[1].values["weight"].tolist() == [2, 2, 2]
    assert "weight" not in records[4].values


def test_a_record_that_a_kill_left_without_an_end_is_passed_over(path):
    whole = path.read_bytes()
    for missing in (1, 20, 60, 100):
        path.write_bytes(whole[:-missing])
        assert iterations(path) == ([1, 2, 3, 4], "")


def test_damage_is_named_and_what_lies_before_it_is_kept(path, caplog):
    data = bytearray(path.read_bytes())
    second = data.find(b"\x93NUMPY", 1)
    data[second + 12] ^= 1
    path.write_bytes(data)
    found, broken = iterations(path)
    assert found == [1]
    assert broken.startswith("record 2 cannot be read")
    ClassHistory(path, enabled=True).open(5)
    assert f"{path}: record 2 cannot be read" in caplog.text
    assert iterations(path) == ([1], "")


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(path):
    history = ClassHistory(path, enabled=True)
    history.open(3)
    history.write(4, "first", {"accuracy": [0, 0, 0]})
    history.close()
    assert iterations(path) == ([1, 2, 3, 4], "")


def test_a_run_records_what_the_weights_are_made_from(digits_words):
    words = [*digits_words, "stages.end_to_end.evaluate_every=3"]
    whole = Trainer(prepare(load_recipe(RECIPE, [*words, "name=whole"])))
    whole.fit()
    records, _ = read_class_history(whole.folder / "class_history.npy")
    assert [record.iteration for record in records] == [3, 6, 9, 12]
    for record in records:
        assert set(record.values) == {"accuracy", "weight", "difficulty", "meta_accuracy"}
        difficulty = record.values["difficulty"]
        assert ((difficulty > 0) & (difficulty < 1)).all()
        assert record.values["weight"] == pytest.approx(10 * difficulty / difficulty.sum(), rel=1e-5)  # Eq. 4
    last = whole.progress.class_weights
    assert torch.equal(last, torch.from_numpy(records[-1].values["weight"]))

    stopped = stop_after(Trainer(prepare(load_recipe(RECIPE, [*words, "name=stopped"]))), 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    Trainer(prepare(load_recipe(RECIPE, [*words, "name=stopped"]))).fit()
    assert (stopped.folder / "class_history.npy").read_bytes() == (whole.folder / "class_history.npy").read_bytes()
