"""Damage all over the checkpoints of a real run: each is refused, or changes nothing that is loaded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fastlt.recipe import load_recipe
from fastlt.run import checkpoint
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from loaders.stored.damage import DamageError

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"


@pytest.fixture(scope="module")
def checkpoints(digits, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    stage = "stages.end_to_end"
    words = [f"data.converted={digits}", f"runs={runs}", "data.loader=resident", "num_threads=1"]
    words += [f"{stage}.iterations=4", f"{stage}.warmup=1", f"{stage}.evaluate_every=2"]
    trainer = Trainer(prepare(load_recipe(RECIPE, words)))
    trainer.fit()
    return trainer.folder / "checkpoints"


def same(one, other):
    """Equal in every bit, through containers."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def flip_a_bit(data, share, chance):
    data[int(share * len(data))] ^= 1 << chance.randrange(8)


def zero_a_block(data, share, chance):
    start = 512 * chance.randrange(len(data) // 512)
    data[start : start + 512] = bytes(512)


def cut(data, share, chance):
    del data[chance.randrange(len(data)) :]


def overwrite_by_another_place(data, share, chance):
    start, other = chance.randrange(len(data) - 64), chance.randrange(len(data) - 64)
    data[start : start + 64] = data[other : other + 64]


DAMAGES = {"flip": flip_a_bit, "zero": zero_a_block, "cut": cut, "overwrite": overwrite_by_another_place}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["last.pt", "best_end_to_end.pt"])
def test_damage_is_refused_or_changes_nothing(checkpoints, tmp_path, name, damage, rounds, fault_seed, report_figure):
    """Flips are spread evenly over the whole file, so that no part of it is left out; the others are at random."""
    whole = (checkpoints / name).read_bytes()
    expected = checkpoint.load(checkpoints / name)
    count, chance, path = rounds(2000), random.Random(f"{fault_seed} {name} {damage}"), tmp_path / name
    refused = 0
    for number in range(count):
        data = bytearray(whole)
        DAMAGES[damage](data, number / count, chance)
        path.write_bytes(data)
        try:
            loaded = checkpoint.load(path)
        except DamageError:
            refused += 1
        else:
            assert same(loaded, expected), f"{name}: {damage} {number} was not noticed"
    report_figure(f"{count} damages, {refused} refused, {count - refused} without effect, 0 unnoticed")
