"""Decoupled training: the arithmetic of each head, features that stay frozen, refusals, and resuming in stage 2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from short_runs import RECIPE, assert_same, final_state, log_lines, stop_after

from fastlt.models import CosineHead, LinearHead, build_model
from fastlt.models.retrained_heads import ScaledHead, fresh_head, tau_normalised
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.decoupled import LasStep, LwsStep

COUNTS = ClassCounts(np.array([40, 12, 3]), ("a", "b", "c"))
SECOND = "batch_size: 32, lr: 0.1, sampling: class_balanced, iterations: 6, evaluate_every: 3"
STAGES = {
    "crt": f"{{method: crt, {SECOND}}}",
    "lws": f"{{method: lws, {SECOND}}}",
    "las": f"{{method: las, loss: label_aware_smoothing, options: {{head_lr_factor: 0.2}}, {SECOND}}}",
    "las-shifted": f"{{method: las, loss: label_aware_smoothing, options: {{shift_batch_norm: true}}, {SECOND}}}",
    "balms": "{method: balms, loss: balanced_softmax, batch_size: 32, lr: 0.1, meta_batch_size: 50, iterations: 6, "
    "evaluate_every: 3}",
    "tau_norm": "{method: tau_norm, lr: 0.1, batch_size: 32, iterations: 6, evaluate_every: 1, select: best, "
    "options: {taus: [0, 0.5, 1, 1.5, 2, 3]}}",
}


def words_of(digits_words, *more):
    """Twelve plain iterations, then what `more` says."""
    return [*digits_words, "stages.end_to_end.method=plain", *more]


def measured(result):
    """What the test split says, without times."""
    return {key: result[key] for key in ("top1", "per_class_accuracy", "ece", "selected_iteration")}


# The heads, against numpy in float64


def features_and_head(seed=0, n=7, width=5):
    draw = np.random.default_rng(seed)
    x, w, b = draw.normal(size=(n, width)), draw.normal(size=(3, width)), draw.normal(size=3)
    head = LinearHead(width, 3).double()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(w))
        head.bias.copy_(torch.from_numpy(b))
    return x, w, b, head


def test_a_scaled_head_is_the_head_times_a_scale_a_class():
    x, w, b, head = features_and_head()
    scaled = ScaledHead(head)
    assert torch.equal(scaled(torch.from_numpy(x)), head(torch.from_numpy(x)))
    s = np.array([0.5, -2.0, 3.0])
    with torch.no_grad():
        scaled.scale.copy_(torch.from_numpy(s))
    expected = np.array([[(w[c] @ row + b[c]) * s[c] for c in range(3)] for row in x])
    np.testing.assert_allclose(scaled(torch.from_numpy(x)).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 2.0])
def test_tau_normalisation_divides_each_row_by_a_power_of_its_length(tau):
    w = np.random.default_rng(1).normal(size=(4, 6)) * np.array([[1.0], [10.0], [0.01], [0.0]])
    expected = np.stack([row / np.sqrt((row**2).sum()) ** tau if row.any() else row for row in w])
    np.testing.assert_allclose(tau_normalised(torch.from_numpy(w), tau).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("head", [LinearHead(5, 3), CosineHead(5, 3, 16.0)], ids=["linear", "cosine"])
def test_a_fresh_head_is_random_by_its_seed_and_leaves_the_default_generator_alone(head):
    before = torch.get_rng_state()
    one, again, other = fresh_head(head, 1), fresh_head(ScaledHead(head), 1), fresh_head(head, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, again.weight)
    for weight in (other.weight, head.weight):
        assert not torch.equal(one.weight, weight)
    assert type(one) is type(again) is type(head)
    assert one.weight.shape == head.weight.shape
    assert getattr(one, "scale", None) == getattr(head, "scale", None)


def softmax_gradient(logits, labels, smoothing):
    """d/dz of mean_i [(1 - e_i) * -log p_iy + e_i * mean_k(-log p_ik)], row by row."""
    rows = []
    for z, y, e in zip(logits, labels, smoothing, strict=True):
        p = np.exp(z - z.max())
        p /= p.sum()
        target = np.full(len(z), e / len(z))
        target[y] += 1 - e
        rows.append((p - target) / len(logits))
    return np.array(rows)


class Features(torch.nn.Module):
    """A backbone whose features are the images' first column of red pixels, and a weight that must not move."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, images):
        return images[:, 0, :, 0] * self.unused[0]


@pytest.mark.parametrize(
    ("method", "loss", "factor"),
    [("lws", "cross_entropy", 0.0), ("las", "label_aware_smoothing", 0.0), ("las", "label_aware_smoothing", 0.3)],
)
def test_iterations_equal_sgd_written_out_in_numpy(method, loss, factor):
    from fastlt.losses import build_loss
    from fastlt.models import Classifier

    x, w, b, head = features_and_head(n=8)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 2])
    model = Classifier(Features(), head)
    kind = {"lws": LwsStep, "las": LasStep}[method]
    options = kind.Options(head_lr_factor=factor) if method == "las" else kind.Options()
    kind.prepare_model(model, options, seed=0)
    lr, momentum, decay = 0.2, 0.9, 0.01
    optimizer = torch.optim.SGD(kind.parameter_groups(model, options), lr=lr, momentum=momentum, weight_decay=decay)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    loss = build_loss(loss, COUNTS, **({"head": 0.4, "tail": 0.1} if method == "las" else {})).double()
    images = torch.zeros(8, 3, 5, 1, dtype=torch.float64)
    images[:, 0, :, 0] = torch.from_numpy(x)
    step = kind(StepParts(model, loss, optimizer, lambda i: i, None, COUNTS), options)
    step.train_mode()
    batch = Batch(images, torch.from_numpy(labels), torch.arange(8))

    smoothing = np.zeros(8)
    if method == "las":
        n = COUNTS.counts
        smoothing = (0.1 + 0.3 * np.sin(np.pi * (n - n.min()) / (2 * (n.max() - n.min()))))[labels]
    s = np.ones(3)
    velocity = [np.zeros_like(v) for v in (s, w, b)]
    for _ in range(4):
        step(batch)
        z = x @ w.T + b
        slope = softmax_gradient(z * s, labels, smoothing)
        gradients = [(slope * z).sum(0), (slope * s).T @ x, (slope * s).sum(0)]
        for k, (value, rate) in enumerate(((s, lr), (w, lr * factor), (b, lr * factor))):
            velocity[k] = momentum * velocity[k] + gradients[k] + decay * value
            value -= rate * velocity[k]
    np.testing.assert_allclose(model.head.scale.detach().numpy(), s, rtol=1e-6)
    np.testing.assert_allclose(model.head.inner.weight.detach().numpy(), w, rtol=1e-6)
    np.testing.assert_allclose(model.head.inner.bias.detach().numpy(), b, rtol=1e-6)
    assert torch.equal(model.backbone.unused, torch.ones(2, dtype=torch.float64))


# Runs


@pytest.mark.parametrize("case", STAGES)
def test_the_second_stage_leaves_the_features_bit_for_bit(digits_words, case):
    trainer = Trainer(prepare(load_recipe(RECIPE, words_of(digits_words, f"stages.second={STAGES[case]}"))))
    result = trainer.fit()
    assert result["iterations"] == 18
    folder = trainer.folder / "checkpoints"
    before, after = (
        torch.load(folder / f"final_{stage}.pt", weights_only=True)["model"] for stage in ("end_to_end", "second")
    )
    last = final_state(trainer.folder)["step"]["model"]
    moved = {name for name in before if name.startswith("backbone.") and not torch.equal(before[name], last[name])}
    if case == "las-shifted":
        assert moved
        assert all("running_" in name or "num_batches" in name for name in moved)
    else:
        assert moved == set()
    heads = {name for name in after if not name.startswith("backbone.")}
    scaled = {"head.scale", "head.inner.weight", "head.inner.bias"}
    assert heads == (scaled if case.startswith("l") else {"head.weight", "head.bias"})
    if case == "crt":
        seeded = fresh_head(LinearHead(64, 10), trainer.context.recipe.seed)
        assert not torch.equal(last["head.weight"], before["head.weight"])
        assert not torch.equal(last["head.weight"], seeded.weight)
    if case == "lws":
        assert torch.equal(last["head.inner.weight"], before["head.weight"])
        assert not torch.equal(last["head.scale"], torch.ones(10))
    if case == "las":
        assert not torch.equal(last["head.inner.weight"], before["head.weight"])
    if case == "tau_norm":
        expected = tau_normalised(before["head.weight"].double(), 3.0)
        torch.testing.assert_close(last["head.weight"].double(), expected, rtol=1e-5, atol=1e-7)
        assert not last["head.bias"].any()


def test_tau_is_the_best_on_validation(digits_words):
    trainer = Trainer(prepare(load_recipe(RECIPE, words_of(digits_words, f"stages.second={STAGES['tau_norm']}"))))
    result = trainer.fit()
    lines = [line for line in log_lines(trainer.folder) if line["stage"] == "second"]
    assert [line["tau"] for line in lines if line["kind"] == "train"] == pytest.approx([0, 0.5, 1, 1.5, 2, 3])
    scores = [line["top1"] for line in lines if line["kind"] == "evaluation"]
    assert result["validation_top1"] == max(scores)
    assert scores[result["selected_iteration"] - 1] == max(scores)


@pytest.mark.parametrize("case", STAGES)
def test_resuming_inside_the_second_stage_agrees_bit_for_bit(digits_words, case):
    def make(name):
        words = words_of(digits_words, f"stages.second={STAGES[case]}", f"name={name}")
        return Trainer(prepare(load_recipe(RECIPE, words)))

    whole = make("whole")
    result = whole.fit()
    stopped = stop_after(make("stopped"), 16)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = make("stopped")
    again = resumed.fit()
    one, other = final_state(whole.folder), final_state(resumed.folder)
    for state in (one, other):
        for key in ("train_s", "wait_s", "aside_s"):
            del state["progress"][key]
    assert_same(one, other)
    assert measured(result) == measured(again)


def test_a_third_stage_resumes_on_the_model_that_the_second_built(digits_words):
    third = STAGES["crt"]
    words = words_of(digits_words, f"stages.second={STAGES['las']}", f"stages.third={third}")
    whole = Trainer(prepare(load_recipe(RECIPE, [*words, "name=whole"])))
    result = whole.fit()
    stopped = stop_after(Trainer(prepare(load_recipe(RECIPE, [*words, "name=stopped"]))), 20)
    with pytest.raises(Interrupted):
        stopped.fit()
    assert measured(Trainer(prepare(load_recipe(RECIPE, [*words, "name=stopped"]))).fit()) == measured(result)
    # An end-to-end stage after decoupled ones trains everything again.
    model = build_model("cifar_resnet8", num_classes=10)
    for method in ("las", "plain"):
        STEPS[method].prepare_model(model, STEPS[method].Options(), seed=0)
    assert all(p.requires_grad for p in model.parameters())


# Refusals

REFUSED = {
    "rates": ([f"stages.second={STAGES['crt'].replace('method', 'lr_factors: {head: 2}, method')}"], "the head alone"),
    "first": (["stages.end_to_end=null", f"stages.second={STAGES['crt']}"], "'crt' without a stage before it"),
    "sampling": ([f"stages.second={STAGES['crt'].replace('class_balanced', 'instance')}"], "class_balanced"),
    "loss": ([f"stages.second={STAGES['las'].replace('label_aware_smoothing', 'cross_entropy')}"], "method lws"),
    "factor": ([f"stages.second={STAGES['las'].replace('0.2', '-1')}"], "head_lr_factor: is -1"),
    "taus": ([f"stages.second={STAGES['tau_norm'].replace('iterations: 6', 'iterations: 3')}"], "iterations: 6 and"),
    "tau of the last": ([f"stages.second={STAGES['tau_norm'].replace('select: best, ', '')}"], "set select: best"),
    "cosine": (["model.head=cosine", f"stages.second={STAGES['tau_norm']}"], "plain linear head"),
    "scaled": ([f"stages.second={STAGES['lws']}", f"stages.third={STAGES['tau_norm']}"], "plain linear head"),
    "option": ([f"stages.second={STAGES['lws'].replace('method', 'options: {tau: 1}, method')}"], "options.tau"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_second_stage_is_refused_by_the_recipe(digits_words, case):
    words, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected):
        load_recipe(RECIPE, [*digits_words[:5], *words] if case == "first" else words_of(digits_words, *words))


def test_a_loss_of_class_counts_is_refused_on_a_balanced_set_before_the_first_stage(digits_words, tmp_path):
    balanced = [w for w in digits_words if not w.startswith("data.converted")]
    words = ["data.imbalance_factor=1", f"data.converted={tmp_path / 'balanced'}", f"stages.second={STAGES['las']}"]
    with pytest.raises(ValueError, match="needs classes of different size"):
        Trainer(prepare(load_recipe(RECIPE, words_of(balanced, *words))))


def test_a_checkpoint_replaces_the_first_stage_if_it_brings_the_head_that_is_needed(digits_words, tmp_path):
    trained = Trainer(prepare(load_recipe(RECIPE, words_of(digits_words))))
    trained.fit()
    best = trained.folder / "checkpoints" / "final_end_to_end.pt"
    # The words of `digits_words` that speak of the first stage go: it is not there.
    words = [w for w in digits_words if not w.startswith("stages.")] + ["stages.end_to_end=null"]
    alone = [*words, "name=alone", f"model.checkpoint={best}", f"stages.second={STAGES['lws']}"]
    result = Trainer(prepare(load_recipe(RECIPE, alone))).fit()
    assert result["iterations"] == 6

    features = {k: v for k, v in torch.load(best, weights_only=True)["model"].items() if k.startswith("backbone.")}
    torch.save(features, tmp_path / "features.pt")
    headless = [*words, f"model.checkpoint={tmp_path / 'features.pt'}"]
    with pytest.raises(ValueError, match="goes on from a trained head"):
        Trainer(prepare(load_recipe(RECIPE, [*headless, "name=headless", f"stages.second={STAGES['lws']}"])))
    Trainer(prepare(load_recipe(RECIPE, [*headless, "name=new-head", f"stages.second={STAGES['crt']}"])))
