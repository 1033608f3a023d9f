"""The checkpoints of a run: damage is noticed, an earlier one serves, and a kill leaves a whole one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from short_runs import RECIPE, make

from fastlt.recipe import load_recipe
from fastlt.run import checkpoint
from fastlt.run.atomic_file import RunFileError, write_atomically
from fastlt.run.folder import versions
from fastlt.run.log import RunLog
from fastlt.run.stopping import Interrupted
from fastlt.train import main
from loaders.stored.damage import DamageError


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def damage(path):
    """Flip a bit in the middle, which is in the weights."""
    flip(path, path.stat().st_size // 2)


def leaves(state, where=""):
    """Every value of a checkpoint by its place, tensors as their bytes; the clock and the run's name are left out."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, one in items for k, v in leaves(one, f"{where}.{key}").items()}
    if where.endswith(("train_s", "wait_s")) or ".aside_s" in where or where == ".recipe.name":
        return {}
    return {where: (state.dtype, state.numpy().tobytes()) if isinstance(state, torch.Tensor) else state}


# Of one file


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    """Every 7th byte of a small checkpoint, headers and directory of the archive among them, a bit each."""
    path = tmp_path / "last.pt"
    state = {"weights": torch.arange(200.0), "n": 3, "nested": {"moments": torch.randn(5, 5)}}
    checkpoint.save(path, state)
    refused = 0
    for position in range(0, path.stat().st_size, 7):
        flip(path, position, position % 8)
        try:
            assert leaves(checkpoint.load(path)) == leaves(state), position
        except DamageError:
            refused += 1
        flip(path, position, position % 8)
    assert leaves(checkpoint.load(path)) == leaves(state)
    assert refused > 100


def test_torch_alone_does_not_notice(tmp_path):
    """Why the checksums are compared here; without that bit of work this file would load as it is."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"weights": torch.zeros(1000)})
    damage(path)
    assert torch.load(path, weights_only=True)["weights"].count_nonzero() == 1
    with pytest.raises(DamageError, match=r"last\.pt is damaged \(BadZipFile: the checksum of .*data/0 is wrong\)"):
        checkpoint.load(path)


def test_links_pipes_and_devices_stay_what_they_are(tmp_path):
    """`--csv /dev/null` must not put a file in the place of the device."""
    there = tmp_path / "elsewhere" / "file.csv"
    there.parent.mkdir()
    there.write_bytes(b"old")
    (tmp_path / "link").symlink_to(there)
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert there.read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    out, into = os.pipe()  # a pipe of a shell has a name that leads nowhere, as behind /dev/stdout
    write_atomically(Path(f"/proc/self/fd/{into}"), b"on")
    assert os.read(out, 100) == b"on"
    os.close(out), os.close(into)
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunFileError, match="Is a directory"):
        write_atomically(tmp_path / "folder", b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "folder", "link", "pipe"]


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {})

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ValueError, match=r"last\.pt cannot be read: Permission denied") as refusal:
        checkpoint.load_newest(path)
    assert not isinstance(refusal.value, DamageError)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    path = tmp_path / "last.pt"
    for n in range(6):
        checkpoint.save(path, {"n": n}, keep=keep)
    assert [checkpoint.load(p)["n"] for p in versions(path).values()] == [5, 4, 3, 2][:keep]
    checkpoint.save(path, {"n": 6}, keep=2)
    assert [checkpoint.load(p)["n"] for p in versions(path).values()] == [6, 5]
    assert len(list(tmp_path.iterdir())) == 2


class Killed(BaseException):
    """Stands for the end of the process: nothing that follows is done."""


class Steps:
    """Counts the calls that change a folder, and lets a process make `allowed` of them."""

    def __init__(self, monkeypatch, allowed):
        self.done, self.allowed = 0, allowed
        for name in ("rename", "replace", "link", "unlink", "remove"):
            monkeypatch.setattr(os, name, partial(self.call, getattr(os, name)))

    def call(self, function, *arguments, **options):
        if self.done == self.allowed:
            raise Killed
        self.done += 1
        return function(*arguments, **options)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_kill_between_any_two_steps_of_a_save_leaves_the_newest_whole_one(tmp_path, monkeypatch, keep):
    for allowed in range(20):
        path = tmp_path / str(allowed) / "last.pt"
        for n in range(4):
            checkpoint.save(path, {"n": n}, keep=keep)
        with monkeypatch.context() as patched:
            steps = Steps(patched, allowed)
            with contextlib.suppress(Killed):
                checkpoint.save(path, {"n": 4}, keep=keep)
        found, state = checkpoint.load_newest(path)
        assert found == path
        assert state["n"] in (3, 4)
        if steps.done < allowed:
            assert state["n"] == 4
            return
    raise AssertionError("a save has more steps than this test tries")


def test_a_file_system_without_links_keeps_earlier_ones_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    for n in range(3):
        checkpoint.save(tmp_path / "last.pt", {"n": n}, keep=2)
    assert [checkpoint.load(p)["n"] for p in versions(tmp_path / "last.pt").values()] == [2, 1]


# On a full disk


@contextlib.contextmanager
def files_up_to(size):
    """No file can be longer: writing then fails in the kernel, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 20_000, 41_000])
def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before(tmp_path, room):
    path = tmp_path / "last.pt"
    for n in range(2):
        checkpoint.save(path, {"n": n}, keep=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    word = r"last\.pt cannot be written: File too large for its file system, or for `ulimit -f`\. .* raise the limit"
    with files_up_to(room), pytest.raises(RunFileError, match=word):
        checkpoint.save(path, {"weights": torch.zeros(10_000)}, keep=2)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=123_456))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFileError) as error:
        checkpoint.save(tmp_path / "last.pt", {"weights": torch.zeros(1_000_000)})
    message = str(error.value)
    assert (
        "last.pt cannot be written: No space left on device (3.8 MiB needed, 0.1 MiB free). What was saved" in message
    )
    assert message.endswith("before is whole: make room, and give the same command again")


def test_a_file_system_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(RunFileError, match="cannot be written: Read-only file system"):
        write_atomically(tmp_path / "result.json", b"{}")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_that_cannot_be_written_says_so_and_closes(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", enabled=True)
    log.open(0)
    log.write("train", 1, loss=1.0)
    with files_up_to(100), pytest.raises(RunFileError, match=r"log\.jsonl cannot be written"):
        log.write("train", 2, loss="x" * 500)
    with files_up_to(100):
        log.close()
    log.open(1)
    log.write("train", 2, loss=2.0)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [1.0, 2.0]


# Of a run


def stopped_at(words, name, iteration):
    """A run that saved its last checkpoint after so many iterations, and one before it."""
    trainer = make(words, f"name={name}")
    agreed = trainer.stopping.agreed
    trainer.stopping.agreed = lambda *a, **k: (15, False) if trainer.progress.done == iteration else agreed(*a, **k)
    with pytest.raises(Interrupted):
        trainer.fit()
    return trainer.folder / "checkpoints"


def finished(words, name):
    trainer = make(words, f"name={name}")
    result = trainer.fit()
    return result, leaves(checkpoint.load(trainer.folder / "checkpoints" / "last.pt"))


CLOCK = ("name", "train_s", "img_s", "data_wait_share", "aside_s")


def without_clock(result):
    return {key: value for key, value in result.items() if key not in CLOCK}


@pytest.mark.parametrize("damaged", ["last.pt", "best_end_to_end.pt"])
def test_a_damaged_checkpoint_is_named_kept_and_the_one_before_it_serves(digits_words, caplog, damaged):
    """The best is newer than the checkpoint that training goes on from then, and is made again."""
    words = [*digits_words, "stages.end_to_end.evaluate_every=3"]
    result, state = finished(words, "whole")
    checkpoints = stopped_at(words, "stopped", 8)
    damage(checkpoints / damaged)
    bad = (checkpoints / damaged).read_bytes()
    again, state_again = finished(words, "stopped")
    (warning,) = {record.getMessage() for record in caplog.records}
    assert warning.startswith(f"{checkpoints / damaged} is damaged (BadZipFile: the checksum of ")
    assert f"kept as {damaged}.damaged-1; taking {damaged}.1 instead, which was saved before" in warning
    assert (checkpoints / f"{damaged}.damaged-1").read_bytes() == bad
    if damaged == "last.pt":
        assert state_again == state
        assert without_clock(again) == without_clock(result)


def test_a_best_that_is_not_made_again_is_an_earlier_one(digits_words, caplog):
    words = [*digits_words, "stages.end_to_end.evaluate_every=3", "stages.end_to_end.select=best"]
    checkpoints = stopped_at(words, "run", 12)
    best = checkpoints / "best_end_to_end.pt"
    checkpoint.save(best, {**checkpoint.load(best), "top1": 0.99, "score": 0.99, "iteration": 12}, keep=2)
    earlier = checkpoint.load(checkpoints / "best_end_to_end.pt.1")
    damage(best)
    result, _ = finished(words, "run")
    assert (result["selected_iteration"], result["validation_top1"]) == (earlier["iteration"], earlier["top1"])
    assert "taking best_end_to_end.pt.1 instead" in caplog.text


def test_a_run_without_a_whole_checkpoint_is_refused_and_loses_nothing(digits_words, capsys):
    checkpoints = stopped_at(digits_words, "run", 8)
    for name in ("last.pt", "last.pt.1"):
        (checkpoints / name).write_bytes((checkpoints / name).read_bytes()[:1000])
    before = {p.name: p.read_bytes() for p in checkpoints.iterdir()}
    assert main([str(RECIPE), *digits_words, "name=run"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt: ")]
    assert "last.pt is damaged" in error
    assert "last.pt.1 is damaged" in error
    assert "choose another name=..." in error
    assert "delete" not in error
    assert {p.name: p.read_bytes() for p in checkpoints.iterdir()} == before


def test_a_lost_best_is_replaced_by_the_next_evaluation(digits_words, caplog):
    checkpoints = stopped_at(digits_words, "run", 8)
    for best in versions(checkpoints / "best_end_to_end.pt").values():
        damage(best)
    result, _ = finished(digits_words, "run")
    assert result["selected_iteration"] == 12
    assert "best_end_to_end.pt is damaged" in caplog.text
    assert json.loads((checkpoints.parent / "result.json").read_text()) == result


@pytest.mark.parametrize("name", ["recipe.yaml", "last.pt", "result.json"])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(digits_words, monkeypatch, capsys, name):
    result, state = finished(digits_words, "whole")
    fsync = os.fsync

    def full_for_the_file(descriptor):
        full() if f"/{name}." in os.readlink(f"/proc/self/fd/{descriptor}") else fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_for_the_file)
        assert main([str(RECIPE), *digits_words, "name=full"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt: ")]
    assert f"{name} cannot be written: No space left on device" in error
    folder = load_recipe(RECIPE, [*digits_words, "name=full"]).folder
    assert not list(folder.rglob("*.part"))
    again, state_again = finished(digits_words, "full")
    assert state_again == state
    assert without_clock(again) == without_clock(result)
