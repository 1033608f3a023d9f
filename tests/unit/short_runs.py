"""Runs of a few iterations on digits: made, stopped, and compared bit for bit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
STAGE = "stages.end_to_end"


def make(words, *more):
    return Trainer(prepare(load_recipe(RECIPE, [*words, *more])))


def final_state(folder):
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    del state["recipe"]["name"]
    return state


def assert_same(one, other, where=""):
    """Equal bit for bit, through containers."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def comparable(folder):
    """The final state of a run without the times it took."""
    state = final_state(folder)
    for key in ("train_s", "wait_s", "aside_s"):
        del state["progress"][key]
    return state


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_after(trainer, iterations):
    """Let the trainer receive a stop signal once it has done so many iterations."""
    count = trainer._log_training

    def stop(*arguments):
        count(*arguments)
        if trainer.progress.done == iterations:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._log_training = stop
    return trainer
