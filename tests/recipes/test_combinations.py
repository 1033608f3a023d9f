"""Methods, losses, heads and stages in every combination: each trains, or is refused with the reason and the way out.

What trains goes into one run a test, stage after stage of two iterations: every pair of a row of the matrix is trained,
and methods also follow one another.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlt.losses import LOSSES
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.steps import STEPS

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
FIRST = ["plain", "difficulty", "cdb", "mwn", "sample_difficulty", "cb_da", "mixup", "cutmix"]
SECOND = ["balms", "tau_norm", "crt", "lws", "las"]
# Methods with a network or stages of their own, whose own tests combine them.
OTHERS = {"ride", "ride_router", "paco", "dro_lt", "oltr", "expert", "lfme"}
LOSS_OPTIONS = {"equalization": {"threshold": 0.1}, "ldam": {"reweight_from_epoch": 0}}


def makes_up(loss):
    return LOSSES[loss].makes_up_for_frequencies(LOSS_OPTIONS.get(loss, {}))


def stage(method, loss=None, **more):
    """Two iterations of a method, as its papers want it unless `more` says otherwise."""
    loss = loss or ("label_aware_smoothing" if method == "las" else "cross_entropy")
    tree = {"method": method, "loss": loss, "loss_options": LOSS_OPTIONS.get(loss, {})}
    tree |= {"lr": 0.01, "iterations": 2, "evaluate_every": 2, "batch_size": 16}
    if method in ("crt", "lws", "las", "tau_norm") and not makes_up(loss):
        tree["sampling"] = "class_balanced"
    if STEPS[method].needs.meta_batch:
        tree["meta_batch_size"] = 10
    if method == "tau_norm":
        tree |= {"evaluate_every": 1, "select": "best", "options": {"taus": [0, 1]}}
    if method == "cb_da":
        tree["options"] = {"from_epoch": 0}
    return {**tree, **more}


def load(stages, *words):
    tree = {"end_to_end": None, **{f"s{k}": s for k, s in enumerate(stages)}}
    return load_recipe(RECIPE, [f"stages={json.dumps(tree)}", *words])


@pytest.fixture
def train(digits, tmp_path):
    def train(stages, *words):
        where = [f"data.converted={digits}", f"runs={tmp_path}", "data.loader=resident", "num_threads=1"]
        result = Trainer(prepare(load(stages, *where, *words))).fit()
        assert result["iterations"] == 2 * len(stages)
        assert 0 <= result["top1"] <= 1

    return train


def assert_refused(expected, stages, *words):
    with pytest.raises(ValueError, match=expected):
        load(stages, *words)


def test_every_method_is_in_the_matrix():
    missing = sorted(set(STEPS) - {*FIRST, *SECOND, *OTHERS})
    assert not missing, f"put into FIRST, SECOND or OTHERS: {', '.join(missing)}"
    assert set(STEPS) - set(FIRST) - set(SECOND) == OTHERS


@pytest.mark.parametrize("method", [m for m in FIRST if m != "cutmix"])  # which is mixup's step
def test_end_to_end_methods_with_every_loss(method, train):
    stages = []
    for loss in LOSSES:
        if method == "cb_da" and makes_up(loss):
            assert_refused("together they do it twice", [stage(method, loss)])
        else:
            stages.append(stage(method, loss))
    train(stages, "model.head=cosine")


@pytest.mark.parametrize("method", FIRST)
def test_head_methods_after_every_end_to_end_method(method, train):
    train([stage(method), *map(stage, SECOND)])


@pytest.mark.parametrize("method", SECOND)
def test_head_methods_with_every_loss(method, train):
    first, stages = stage("plain"), []
    for loss in LOSSES:
        if method == "las" and loss != "label_aware_smoothing":
            assert_refused("las is named after its loss", [first, stage(method, loss)])
        else:
            stages.append(stage(method, loss))
    if method == "tau_norm":
        # Not on the cosine head that LDAM wants.
        train([first, *(s for s in stages if s["loss"] != "ldam")])
    else:
        train([first, *stages], "model.head=cosine")


def test_head_methods_on_a_cosine_head_and_end_to_end_methods_after_them(train):
    assert_refused("plain linear head", [stage("plain"), stage("tau_norm")], "model.head=cosine")
    chain = ["plain", "lws", "difficulty", "las", "mixup", "balms", "mwn", "crt", "cb_da"]
    train([*map(stage, chain)], "model.head=cosine", "model.head_scale=16")


def test_every_method_in_mixed_precision_with_dropout(train):
    train([*map(stage, [*FIRST, *SECOND])], "precision=bf16", "model.drop_rate=0.3")


CRT = stage("crt")
REFUSED = {
    "ldam needs cosines": ([stage("plain", "ldam")], [], "set model.head=cosine"),
    "ldam needs the head's scale": (
        [stage("plain", "ldam")],
        ["model.head=cosine", "model.head_scale=16"],
        r"loss_options\.scale: is 30.0, but the head multiplies cosines by 16.0",
    ),
    "balanced softmax needs the prior": (
        [stage("plain", "balanced_softmax", sampling="class_balanced")],
        [],
        "makes up for class frequencies that such batches do not have",
    ),
    "class weights need the prior": (
        [stage("plain"), {**CRT, "loss": "class_balanced"}],
        [],
        "makes up for class frequencies that such batches do not have",
    ),
    "cb_da needs the prior": ([stage("cb_da", sampling="class_balanced")], [], "cb_da weights classes by their counts"),
    "a head needs balance": ([stage("plain"), {**CRT, "sampling": "instance"}], [], "leans to its head classes again"),
    "balms learns its rates": ([stage("plain"), stage("balms", sampling="class_balanced")], [], "set sampling: inst"),
    "balms draws a part": ([stage("plain"), stage("balms", batch_size=18)], [], "give a multiple of 4"),
    "balms looks ahead": ([stage("plain"), stage("balms", nesterov=True)], [], "set it to false"),
    "balms looks ahead without a clip": (
        [stage("plain"), stage("balms", clip={"norm": 1.0})],
        [],
        "which is not clipped",
    ),
    "balms looks ahead without dampening": (
        [stage("plain"), stage("balms", optimizer_options={"dampening": 0.5})],
        [],
        "one step of SGD without it ahead",
    ),
    "a clip of all gradients": (
        [
            stage(
                "difficulty",
                clip={"norm": 1.0},
                optimizer="adamw",
                options={"approximate": {"lookahead_only": ["head"]}},
            )
        ],
        [],
        "takes the gradients of some of them",
    ),
    "deferred weights need the prior": (
        [stage("plain", "ldam", loss_options={"reweight_from_epoch": 3}, sampling="class_balanced")],
        ["model.head=cosine"],
        "makes up for class frequencies that such batches do not have",
    ),
    "gamma is of the focal kind": (
        [stage("plain", "class_balanced", loss_options={"kind": "softmax", "gamma": 2.0})],
        [],
        "gamma is 2.0, which is for kind focal",
    ),
    "tau after scales": ([stage("plain"), stage("lws"), stage("tau_norm")], [], "rebuild it"),
    "mixup is no augmentation": ([stage("difficulty")], ["data.augment=[flip, mixup]"], "method: mixup with options"),
    "mixup of nothing": ([stage("mixup", options={"alpha": 0})], [], "alpha: is 0"),
    "two lookaheads": ([stage("mixup", options={"driver_weight": 1})], [], "options of method 'mixup'"),
    **{f"{method} has no model": ([stage(method)], [], "without a stage before it") for method in SECOND},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused_with_the_reason(case):
    stages, words, expected = REFUSED[case]
    assert_refused(expected, stages, *words)


def test_a_head_may_be_shortened_before_it_is_scaled_and_after_it_is_new():
    chain = ["plain", "tau_norm", "lws", "crt", "tau_norm"]
    assert [s.method for s in load([*map(stage, chain)]).stages.values()] == chain
