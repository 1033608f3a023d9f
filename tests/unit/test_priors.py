"""Class priors: those in the logits that minimise an expected loss, and those that users give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlt.inference.priors import CarriedPrior, carried_prior, deployed_prior
from fastlt.losses import LOSSES, build_loss
from fastlt.recipe import load_recipe
from fastlt.state import ClassCounts
from fastlt.steps import STEPS
from loaders.order.sampling import SAMPLINGS, class_shares, epoch_order

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ClassCounts(np.array([300, 90, 30, 6]), ("cat", "dog", "owl", "yak"))
PI = COUNTS.counts / COUNTS.counts.sum()
DEPLOYED = np.array([0.1, 0.2, 0.3, 0.4])
# p(x|c) of 40 values that x may have, (40, 4): classes overlap, and every posterior is well above 0.
LIKELIHOOD = np.random.default_rng(0).dirichlet(np.full(40, 2.0), size=4).T


def recipe(*words: str):
    stage = "stages.end_to_end"
    common = ["data.num_classes=null", f"{stage}.method=plain", f"{stage}.batch_size=8", f"{stage}.warmup=0"]
    return load_recipe(ROOT / "recipes" / "digits_lt.yaml", [*common, *words])


def bayes(shares: np.ndarray) -> np.ndarray:
    """p(c|x) where classes have these shares, as it is written: (40, 4)."""
    joint = LIKELIHOOD * shares
    return joint / joint.sum(1, keepdims=True)


def best_logits(loss: str, shares: np.ndarray, counts: ClassCounts = COUNTS, **options) -> np.ndarray:
    """The logits (40, 4) that minimise the expected loss over batches with these class shares, found by descent."""
    fn = build_loss(loss, counts, **options)
    logits = torch.zeros(LIKELIHOOD.shape, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(4)
    posterior = torch.from_numpy(bayes(shares))  # the logits of each x are free: how often it comes does not matter
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def expected() -> Tensor:
        optimizer.zero_grad()
        each = fn(logits.repeat_interleave(4, 0), labels.repeat(len(logits))).view(len(logits), 4)
        value = (posterior * each).sum()
        value.backward()
        return value

    optimizer.step(expected)
    return logits.detach().numpy()


def adjusted(logits: np.ndarray, carried: CarriedPrior) -> np.ndarray:
    z = logits + carried.replaced_by(DEPLOYED)
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("loss", "options", "sampling"),
    [
        *(("cross_entropy", {}, sampling) for sampling in ("instance", "class_balanced", "effective_number")),
        ("balanced_softmax", {}, "instance"),
        ("class_balanced", {"kind": "softmax", "beta": 0.99}, "instance"),
    ],
)
def test_the_best_logits_become_the_posterior_of_another_prior(loss, options, sampling):
    words = [f"stages.end_to_end.loss={loss}", f"stages.end_to_end.sampling={sampling}"]
    carried = carried_prior(recipe(*words, f"stages.end_to_end.loss_options={json.dumps(options)}"), COUNTS)
    logits = best_logits(loss, class_shares(COUNTS.counts, sampling), **options)
    np.testing.assert_allclose(adjusted(logits, carried), bayes(DEPLOYED), atol=2e-6)
    assert carried.shares.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("loss", "options"),
    [("focal", {"gamma": 2.0}), ("ldam", {"max_margin": 0.5, "scale": 30.0})],
    ids=["focal", "ldam"],
)
def test_of_losses_with_an_assumption_the_best_class_is_that_of_the_prior_that_is_assumed(loss, options):
    words = [f"stages.end_to_end.loss={loss}", f"stages.end_to_end.loss_options={json.dumps(options)}"]
    mild = ClassCounts(np.array([100, 80, 65, 50]), COUNTS.names)  # so that each class is the best one somewhere
    carried = carried_prior(recipe(*words, "model.head=cosine"), mild)
    assert carried.assumptions
    np.testing.assert_allclose(carried.shares, mild.counts / mild.counts.sum())
    posterior = bayes(carried.shares)
    assert set(posterior.argmax(1)) == {0, 1, 2, 3}
    clear = np.sort(posterior, axis=1)[:, -1] - np.sort(posterior, axis=1)[:, -2] > 0.02
    logits = best_logits(loss, carried.shares, mild, **options)
    assert (logits.argmax(1) == posterior.argmax(1))[clear].all()
    assert clear.sum() > 30


def test_equalization_counts_a_rare_class_as_often_as_its_loss_does_with_two_classes():
    """E_b over the draws, written out: with probability gamma the rare class leaves the denominator of the other."""
    gamma, counts = 0.9, ClassCounts(np.array([995, 5]), ("many", "few"))
    words = [f"stages.end_to_end.{key}" for key in ("loss=equalization", "loss_options={gamma: 0.9, threshold: 0.01}")]
    carried = carried_prior(recipe(*words), counts)
    q = 0.03  # p(few|x) in training
    difference = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of the logits, few minus many
    optimizer = torch.optim.LBFGS(
        [difference], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def expected() -> Tensor:
        optimizer.zero_grad()
        many = (1 - gamma) * torch.nn.functional.softplus(difference)
        value = (1 - q) * many + q * torch.nn.functional.softplus(-difference)
        value.backward()
        return value

    optimizer.step(expected)
    odds = np.log(q / (1 - q))
    undone = difference.item() - np.log(carried.shares[1] / carried.shares[0])
    assert undone == pytest.approx(odds - np.log(5 / 995), abs=1e-6)
    assert carried_prior(recipe(*words, "stages.end_to_end.loss_options={gamma: 1.0}"), counts).shares[1] == 0.005


def test_deferred_weights_count_from_their_epoch_on():
    words = [
        "stages.end_to_end.loss=ldam",
        "stages.end_to_end.loss_options={reweight_from_epoch: 3, beta: 0.99}",
        "model.head=cosine",
        "stages.end_to_end.iterations=null",
        "stages.end_to_end.epochs=4",
    ]
    per_epoch = COUNTS.counts.sum() // 8
    effective = np.array([sum(0.99**k for k in range(n)) for n in COUNTS.counts])
    weighted = PI / effective
    for iteration, expected in ((3 * per_epoch, PI), (3 * per_epoch + 1, weighted), (None, weighted)):
        carried = carried_prior(recipe(*words), COUNTS, iteration=iteration)
        np.testing.assert_allclose(carried.shares, expected / expected.sum(), rtol=1e-12)


SECOND = "stages.classifier={{method: {}, sampling: class_balanced, batch_size: 8, lr: 0.1, iterations: 2, loss: {}}}"


def test_the_stages_of_a_recipe_are_followed():
    uniform = np.full(4, 0.25)
    crt = recipe(SECOND.format("crt", "cross_entropy"))
    np.testing.assert_allclose(carried_prior(crt, COUNTS).shares, uniform)
    assert not carried_prior(crt, COUNTS).assumptions
    las = carried_prior(recipe(SECOND.format("las", "label_aware_smoothing")), COUNTS)
    np.testing.assert_allclose(las.shares, uniform)
    assert "smoothing" in las.assumptions[0]
    weights = [0.5, 0.5, 1.0, 2.0]
    learned = carried_prior(recipe("stages.end_to_end.method=difficulty"), COUNTS, weights)
    np.testing.assert_allclose(learned.shares, PI * weights / (PI * weights).sum())
    assert "weights" in learned.assumptions[0]
    # What an earlier stage learned is gone with its head.
    both = recipe("stages.end_to_end.method=difficulty", SECOND.format("crt", "cross_entropy"))
    np.testing.assert_allclose(carried_prior(both, COUNTS, weights).shares, uniform)
    samples = carried_prior(recipe("stages.end_to_end.method=mwn"), COUNTS, weights)
    np.testing.assert_allclose(samples.shares, PI)
    assert samples.assumptions
    routed = recipe(
        *("stages.end_to_end.method=ride", "stages.end_to_end.loss=balanced_softmax", "model.experts=2"),
        "stages.router={method: ride_router, iterations: 4, batch_size: 8, lr: 0.1}",
    )
    np.testing.assert_allclose(carried_prior(routed, COUNTS).shares, uniform)
    many = recipe("stages.end_to_end.method=expert", "stages.end_to_end.classes=many", "data.shots=[60, 20]")
    counts = ClassCounts(COUNTS.counts, COUNTS.names, (60, 20))
    expert = carried_prior(many, counts)
    np.testing.assert_allclose(expert.shares, [300 / 390, 90 / 390, 0, 0])
    assert (expert.replaced_by(DEPLOYED)[2:] == 0).all()  # their logits are -inf already


def test_a_class_whose_last_weight_is_zero_is_known_all_the_same():
    """CDB-CE: all of its validation images were right at that moment. Its logit is as finite as the others'."""
    carried = carried_prior(recipe("stages.end_to_end.method=cdb"), COUNTS, [0.0, 0.5, 1.5, 2.0])
    expected = PI * [0.5, 0.5, 1.5, 2.0]
    np.testing.assert_allclose(carried.shares, expected / expected.sum())
    assert "whose last weight is 0" in carried.assumptions[-1]
    large = carried_prior(recipe("stages.end_to_end.method=cdb"), COUNTS, [0.0, 0.0, 2.0, 2.0]).shares
    np.testing.assert_allclose(large, PI, err_msg="the smallest weight of the others may be above 1")
    offset = carried.replaced_by(deployed_prior([0, 1, 1, 1], COUNTS))
    assert offset[0] == -np.inf
    assert np.isfinite(offset[1:]).all()


def test_a_loss_that_does_not_say_its_factor_is_taken_to_have_removed_the_prior(monkeypatch):
    monkeypatch.setattr(LOSSES["balanced_softmax"], "log_prior_factor", lambda self: None)
    carried = carried_prior(recipe("stages.end_to_end.loss=balanced_softmax"), COUNTS)
    np.testing.assert_allclose(carried.shares, np.full(4, 0.25))
    assert "balanced_softmax" in carried.assumptions[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_says_which_prior_its_logits_carry(loss):
    factor = build_loss(loss, COUNTS).log_prior_factor()
    assert factor is None or (factor.shape == (4,) and factor.dtype == torch.float64 and torch.isfinite(factor).all())
    assert factor is not None or not LOSSES[loss].corrects_prior


@pytest.mark.parametrize("method", STEPS)
def test_what_a_method_assumes_is_a_sentence(method):
    prior = STEPS[method].logits_prior
    assert prior.origin in ("batches", "weighted", "before", "uniform")
    assert prior.assumption is None or (20 < len(prior.assumption) < 200 and prior.assumption[-1] != ".")
    assert prior.origin == "batches" or method == "ride_router" or prior.assumption


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_shares_of_a_sampling_are_those_of_its_draws(sampling):
    labels = np.repeat(np.arange(4), [200, 50, 20, 5])
    drawn = np.concatenate([labels[epoch_order(labels, sampling=sampling, seed=0, epoch=e)] for e in range(60)])
    expected = class_shares(np.bincount(labels), sampling)
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), expected, atol=0.02)
    assert class_shares(np.array([3, 0, 1]), sampling)[1] == 0


def test_deployment_counts_in_every_form_are_the_same_shares(tmp_path):
    counts = {"cat": 1, "dog": 2, "owl": 3, "yak": 4}
    (tmp_path / "a.json").write_text(json.dumps(counts))
    (tmp_path / "a.csv").write_text("class,count\n" + "".join(f"{k},{v}\n" for k, v in reversed(counts.items())))
    (tmp_path / "b.csv").write_text("".join(f"{k},{v}.0\n" for k, v in counts.items()))
    (tmp_path / "excel.csv").write_text("".join(f"{k},{v}\n" for k, v in counts.items()), encoding="utf-8-sig")
    np.testing.assert_allclose(deployed_prior(tmp_path / "excel.csv", COUNTS), DEPLOYED)
    for prior in (tmp_path / "a.json", str(tmp_path / "a.csv"), tmp_path / "b.csv", counts, [1, 2, 3, 4]):
        np.testing.assert_allclose(deployed_prior(prior, COUNTS), DEPLOYED)
    np.testing.assert_allclose(deployed_prior("training", COUNTS), PI)
    np.testing.assert_allclose(deployed_prior("uniform", COUNTS), np.full(4, 0.25))
    assert CarriedPrior(PI).replaced_by(deployed_prior([1, 0, 1, 1], COUNTS))[1] == -np.inf


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "cat,1\ndog,2\n", "lacks 2 of 4 classes .owl, yak.: give 0"),
        ("a.csv", "cat,1\ndig,2\n", "'dig' is no class of this network; did you mean 'dog'"),
        ("a.csv", "cat,1\ndog,two\n", "count of 'dog' is 'two'"),
        ("a.csv", "cat,1\ndog,-2\n", "count of 'dog' is '-2'"),
        ("a.csv", "cat,1\ndog,inf\n", "count of 'dog' is 'inf'"),
        ("a.csv", "cat,1\ncat,2\n", "'cat' twice"),
        ("a.csv", "cat,1,2\n", "has 3 columns"),
        ("a.csv", "cat,0\ndog,0\nowl,0\nyak,0\n", "every count is 0"),
        ("a.csv", "", "lacks 4 of 4"),
        ("a.json", '{"cat": 1, "cat": 2}', "'cat' twice"),
        ("a.json", '{"cat": true}', "count of 'cat' is True"),
        ("a.json", "[1, 2]", "no JSON object"),
        ("a.json", "{", "is no JSON"),
        ("a.json", '{"cat": ' * 100_000, "is no JSON"),
        ("a.json", f'{{"cat": 1{"0" * 400}}}', "count of 'cat' is"),
        ("a.csv", "a" * 200_000 + ",1\n", "is no CSV .field larger"),
    ],
)
def test_a_file_of_counts_that_says_something_else_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        deployed_prior(tmp_path / name, COUNTS)


def test_other_priors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file; allowed are training, uniform"):
        deployed_prior("unifrom", COUNTS)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        deployed_prior([1, 2, 3], COUNTS)
    with pytest.raises(ValueError, match="cannot be read"):
        deployed_prior(tmp_path, COUNTS)
    (tmp_path / "a.csv").write_bytes(b"caf\xe9,1\n")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        deployed_prior(tmp_path / "a.csv", COUNTS)
