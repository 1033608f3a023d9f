"""Damaged .beton files and shards in every loader: refused, or read as they are, and never a crash or a hang.

A child process reads each damaged file. What is damaged outside of the pixels must be refused, or must not matter: the
images are those of the whole file. Damage within an image's own bytes may show as other pixels; the content checksums
of a converted data set tell of that, and loaders do not.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from small_betons import SmallDataset, mixed_shapes, needs_dali, needs_ffcv, write_small

from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.stored.beton import ALLOCATION, FIELD, HEADER, SAMPLE
from loaders.stored.forked_workers import describe_exit
from loaders.stored.tar_shards import COLUMNS

IMAGES = 11
LATEST_S = 60.0  # for one damaged file in one loader
EVALUATION = {"batch_size": 4, "device": "cpu", "train": False, "crop": CropSpec("center", 24)}
READERS = {"raw": ("torch", "resident", "ffcv"), "jpg": ("torch", "resident", "ffcv", "resident_jpeg")}
SHARD_READERS = ("torch", "resident", "dali", "resident_jpeg")
ODD = (0, 1, 2, 7, 255, 256, 65_535, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
PIXELS = "pixels"  # damage that may be seen in an image


@dataclass(frozen=True)
class Whole:
    """A small data set, what its readers give, and the damage that it may suffer."""

    dataset: SmallDataset
    readers: tuple[str, ...]
    damage: Callable[[Path, random.Random], str]
    expected: dict[str, list[np.ndarray]]


@needs_ffcv
@needs_dali
@pytest.mark.faults
def test_damaged_files_are_refused_or_read_as_they_are(tmp_path, rounds, fault_seed, report_figure):
    rng, outcomes, wrong = random.Random(fault_seed), Counter(), []
    wholes = [whole_beton(tmp_path, "raw"), whole_beton(tmp_path, "jpg"), whole_shards(tmp_path)]
    total = rounds(700)
    for number in range(total):
        whole = wholes[number % len(wholes)]
        folder = tmp_path / "damaged"
        shutil.copytree(whole.dataset.path.parent, folder)
        what = whole.damage(folder, rng)
        damaged = replace(whole.dataset, path=folder / whole.dataset.path.name)
        for reader, outcome in read_in_child(damaged, whole).items():
            outcomes[outcome] += 1
            if not (outcome in ("refused", "the same images") or (outcome == "other pixels" and what == PIXELS)):
                wrong.append(f"round {number}, {whole.dataset.path.parent.name}, {reader}: {what}: {outcome}")
        shutil.rmtree(folder)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    report_figure(f"{total} damaged files in their loaders: {counts}; {len(wrong)} wrong")
    assert wrong == []


def whole_beton(folder: Path, mode: str) -> Whole:
    path = folder / mode / "train.beton"
    path.parent.mkdir()
    dataset = replace(write_small(path, mixed_shapes(IMAGES), mode), formats=("ffcv",))
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other)
    return Whole(dataset, READERS[mode], damage_beton, expected(dataset, READERS[mode]))


def whole_shards(folder: Path) -> Whole:
    path = folder / "shards" / "train.beton"
    path.parent.mkdir()
    dataset = replace(write_small(path, mixed_shapes(IMAGES), "jpg"), formats=("dali",))
    path.unlink()
    return Whole(dataset, SHARD_READERS, damage_shards, expected(dataset, SHARD_READERS))


def expected(dataset: SmallDataset, readers: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    """What each reader gives of the whole file; what they compile is there for the children afterwards."""
    return {reader: read(dataset, reader) for reader in readers}


def read(dataset: SmallDataset, reader: str) -> list[np.ndarray]:
    loader = make_loader(dataset, "train", backend=reader, num_workers=0 if reader == "torch" else 1, **EVALUATION)
    try:
        return [part.numpy() for batch in loader.epoch(0) for part in (batch.images, batch.labels)]
    finally:
        loader.close()


def read_in_child(dataset: SmallDataset, whole: Whole) -> dict[str, str]:
    """By reader, how reading ended: in "refused", "the same images", "other pixels", or in what must not be."""
    context = multiprocessing.get_context("fork")  # everything is imported and compiled already
    found = {}
    for reader in whole.readers:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, dataset, reader, whole.expected[reader]))
        process.start()
        theirs.close()
        try:
            found[reader] = ours.recv() if ours.poll(LATEST_S) else f"no end after {LATEST_S:.0f} s"
        except EOFError:
            process.join()
            found[reader] = f"crashed ({describe_exit(process.exitcode)})"
        process.kill()
        process.join()
    return found


def _child(answer: Connection, dataset: SmallDataset, reader: str, expected: list[np.ndarray]) -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest would print a traceback
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        given = read(dataset, reader)
    except ValueError as error:
        outcome = "refused" if str(dataset.path.parent) in str(error) else f"refused without its path: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    else:
        same = len(given) == len(expected) and all(map(np.array_equal, given, expected))
        shapes = [part.shape for part in given] == [part.shape for part in expected]
        outcome = "the same images" if same else "other pixels" if shapes else "other batches"
    answer.send(outcome)
    answer.close()
    time.sleep(LATEST_S)  # the parent kills it: what DALI does at its end is not in question


def damage_beton(folder: Path, rng: random.Random) -> str:
    """Damage the file in one place, or cut it; returns what was done, PIXELS when an image may show it."""
    path = folder / "train.beton"
    data = bytearray(path.read_bytes())
    whole = bytes(data)
    header = np.frombuffer(whole, HEADER, 1)[0]
    records, table = HEADER.itemsize + 2 * FIELD.itemsize, int(header["allocation_table"])
    places = {
        "header": (HEADER, 0),
        "sample": (SAMPLE, records + rng.randrange(IMAGES) * SAMPLE.itemsize),
        "allocation": (ALLOCATION, table + rng.randrange(IMAGES) * ALLOCATION.itemsize),
    }
    kind = rng.choice(["field"] * 5 + ["byte", "byte", "pixels", "pixels", "cut"])
    if kind == "field":
        where = rng.choice(list(places))
        dtype, start = places[where]
        name, offset, size = rng.choice(_fields(dtype))
        old = int.from_bytes(data[start + offset : start + offset + size], "little")
        new = rng.choice([old + 1, old - 1, 2 * old, old // 2, rng.getrandbits(8 * size), *ODD]) % 2 ** (8 * size)
        data[start + offset : start + offset + size] = new.to_bytes(size, "little")
        what = f"{where}.{name} {old} -> {new}"
    elif kind == "cut":
        length = rng.choice(
            [rng.randrange(len(data)), rng.randrange(records + IMAGES * SAMPLE.itemsize), len(data) - 1]
        )
        del data[length:]
        what = f"cut to {length} bytes"
    else:
        meta = [*range(records + IMAGES * SAMPLE.itemsize), *range(table, len(data))]
        allocations = np.frombuffer(whole, ALLOCATION, IMAGES, table)
        image = allocations[rng.randrange(IMAGES)]
        within = int(image["data_ptr"]) + rng.randrange(min(int(image["size"]), rng.choice([200, 10**9])))
        at = within if kind == "pixels" else rng.choice(meta)
        old = data[at]
        data[at] ^= 1 << rng.randrange(8)
        what = PIXELS if kind == "pixels" else f"byte {at}: {old} -> {data[at]}"
    path.write_bytes(data)
    return what


def damage_shards(folder: Path, rng: random.Random) -> str:
    """As `damage_beton`, of the index, whole or value by value, or of the tar file."""
    index, tar = folder / "dali" / "train.npz", folder / "dali" / "train-00000.tar"
    kind = rng.choice(["column", "column", "column", "index", "pixels", "pixels", "cut"])
    if kind == "column":
        with np.load(index) as arrays:
            columns = {name: arrays[name].copy() for name in COLUMNS}
        name = rng.choice(COLUMNS)
        at = rng.randrange(len(columns[name]))
        old = int(columns[name][at])
        new = rng.choice([old + 1, old - 1, 2 * old, -old, rng.getrandbits(62), *ODD[:10]])
        columns[name][at] = new
        np.savez(index, **columns)
        return f"index {name}[{at}] {old} -> {new}"
    path = tar if kind == "pixels" else index if kind == "index" else rng.choice([tar, index])
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    # The end of a tar file is no image's: cut there, it may be read as before.
    return PIXELS if kind == "pixels" else f"{kind} of {path.name}, {len(data)} bytes"


def _fields(dtype: np.dtype, prefix: str = "", start: int = 0) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of every number in a record."""
    found = []
    for name in dtype.names or ():
        field, offset = dtype.fields[name][:2]
        if field.names:
            found += _fields(field, f"{prefix}{name}.", start + offset)
        else:
            found.append((prefix + name, start + offset, field.itemsize))
    return found
