"""A moving average of the weights, and logit adjustment at evaluation: what a run measures, keeps and goes on with."""

from __future__ import annotations

import json

import pytest
import torch
from short_runs import STAGE, assert_same, comparable, log_lines, make, stop_after

from fastlt.losses.base import log_prior
from fastlt.models import build_model
from fastlt.recipe import RecipeError
from fastlt.run.loading import endless
from fastlt.run.stopping import Interrupted
from fastlt.run.trained import load_trained

EMA = f"{STAGE}.ema={{decay: 0.8, warmup: true}}"


def test_the_average_is_that_of_its_definition(digits_words):
    """Of parameters and BatchNorm's statistics, after every iteration; the first sets it."""
    trainer = make(digits_words, f"{STAGE}.ema={{decay: 0.8}}", f"{STAGE}.iterations=4")
    stage = trainer.build_stage("end_to_end")
    expected = None
    batches, meta_batches = endless(stage.loaders.train, 0), endless(stage.loaders.meta, 0)
    for iteration in range(4):
        stage.begin(iteration)
        stage.step(next(batches), next(meta_batches))
        stage.end(iteration + 1)
        now = {k: v.clone() for k, v in trainer.model.state_dict().items()}
        if expected is None:
            expected = now
        expected = {k: 0.8 * expected[k] + 0.2 * v if v.is_floating_point() else v for k, v in now.items()}
    stage.loaders.close()
    assert list(stage.models) == ["ema", "raw"]
    for name, value in stage.models["ema"].state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
        if value.is_floating_point():
            assert not torch.equal(value, trainer.model.state_dict()[name]), name


@pytest.mark.parametrize("select", ["ema", "raw"])
def test_both_are_evaluated_and_saved_and_one_is_selected(digits_words, select):
    trainer = make(digits_words, f"{STAGE}.ema={{decay: 0.8, select: {select}}}")
    result = trainer.fit()
    beside = {"ema": "raw", "raw": "ema"}[select]
    saved = torch.load(trainer.folder / "checkpoints" / "final_end_to_end.pt", weights_only=True)
    last = torch.load(trainer.folder / "checkpoints" / "last.pt", weights_only=True)
    average, raw = last["average"]["model"], last["step"]["model"]
    assert_same(saved["model"], average if select == "ema" else raw)
    assert_same(saved[beside], raw if select == "ema" else average)
    assert not torch.equal(average["head.weight"], raw["head.weight"])
    evaluation = [line for line in log_lines(trainer.folder) if line["kind"] == "evaluation"][-1]
    assert {"top1", f"{beside}_top1", f"{beside}_few"} <= evaluation.keys()
    assert evaluation["top1"] == result["validation_top1"]
    assert f"{beside}_top1" in result
    assert_same(load_trained(trainer.folder, torch.device("cpu")).model.state_dict(), saved["model"])
    # The numbers of each are those of its weights.
    trainer = make(digits_words, "name=again")
    for name, weights in ((select, saved["model"]), (beside, saved[beside])):
        trainer.model.load_state_dict(weights)
        found = trainer.evaluation.evaluate(trainer.model, "test")
        assert found["top1"] == result["top1" if name == select else f"{name}_top1"]


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(5)
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.mark.parametrize("trained", ["all", "norms", "head", "features"])
def test_a_run_with_an_average_resumes_bit_for_bit(digits_words, weights, trained):
    words = [EMA]
    if trained != "all":  # checkpoints keep the trained part
        words += [f"model.checkpoint={weights}", f"model.train={trained.replace('features', 'head')}"]
    if trained == "features":
        words += ["data.cached_views=1", "data.augment=[]"]
    whole = make(digits_words, *words, "name=whole")
    whole.fit()
    stopped = stop_after(make(digits_words, *words, "name=stopped"), 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = make(digits_words, *words, "name=stopped")
    resumed.fit()
    assert_same(comparable(whole.folder), comparable(resumed.folder))
    results = [json.loads((f / "result.json").read_text()) for f in (whole.folder, resumed.folder)]
    assert results[0]["raw_top1"] == results[1]["raw_top1"]


def test_a_run_with_another_optimizer_resumes_bit_for_bit(digits_words):
    words = [
        *(f"{STAGE}.optimizer=adamw", f"{STAGE}.optimizer_options.betas=[0.9, 0.95]", f"{STAGE}.lr=0.003"),
        *(f"{STAGE}.decay=weights", f"{STAGE}.clip.norm=1.0", f"{STAGE}.accumulate=2", f"{STAGE}.min_lr=1e-4"),
    ]
    whole = make(digits_words, *words, "name=whole")
    whole.fit()
    stopped = stop_after(make(digits_words, *words, "name=stopped"), 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = make(digits_words, *words, "name=stopped")
    resumed.fit()
    assert_same(comparable(whole.folder), comparable(resumed.folder))


def test_logit_adjustment_is_that_of_its_definition(digits_words):
    words = [f"{STAGE}.method=plain", f"{STAGE}.eval_adjustment=1.5", f"{STAGE}.iterations=12"]
    trainer = make(digits_words, *words)
    result = trainer.fit()
    trained = load_trained(trainer.folder, torch.device("cpu"))
    shift = 1.5 * log_prior(trainer.context.counts)
    right = total = 0
    plain = make(digits_words, f"{STAGE}.method=plain", "name=plain")
    for batch in plain.evaluation._batches("test"):
        right += (trained.logits(batch.images) - shift).argmax(1).eq(batch.labels).sum().item()
        total += len(batch)
    assert result["adjusted_top1"] == right / total
    assert "adjusted_few" in result
    without = plain.fit()
    assert without["top1"] == result["top1"], "the adjustment changes nothing else"
    assert "adjusted_top1" not in without


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{STAGE}.ema={{decay: 1.0}}"], "ema.decay: is 1.0"),
        ([EMA, f"{STAGE}.method=paco"], "ema: is set, but method 'paco'"),
        ([f"{STAGE}.eval_adjustment=1", f"{STAGE}.loss=balanced_softmax"], "eval_adjustment: is 1.0 with loss"),
        ([f"{STAGE}.eval_adjustment=1", f"{STAGE}.sampling=class_balanced"], "eval_adjustment: is 1.0 with sampling"),
        ([f"{STAGE}.eval_adjustment=1", f"{STAGE}.method=cdb"], "eval_adjustment: is 1.0 with method 'cdb'"),
        ([f"{STAGE}.eval_adjustment=1", f"{STAGE}.method=difficulty"], "eval_adjustment: is 1.0 with method 'diff"),
    ],
)
def test_what_does_not_go_together_is_refused(digits_words, words, message):
    with pytest.raises(RecipeError, match=message):
        make(digits_words, *words)
