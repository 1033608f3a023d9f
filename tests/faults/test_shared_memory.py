"""A small /dev/shm, as containers have it: every command works with it, or ends soon with a sentence that names it."""

from __future__ import annotations

import json
import subprocess
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Sandbox, can_mount, sandbox

from loaders.readers import BACKENDS

pytestmark = pytest.mark.skipif(not can_mount(), reason="needs root: mounts a small /dev/shm in a namespace of its own")

SIZES = ["1m", "64k", "4k"]  # a batch has 2.3 MB
ENDS_S = 120.0  # a whole run takes 20 s
DATA = {"source": "image_folder", "image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "meta_per_class": 3}
CROPS = {"train_crop": "none", "eval_crop": "center"}
STAGE = {"method": "plain", "iterations": 6, "batch_size": 192, "lr": 0.05, "evaluate_every": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """An image folder of two classes, 64x64."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 20)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def converted(images, tmp_path_factory) -> Path:
    """The image folder in both formats, as JPEG files, which all loaders read."""
    folder = tmp_path_factory.mktemp("converted")
    with sandbox(folder / "sandbox") as box:
        words = ["image_folder", "--root", images, "--out", folder / "both", "--meta-per-class", 3, "--quiet"]
        assert box.run("convert", *words, "--mode", "jpg", "--format", "both") == 0, box.output
    return folder / "both"


def problems_of(box: Sandbox, words: list[object]) -> list[str]:
    """What is wrong with the end of a command: it may succeed, or be refused with a sentence on shared memory."""
    began = time.monotonic()
    try:
        code = box.run(*words, timeout_s=ENDS_S)
    except subprocess.TimeoutExpired:
        return [f"does not end within {ENDS_S:.0f} s: {box.output[-400:]}"]
    found = [f"left {left}" for left in box.leftovers()]
    if code != 0:
        last = box.output.strip().splitlines()[-1]
        if code not in (1, 2) or "Traceback" in box.output or "/dev/shm" not in last:
            found.append(f"exit code {code} after {time.monotonic() - began:.0f} s: {box.output[-1000:]}")
    return found


@pytest.mark.faults
@pytest.mark.parametrize("loader", BACKENDS)
def test_training_with_a_small_shared_memory(loader, images, converted, tmp_path, report_figure):
    """Of converted images, and of an image folder where the loader reads one."""
    problems, ends = [], []
    for size, convert in product(SIZES, [True] if BACKENDS[loader].needs_conversion else [True, False]):
        folder = tmp_path / f"{size}_{convert}"
        where = {"root": str(images), "converted": str(converted) if convert else None, "convert": convert}
        recipe = {
            "name": "small",
            "data": {**DATA, **CROPS, **where, "loader": loader, "num_workers": 2},
            "model": {"name": "cifar_resnet8"},
            "stages": {"end_to_end": STAGE},
            "num_threads": 1,
            "runs": str(folder / "runs"),
        }
        with sandbox(folder / "sandbox", size) as box:
            (folder / "small.yaml").write_text(json.dumps(recipe))
            found = problems_of(box, ["train", folder / "small.yaml"])
        ends.append("trained" if (folder / "runs" / "small" / "result.json").exists() else "refused")
        problems += [f"{loader}, {size}, convert: {convert}: {problem}" for problem in found]
    report_figure(f"{SIZES}: {ends}, {len(problems)} problems")
    assert not problems, "\n".join(problems)


@pytest.mark.faults
def test_converting_with_a_small_shared_memory(images, tmp_path, report_figure):
    problems, ends = [], []
    for size in SIZES:
        out = tmp_path / size
        words = ["convert", "image_folder", "--root", images, "--out", out, "--meta-per-class", 3, "--quiet"]
        with sandbox(tmp_path / f"sandbox_{size}", size) as box:
            found = problems_of(box, [*words, "--format", "both"])
            ends.append("converted" if out.exists() else "refused")
            problems += [f"{size}: {problem}" for problem in found]
    report_figure(f"{SIZES}: {ends}, {len(problems)} problems")
    assert not problems, "\n".join(problems)
