"""Runs on a small disk that becomes full at any moment: one message, nothing lost, and the same result afterwards."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastlt.recipe import load_recipe
from fastlt.run import checkpoint
from fastlt.run.folder import last_checkpoint, versions
from fastlt.train import main

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
STAGE = "stages.end_to_end"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 32 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def words(digits, runs):
    return [
        *(str(RECIPE), f"data.converted={digits}", f"runs={runs}", "data.loader=resident", "num_threads=1"),
        *("log_every=1", f"{STAGE}.iterations=12", f"{STAGE}.warmup=2", f"{STAGE}.evaluate_every=3"),
    ]


def final_weights(folder):
    return checkpoint.load(last_checkpoint(folder))["step"]["model"]


@pytest.mark.faults
def test_a_run_survives_a_disk_that_fills(digits, small_disk, tmp_path, rounds, fault_seed, report_figure, capsys):
    """A filler leaves a random room, smaller than a run needs; it goes, and the same command ends with the same run."""
    assert main([*words(digits, tmp_path), "name=whole"]) == 0
    whole = tmp_path / "whole"
    size = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    draw, count, full = random.Random(fault_seed), rounds(40), 0
    recipe = load_recipe(RECIPE, words(digits, small_disk / "runs")[1:])
    for number in range(count):
        shutil.rmtree(small_disk / "runs", ignore_errors=True)
        room = draw.randrange(4096, size + size // 2)
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(free - room))
        capsys.readouterr()
        code = main(words(digits, small_disk / "runs"))
        error = capsys.readouterr().err
        assert code in (0, 2), f"{number}, {room} bytes of room: code {code}\n{error}"
        (small_disk / "filler").unlink()
        if code == 2:
            full += 1
            (message,) = [line for line in error.splitlines() if line.startswith("fastlt: ")]
            assert "No space left on device" in message, message
            assert not list(small_disk.rglob("*.part"))
            for kept in (recipe.folder / "checkpoints").glob("*.pt*"):
                checkpoint.load(kept)
            assert main(words(digits, small_disk / "runs")) == 0
        one, other = final_weights(whole), final_weights(recipe.folder)
        assert all(torch.equal(one[name], other[name]) for name in one), f"{number}, {room} bytes of room"
        assert versions(last_checkpoint(recipe.folder)).keys() == {0, 1}
    report_figure(f"{count} runs, {full} stopped by the full disk, 0 differences")
    assert full > count // 4
