"""Checkpoints in the background: training goes on, what is written is the state of then, and errors stop the run."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import OrderedDict

import pytest
import torch
from short_runs import RECIPE, make

from fastlt.recipe import load_recipe
from fastlt.run import checkpoint
from fastlt.run.atomic_file import RunFileError, write_atomically
from fastlt.run.background import BackgroundSaves, on_host
from fastlt.run.trainer import Trainer
from fastlt.train import main


@pytest.fixture
def gate(monkeypatch):
    """Nothing is written before `gate.set()`."""
    gate, save = threading.Event(), checkpoint.save

    def slow(*arguments, **options):
        assert gate.wait(timeout=30)
        save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    yield gate
    gate.set()


@pytest.fixture
def saves():
    saves = BackgroundSaves()
    yield saves
    saves.close()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_save_returns_at_once_and_writes_the_state_of_then(gate, saves, tmp_path):
    path, weights, said = tmp_path / "last.pt", torch.arange(4.0), []
    state = {"weights": weights, "list": [1]}
    saves.save(path, state, keep=1, then=lambda: said.append(path.exists()))
    weights.zero_()
    state["list"].append(2)
    assert not path.exists()
    assert said == []
    gate.set()
    saves.finish()
    assert said == [True]
    assert checkpoint.load(path)["weights"].tolist() == [0, 1, 2, 3]
    assert checkpoint.load(path)["list"] == [1]


def test_files_are_written_in_their_order_and_a_path_has_one_copy_at_a_time(gate, saves, tmp_path):
    for name in ("best.pt", "last.pt"):
        saves.save(tmp_path / name, {"n": 1}, keep=1)
    third = threading.Thread(target=lambda: saves.save(tmp_path / "best.pt", {"n": 2}, keep=2))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "the copy before it is not written yet"
    gate.set()
    third.join(30)
    saves.finish()
    times = [(tmp_path / name).stat().st_mtime_ns for name in ("best.pt.1", "last.pt", "best.pt")]
    assert times == sorted(times)
    assert checkpoint.load(tmp_path / "best.pt")["n"] == 2


def test_after_an_error_nothing_is_written_and_it_is_raised_once_more_by_each_call(gate, saves, tmp_path, monkeypatch):
    write_atomically(tmp_path / "last.pt", b"before")
    monkeypatch.setattr(os, "fsync", full)
    saves.save(tmp_path / "best.pt", {"n": 1}, keep=1)
    saves.save(tmp_path / "last.pt", {"n": 1}, keep=1)
    gate.set()
    with pytest.raises(RunFileError, match=r"best\.pt cannot be written: No space left on device"):
        saves.finish()
    monkeypatch.undo()
    with pytest.raises(RunFileError, match=r"best\.pt cannot be written"):
        saves.save(tmp_path / "last.pt", {"n": 2}, keep=1)
    assert (tmp_path / "last.pt").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_an_error_that_nobody_asked_for_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", full)
    saves = BackgroundSaves()
    saves.save(tmp_path / "last.pt", {"n": 1}, keep=1)
    saves.close()
    assert "last.pt cannot be written" in caplog.text


def test_a_copy_keeps_classes_layouts_and_values():
    channels_last = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    module = torch.nn.BatchNorm2d(3).state_dict()
    state = {"images": channels_last, "module": module, "pair": (torch.ones(1), 2), "none": None}
    copied = on_host(state)
    assert torch.equal(copied["images"], channels_last)
    assert copied["images"].stride() == channels_last.stride()
    assert copied["images"].data_ptr() != channels_last.data_ptr()
    assert isinstance(copied["module"], OrderedDict)
    assert copied["module"]._metadata == module._metadata
    assert copied["module"]["weight"].data_ptr() != module["weight"].data_ptr()
    assert copied["pair"][1] == 2
    assert copied["none"] is None


def test_a_copy_takes_the_memory_of_the_one_before_where_forms_agree():
    state = {"a": torch.ones(3), "list": [torch.ones(2), torch.zeros(1)], "b": torch.ones(4)}
    first = on_host(state)
    kept = first["a"].data_ptr(), first["list"][0].data_ptr(), first["b"].data_ptr()
    changed = {"a": 2 * torch.ones(3), "list": [torch.zeros(2), torch.ones(1)], "b": torch.ones(5), "c": torch.ones(1)}
    second = on_host(changed, first)
    assert (second["a"].data_ptr(), second["list"][0].data_ptr()) == kept[:2]
    assert second["b"].data_ptr() != kept[2]
    assert [second["a"].tolist(), second["list"][0].tolist(), second["b"].tolist()] == [[2] * 3, [0] * 2, [1] * 5]
    assert second["c"].tolist() == [1]
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not on_host(parameter, second["a"]).requires_grad


def after_each(trainer, call):
    """Let `call(iteration)` be made after every iteration."""
    compiled = trainer.compiled

    def patched(stage, batch, meta_batch):
        iterate = compiled(stage, batch, meta_batch)

        def run(*batches):
            output = iterate(*batches)
            call(trainer.progress.done + 1)
            return output

        return run

    trainer.compiled = patched


def test_a_run_trains_on_while_a_checkpoint_is_written(digits_words, gate):
    trainer, seen = make(digits_words), []

    def call(iteration):
        if iteration == 10:
            seen.append((trainer.folder / "checkpoints" / "last.pt").exists())
            gate.set()

    after_each(trainer, call)
    result = trainer.fit()
    assert seen == [False], "the checkpoint of iteration 6 was written before iteration 10"
    assert result["selected_iteration"] == 12
    assert checkpoint.load(trainer.folder / "checkpoints" / "last.pt.1")["progress"]["iteration"] == 6


def test_an_error_of_the_writer_stops_the_run_at_the_next_iteration(digits_words, monkeypatch, capsys):
    reached = []

    def fit(self, fit=Trainer.fit):
        def call(iteration):
            reached.append(iteration)
            if iteration == 7:  # the checkpoint of iteration 6 is being written
                for save in list(self.checkpoints.background._saves.values()):
                    save.result()

        after_each(self, call)
        return fit(self)

    fsync = os.fsync

    def full_for_last(descriptor):
        full() if "/last.pt." in os.readlink(f"/proc/self/fd/{descriptor}") else fsync(descriptor)

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr(os, "fsync", full_for_last)
    assert main([str(RECIPE), *digits_words, "name=full"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt: ")]
    assert "last.pt cannot be written: No space left on device" in error
    assert error.endswith("give the same command again")
    assert reached == list(range(1, 8))
    folder = load_recipe(RECIPE, [*digits_words, "name=full"]).folder
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert max(line["iteration"] for line in lines) == 7
