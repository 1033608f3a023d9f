"""A run whose numbers become infinite or NaN: it ends with an error, keeps none of them, and can be gone on with."""

from __future__ import annotations

import json
import math

import pytest
import torch
from short_runs import RECIPE, STAGE, make

from fastlt import strict_json
from fastlt.device.distributed import Reducer
from fastlt.recipe import load_recipe
from fastlt.run import checkpoint
from fastlt.run.divergence import recorded_divergence
from fastlt.run.finite import not_finite
from fastlt.train import main

CPU = torch.device("cpu")


def spoil_after(trainer, iteration, spoil):
    """Let `spoil(step)` change the state once an iteration is done, as the optimizer's step would."""
    compiled = trainer.compiled

    def patched(stage, batch, meta_batch):
        iterate = compiled(stage, batch, meta_batch)

        def run(*batches):
            output = iterate(*batches)
            if trainer.progress.done + 1 == iteration:
                with torch.no_grad():
                    spoil(stage.step)
            return output

        return run

    trainer.compiled = patched
    return trainer


def first(values):
    return next(iter(values))


def weights(step):
    first(step.model.parameters())[0] = math.nan


def variances(step):
    first(b for name, b in step.model.named_buffers() if name.endswith("running_var"))[0] = math.inf


def moments(step):
    first(step.optimizer.state.values())["momentum_buffer"][0] = -math.inf


def difficulty_net(step):
    first(step.net.parameters())[0] = math.nan


def moments_of_the_net(step):
    first(step.net_optimizer.state.values())["exp_avg_sq"][0] = math.inf


def assert_finite(folder):
    for file in (folder / "checkpoints").iterdir():
        assert not not_finite(checkpoint.load(file), Reducer(), CPU), file


# In the last iteration nothing but the state itself shows it: its loss was computed before.
@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        (weights, r"model\.backbone\.\S+weight"),
        (variances, r"model\.backbone\.\S+running_var"),
        (moments, r"optimizer\.state\.0\.momentum_buffer"),
        (difficulty_net, r"net\.\S+"),
        (moments_of_the_net, r"net_optimizer\.state\.0\.exp_avg_sq"),
    ],
)
def test_what_the_last_iteration_spoils_is_named_and_not_kept(digits_words, spoil, place):
    short = [f"{STAGE}.iterations=4", f"{STAGE}.warmup=1", f"{STAGE}.evaluate_every=2"]
    trainer = spoil_after(make(digits_words, *short), 4, spoil)
    expected = rf"not finite after iteration 4 of stage end_to_end: {place}.* is of iteration 2 of stage end_to_end,"
    with pytest.raises(FloatingPointError, match=expected):
        trainer.fit()
    assert_finite(trainer.folder)
    assert not (trainer.folder / "result.json").exists()
    assert recorded_divergence(trainer.folder).iteration == 4


def test_the_command_ends_with_code_1_and_goes_on_with_a_lower_lr(digits_words, capsys):
    words = [str(RECIPE), *digits_words, f"{STAGE}.warmup=6", f"{STAGE}.evaluate_every=1"]
    assert main([*words, f"{STAGE}.lr=1e30"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastlt: ")]
    assert f"such as {STAGE}.lr=2.5e+29" in error
    folder = load_recipe(RECIPE, digits_words).folder
    assert_finite(folder)
    stopped = recorded_divergence(folder)
    for refused in ("lr=1e31", "gamma=0.2"):
        assert main([*words, f"{STAGE}.lr=1e30", f"{STAGE}.{refused}"]) == 2
    assert main([*words, f"{STAGE}.lr=0.01"]) == 0
    told = capsys.readouterr().out
    assert "resuming" in told or stopped.iteration == 1
    assert recorded_divergence(folder) is None
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["iteration"] == 12
    json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)


def test_outputs_that_overflow_are_never_the_best(digits_words):
    """The weights are finite, the products of them are not."""

    def grow(step):
        for parameter in step.model.parameters():
            parameter.fill_(1e30)

    trainer = spoil_after(make(digits_words), 6, grow)
    with pytest.raises(FloatingPointError, match="outputs of the network for the validation split"):
        trainer.fit()
    assert not list((trainer.folder / "checkpoints").glob("best*"))


def test_large_numbers_are_finite_and_places_are_told():
    state = {
        "a": {"w": torch.full((1000,), 3e38), "half": torch.full((1000,), 6e4, dtype=torch.float16)},
        "b": [torch.tensor(1e300, dtype=torch.float64), torch.zeros(0), torch.tensor([1, 2])],
    }
    assert not_finite(state, Reducer(), CPU) == []
    state["b"][0].fill_(math.nan)
    state["a"]["half"][7] = math.inf
    assert sorted(not_finite(state, Reducer(), CPU)) == ["a.half", "b.0"]


def test_json_has_null_for_what_is_not_finite():
    text = strict_json.dumps({"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "d": "NaN", "e": (1, None)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5, {"c": None}], "d": "NaN", "e": [1, None]}
