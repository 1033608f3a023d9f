"""Experiment trackers: what TensorBoard's own reader finds in a run, also one that was killed, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from fastlt import cli
from fastlt.recipe import load_recipe
from fastlt.run import trackers
from fastlt.run.class_history import read_class_history
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
STAGE = "stages.end_to_end"


def make(words, *more):
    recipe = load_recipe(ROOT / "recipes" / "digits_lt.yaml", [*words, "trackers=[tensorboard]", *more])
    return Trainer(prepare(recipe))


def read(folder):
    """All that TensorBoard shows of a run."""
    shown = EventAccumulator(str(folder / "fastlt"), size_guidance={"scalars": 0, "histograms": 0})
    shown.Reload()
    return shown


def curve(shown, tag):
    return {event.step: event.value for event in shown.Scalars(tag)}


class KilledError(Exception):
    """In the place of a kill: nothing is saved after it."""


def killed_after(trainer, iterations):
    log = trainer._log_training

    def die(*arguments):
        log(*arguments)
        if trainer.progress.done == iterations:
            raise KilledError

    trainer._log_training = die
    return trainer


def test_tensorboard_shows_a_run_that_was_killed_as_one_run(digits_words):
    with pytest.raises(KilledError):
        killed_after(make(digits_words), 9).fit()
    before = read(Path(load_recipe("digits_lt", digits_words).folder))
    assert list(curve(before, "train/loss")) == list(range(1, 10))
    result = make(digits_words).fit()
    folder = Path(load_recipe("digits_lt", digits_words).folder)
    shown = read(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    # Each iteration once: 7 to 9 were forgotten with the kill and trained again.
    loss = [event.step for event in shown.Scalars("train/loss")]
    assert loss == list(range(1, 13))
    logged = {line["iteration"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert curve(shown, "train/loss") == pytest.approx(logged)
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    for key in ("top1", "many", "medium", "few", "ece", "macro_f1"):
        assert curve(shown, f"validation/{key}") == pytest.approx({one["iteration"]: one[key] for one in evaluations})
        assert curve(shown, f"test/{key}") == pytest.approx({12: result[key]})

    records, _ = read_class_history(folder / "class_history.npy")
    for name in ("weight", "difficulty", "meta_accuracy"):
        histograms = shown.Histograms(f"class/{name}")
        assert [one.step for one in histograms] == [6, 12]
        for one, record in zip(histograms, records, strict=True):
            assert one.histogram_value.num == 10
            assert one.histogram_value.min == pytest.approx(record.values[name].min())
            assert one.histogram_value.max == pytest.approx(record.values[name].max())


def test_tensorboard_gets_the_hyper_parameters_beside_the_curves(digits_words):
    trainer = make(digits_words, f"{STAGE}.iterations=2", f"{STAGE}.evaluate_every=2", f"{STAGE}.warmup=0")
    trainer.fit()
    assert len(list((trainer.folder / "fastlt").iterdir())) == 1  # one run, one file
    shown = read(trainer.folder)
    contents = shown.PluginTagToContent("hparams")
    given = HParamsPluginData.FromString(contents["_hparams_/session_start_info"]).session_start_info.hparams
    assert given["name"].string_value == "digits_lt"
    assert given[f"{STAGE}.lr"].number_value == load_recipe("digits_lt").stages["end_to_end"].lr
    assert given["data.imbalance_factor"].number_value == 20
    assert given["data.converted"].string_value.endswith("digits")
    assert given["data.mean"].string_value.startswith("[")
    assert given["model.checkpoint"].string_value == "null"


def test_weights_and_biases_gets_name_identity_and_histograms(monkeypatch, tmp_path):
    """Against a stand-in for the package, which records the calls."""
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    wandb = ModuleType("wandb")
    wandb.init = lambda **given: calls.append(given) or run
    wandb.config = SimpleNamespace(update=lambda values, allow_val_change: calls.append(values))
    wandb.Histogram = lambda values: ("histogram", values)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = load_recipe("digits_lt", ["trackers=[wandb]", f"runs={tmp_path}", "name=mine"])
    from accelerate import Accelerator
    from accelerate.tracking import WandBTracker

    def started(done):
        accelerator = Accelerator()
        accelerator.log_with = ["wandb"]
        context = SimpleNamespace(recipe=recipe, folder=recipe.folder, main=True, accelerator=accelerator)
        one = trackers.Trackers(context)
        one.start(done)
        assert [type(t) for t in accelerator.trackers] == [WandBTracker]
        return one

    one = started(0)
    assert (calls[0]["project"], calls[0]["name"], calls[0]["resume"]) == ("fastlt", "mine", "allow")
    assert calls[1]["stages.end_to_end.method"] == "difficulty"
    one.log("validation", {"top1": 0.5, "stage": "x", "many": None}, 6)
    one.log_per_class({"weight": [1.0, 2.0]}, 6)
    one.finish()
    assert calls[2:] == [(6, {"validation/top1": 0.5}), (6, {"class/weight": ("histogram", [1.0, 2.0])}), "finish"]
    started(6)
    assert calls[5]["id"] == calls[0]["id"]


def test_a_tracker_without_histograms_gets_the_ends_and_the_middle():
    logged = {}
    tracker = SimpleNamespace(log=lambda values, step: logged.update(values))
    trackers._quantiles(tracker, "class/weight", [3.0, 1.0, 2.0], 5)
    assert logged == {"class/weight_min": 1.0, "class/weight_median": 2.0, "class/weight_max": 3.0}


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_tracker_that_is_not_installed_is_refused_in_one_sentence(command, monkeypatch, tmp_path, capsys):
    there = [one for one in trackers.get_available_trackers() if str(one.value) == "tensorboard"]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: there)
    words = ["digits_lt", f"runs={tmp_path}", "trackers=[tensorboard, comet_ml, wandb]"]
    assert cli.main([command, *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "trackers: comet_ml and wandb cannot be used" in told
    assert "pip install comet-ml wandb" in told
    assert "trackers=[tensorboard]" in told
    assert not list(tmp_path.iterdir())
