"""A run folder has one owner at a time, and one that cannot be written to is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlt import file_lock
from fastlt.recipe import load_recipe
from fastlt.run.atomic_file import read_json
from fastlt.run.lock import lock_folder, unlock_folder
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.train import main
from loaders.stored.damage import DamageError
from loaders.stored.dataset import ConvertedDataset

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "digits_lt.yaml"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(file_lock.open_locked, "__defaults__", (0.0,))


@pytest.fixture
def other_owner(tmp_path):
    """Another process that holds the folder of the run `x` below tmp_path."""
    program = (
        "import sys, time; from pathlib import Path; from fastlt.run.lock import lock_folder; "
        "lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    folder = tmp_path / "x"
    process = subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(digits_words, tmp_path, other_owner, capsys):
    words = [*digits_words, f"runs={tmp_path}", "name=x"]
    assert main([str(RECIPE), *words]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"fastlt: {tmp_path / 'x'} is in use by process {other_owner.pid} on host ")
    assert error.endswith("wait for its end, or choose another name=...")
    assert [p.name for p in (tmp_path / "x").iterdir()] == [".lock"], "nothing was written"
    (tmp_path / "x" / "checkpoints").mkdir()
    for stale in ("result.json.4711.part", "checkpoints/last.pt.4711.part"):
        (tmp_path / "x" / stale).touch()
    other_owner.send_signal(signal.SIGKILL)
    other_owner.wait()
    prepare(load_recipe(RECIPE, words))
    assert json.loads((tmp_path / "x" / ".lock").read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "x").rglob("*.part"))
    unlock_folder(tmp_path / "x")


def test_a_finished_run_is_read_without_a_lock_and_leaves_none(digits_words, capsys):
    trainer = Trainer(prepare(load_recipe(RECIPE, digits_words)))
    assert (trainer.folder / ".lock").exists()
    trainer.fit()
    assert not (trainer.folder / ".lock").exists()
    descriptor = file_lock.open_locked(trainer.folder / ".lock")
    assert main([str(RECIPE), *digits_words]) == 0
    assert "is finished" in capsys.readouterr().out
    os.close(descriptor)


def test_a_folder_in_which_nothing_was_written_goes_with_its_lock(tmp_path):
    lock_folder(tmp_path / "runs" / "x")
    lock_folder(tmp_path / "runs" / "x")  # its own
    unlock_folder(tmp_path / "runs" / "x")
    assert list((tmp_path / "runs").iterdir()) == []


def test_who_waits_for_a_lock_that_is_removed_does_not_hold_the_removed_file(tmp_path):
    """Between opening and locking, the owner removes the file and a third makes another."""
    path = tmp_path / ".lock"
    opened = os.open(path, os.O_CREAT | os.O_RDWR)
    path.unlink()
    with path.open("w") as third:
        fcntl.flock(third, fcntl.LOCK_EX)
        assert not file_lock.is_at(opened, path)
        assert file_lock.open_locked(path) is None
    os.close(opened)


def test_a_file_system_without_locks_is_said_and_not_refused(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock_folder(tmp_path / "x")
    assert caplog.messages == [
        f"{tmp_path / 'x' / '.lock'}: its file system has no locks; do not let two processes write to {tmp_path / 'x'}"
    ]
    unlock_folder(tmp_path / "x")


def test_the_fork_of_an_owner_does_not_release_its_lock(tmp_path):
    lock_folder(tmp_path / "x")
    child = multiprocessing.get_context("fork").Process(target=unlock_folder, args=(tmp_path / "x", os.getpid()))
    child.start()
    child.join()
    assert (tmp_path / "x" / ".lock").exists()
    unlock_folder(tmp_path / "x")


def a_file(runs):
    runs.write_text("")
    return f"{runs} is a file"


def a_dangling_link(runs):
    runs.symlink_to(runs / "nowhere")
    return f"{runs} is a link to {runs / 'nowhere'}, which is not there"


def in_a_file(runs):
    runs.parent.joinpath("parent").write_text("")
    runs.symlink_to(runs.parent / "parent" / "below")
    return f"{runs} is a link to {runs.parent / 'parent' / 'below'}, which is not there"


@pytest.mark.parametrize("make_odd", [a_file, a_dangling_link, in_a_file])
def test_runs_that_are_no_folder_are_refused_before_any_data(tmp_path, make_odd):
    runs = tmp_path / "runs"
    why = make_odd(runs)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape(f"runs is '{runs}', but {why}; set runs=DIR to a folder that")):
        prepare(load_recipe(RECIPE, [f"runs={runs}", f"data.converted={tmp_path / 'data'}"]))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("number", "why"),
    [(errno.EACCES, "may not be written to"), (errno.EROFS, "cannot be written to (Read-only file system)")],
)
def test_runs_that_are_read_only_are_refused_before_any_data(tmp_path, monkeypatch, number, why):
    def denied(path, *_):
        raise OSError(number, os.strerror(number), path)

    recipe = load_recipe(RECIPE, [f"runs={tmp_path / 'runs'}", f"data.converted={tmp_path / 'data'}"])
    monkeypatch.setattr(os, "mkdir", denied)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} {why}; set runs=DIR")):
        prepare(recipe)


def test_processes_that_nothing_connects_do_not_each_train_the_run(digits_words, tmp_path, monkeypatch, capsys):
    """As two that `--multi_gpu` starts on a machine without a GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main([str(RECIPE), *digits_words]) == 2
    assert "2 processes were started, but torch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_runs_with_a_name_that_is_too_long_are_refused_by_the_key(tmp_path):
    runs = tmp_path / ("a" * 300)
    with pytest.raises(ValueError, match=r"^runs is .*, but .* cannot be written to \(File name too long\); set runs="):
        prepare(load_recipe(RECIPE, [f"runs={runs}", f"data.converted={tmp_path / 'data'}"]))


def test_a_result_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ValueError, match=r"result\.json cannot be read: Permission denied"):
        read_json(tmp_path / "result.json")


@pytest.mark.parametrize("name", ["labels.npz", "train.beton"])
def test_data_that_may_not_be_read_are_not_called_damaged(digits, monkeypatch, name):
    where, target = (np, "load") if name == "labels.npz" else (Path, "open")
    call = getattr(where, target)

    def denied(path, *arguments, **more):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return call(path, *arguments, **more)

    monkeypatch.setattr(where, target, denied)
    dataset = ConvertedDataset.open(digits)
    read = {"labels.npz": lambda: dataset.labels("train"), "train.beton": lambda: dataset.stored("train", "ffcv")}
    with pytest.raises(ValueError, match=f"{name} cannot be read: Permission denied") as refusal:
        read[name]()
    assert not isinstance(refusal.value, DamageError)
