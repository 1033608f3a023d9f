"""OLTR: head, attention and loss against loops in float64, exact centroids, resuming, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from short_runs import RECIPE, assert_same, comparable, final_state, log_lines, stop_after
from thread_ranks import SEEDED, run_ranks
from torch import nn

from fastlt.device.distributed import Reducer
from fastlt.losses import build_loss
from fastlt.models import Classifier, LinearHead, build_model
from fastlt.models.meta_embedding import MetaEmbeddingHead, ModulatedAttention, insert_attention
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, ClassCounts
from fastlt.steps import StepParts
from fastlt.steps.oltr import OltrStep

COUNTS = ClassCounts(np.array([40, 12, 3]), ("a", "b", "c"))
WIDTH, CLASSES = 5, 3
SECOND = "method: oltr, batch_size: 32, lr: 0.05, sampling: class_balanced, iterations: 6, evaluate_every: 3"
STAGES = {
    "trained": f"{{{SECOND}, options: {{margin: 1000}}}}",
    "attention": f"{{{SECOND}, options: {{attention_side: 2}}}}",
    "frozen": f"{{{SECOND}, options: {{freeze_backbone: true}}}}",
    "frozen-attention": f"{{{SECOND}, options: {{freeze_backbone: true, attention_side: 2}}}}",
}


def head_with_centroids(seed=0):
    torch.manual_seed(seed)
    head = MetaEmbeddingHead(LinearHead(WIDTH, CLASSES).double(), seed=3)
    with torch.no_grad():
        head.centroids.normal_(std=2.0)
    return head


# The head


def embedding_logits(head, x):
    """One feature at a time, with Python floats."""
    w_h, b_h = head.hallucinator.weight.tolist(), head.hallucinator.bias.tolist()
    w_s, b_s = head.selector.weight.tolist(), head.selector.bias.tolist()
    centroids, w = head.centroids.tolist(), head.weight.tolist()
    scores = [math.exp(sum(a * b for a, b in zip(row, x, strict=True)) + bias) for row, bias in zip(w_h, b_h)]  # noqa: B905
    memory = [sum(s / sum(scores) * c[d] for s, c in zip(scores, centroids, strict=True)) for d in range(WIDTH)]
    selector = [math.tanh(sum(a * b for a, b in zip(row, x, strict=True)) + bias) for row, bias in zip(w_s, b_s)]  # noqa: B905
    reach = 10 / min(math.dist(x, c) for c in centroids)
    v = [reach * (x[d] + selector[d] * memory[d]) for d in range(WIDTH)]
    length = math.hypot(*v)
    return [
        16 * sum(a * b for a, b in zip(row, v, strict=True)) / math.hypot(*row) / length * (length / (1 + length))
        for row in w
    ]


def test_the_head_equals_the_equations_one_feature_at_a_time():
    head, x = head_with_centroids(), torch.randn(7, WIDTH, dtype=torch.float64) * 3
    expected = [embedding_logits(head, row.tolist()) for row in x]
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-12)


def test_the_gradient_of_the_head_is_that_of_finite_differences_and_spares_the_centroids():
    head, x = head_with_centroids(), torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, (x,))
    head(x).square().sum().backward()
    assert head.centroids.grad is None
    for name in ("hallucinator", "selector"):
        assert getattr(head, name).weight.grad.abs().min() > 0, name
    assert head.weight.grad.abs().min() > 0


def test_a_feature_on_its_centroid_has_finite_logits_and_gradients():
    head = head_with_centroids().float()
    x = head.centroids.detach()[:2].clone().requires_grad_()
    logits = head(x)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert x.grad.isfinite().all()
    assert torch.linalg.vector_norm(logits, dim=1).min() > 0


def test_close_features_of_long_vectors_keep_their_distance():
    head = head_with_centroids().float()
    with torch.no_grad():
        head.centroids.add_(1000)
    x = head.centroids.detach() + 0.125
    expected = math.sqrt(WIDTH) * 0.125
    torch.testing.assert_close(head.distance(x, head.centroids), torch.full((CLASSES, 1), expected), rtol=1e-4, atol=0)


def test_the_hallucinator_starts_as_the_trained_head_and_no_default_random_number_is_drawn():
    trained = LinearHead(WIDTH, CLASSES)
    before = torch.get_rng_state()
    one, again, other = (MetaEmbeddingHead(trained, seed) for seed in (1, 1, 2))
    ModulatedAttention(4, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.hallucinator.weight, trained.weight)
    assert torch.equal(one.hallucinator.bias, trained.bias)
    assert torch.equal(one.selector.weight, again.selector.weight)
    assert not torch.equal(one.selector.weight, other.selector.weight)
    assert one.weight.abs().max() <= WIDTH**-0.5


# Attention


def test_attention_equals_loops_over_positions():
    torch.manual_seed(0)
    attention = ModulatedAttention(4, 3, seed=0).double()
    with torch.no_grad():
        attention.mask.weight.normal_()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)

    def at(layer, column):
        return layer.weight[:, :, 0, 0] @ column + (layer.bias if layer.bias is not None else 0)

    for image, result in zip(x, attention(x), strict=True):
        columns = [image[:, i // 3, i % 3] for i in range(9)]
        spatial = torch.softmax(attention.spatial.weight @ image.reshape(-1) + attention.spatial.bias, 0)
        for i, column in enumerate(columns):
            scores = torch.stack([at(attention.query, column) @ at(attention.key, other) for other in columns])
            weights = torch.softmax(scores, 0)
            attended = sum(w * at(attention.value, other) for w, other in zip(weights, columns, strict=True))
            expected = column + spatial[i] * at(attention.mask, attended)
            torch.testing.assert_close(result[:, i // 3, i % 3], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "size", "side"), [("cifar_resnet8", 32, 8), ("resnet10", 64, 2)])
def test_attention_starts_as_the_identity_and_learns_on_any_resnet(name, size, side):
    model = build_model(name, num_classes=3).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = model.features(images)
    attention = insert_attention(model.backbone, side, seed=0)
    torch.testing.assert_close(model.features(images), before, rtol=0, atol=0)
    model(images).sum().backward()
    assert attention.mask.weight.grad.abs().max() > 0


def test_attention_is_refused_where_it_has_no_place():
    transformer = Classifier(timm.create_model("vit_tiny_patch16_224", num_classes=0), LinearHead(192, 3))
    OltrStep.check_model(transformer, OltrStep.Options())
    with pytest.raises(ValueError, match="no pooling module"):
        OltrStep.check_model(transformer, OltrStep.Options(attention_side=7))
    with pytest.raises(ValueError, match="attention_side to the side of the maps"):
        ModulatedAttention(4, 3, 0)(torch.zeros(1, 4, 2, 2))


# The step


class Affine(nn.Module):
    """A backbone that has something to learn, on images of one column."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, WIDTH).double()

    def forward(self, images):
        return torch.tanh(self.linear(images[:, 0, :, 0]))


class Same:
    """No augmentation."""

    def __call__(self, images):
        return images


def make_step(options, reducer=None, lr=0.5):
    with SEEDED, torch.no_grad():
        torch.manual_seed(0)
        model = Classifier(Affine(), LinearHead(WIDTH, CLASSES).double())
        OltrStep.prepare_model(model, options, seed=0)
        model.head.centroids.normal_()
    groups = OltrStep.parameter_groups(model, options)
    optimizer = torch.optim.SGD(groups, lr=lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
    loss = build_loss("cross_entropy", COUNTS)
    return OltrStep(StepParts(model, loss, optimizer, Same(), None, COUNTS, reducer=reducer or Reducer()), options)


def batch_of(labels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(labels), 3, 4, 1, dtype=torch.float64, generator=generator)
    return Batch(images, torch.tensor(labels), torch.arange(len(labels)))


@pytest.mark.parametrize("margin", [0.0, 1000.0], ids=["hinge-closed", "hinge-open"])
def test_an_iteration_descends_the_loss_written_out_pair_by_pair(margin):
    options = OltrStep.Options(
        centroid_loss_weight=0.3, repel_weight=0.7, margin=margin, backbone_lr_factor=0.1, centroid_lr_factor=0.2
    )
    step, batch = make_step(options), batch_of([0, 1, 0, 0, 2, 1])
    before = copy.deepcopy(step.model)
    output = step(batch)

    head, b = before.head, len(batch)
    x = before.features(batch.images)
    m = head.centroids
    own = [(x[i] - m[y]).square().sum() for i, y in enumerate(batch.labels.tolist())]
    others = [
        (x[i] - m[c]).square().sum() for i, y in enumerate(batch.labels.tolist()) for c in range(CLASSES) if c != y
    ]
    attract, far = sum(own) / (2 * b), sum(others) / (b * CLASSES)
    repel = torch.clamp(margin - far, min=0)
    classification = F.cross_entropy(head(x), batch.labels)
    objective = classification + 0.3 * (attract + 0.7 * repel)
    assert output.loss.item() == pytest.approx(objective.item(), rel=1e-12)
    for name, value in (("attract", attract), ("repel", repel), ("classification", classification)):
        assert output.metrics[name].item() == pytest.approx(value.item(), rel=1e-12)
    assert (repel > 0) == (margin > 0)

    gradients = dict(
        zip(dict(before.named_parameters()), torch.autograd.grad(objective, before.parameters()), strict=True)
    )
    # The attracting part of the centroids' gradient is the center loss's, without the weight.
    attracting = torch.autograd.grad(sum((x[i].detach() - m[y]).square().sum() for i, y in enumerate(batch.labels)), m)[
        0
    ]
    pull = torch.zeros_like(m)
    for c in range(CLASSES):
        members = [i for i, y in enumerate(batch.labels.tolist()) if y == c]
        for i in members:
            pull[c] += (m[c] - x[i]).detach() / (1 + len(members)) / b
    gradients["head.centroids"] = gradients["head.centroids"] - 0.3 * attracting / (2 * b) + pull
    for name, value in before.named_parameters():
        factor = 0.1 if name.startswith("backbone") else 0.2 if name == "head.centroids" else 1.0
        expected = value - 0.5 * factor * gradients[name]
        torch.testing.assert_close(step.model.get_parameter(name), expected, rtol=1e-10, atol=1e-12, msg=name)


def test_the_first_pass_sets_the_exact_mean_of_each_class():
    step = make_step(OltrStep.Options())
    labels = [0, 0, 1, 2, 1, 0, 0, 2, 0]
    batch = batch_of(labels)
    pieces = [Batch(batch.images[a:z], batch.labels[a:z], batch.index[a:z]) for a, z in ((0, 4), (4, 8), (8, 9))]
    step.first_pass(iter(pieces), lambda images: images)
    for c in range(CLASSES):
        members = [step.model.features(batch.images[i : i + 1])[0] for i, y in enumerate(labels) if y == c]
        torch.testing.assert_close(step.model.head.centroids[c], sum(members) / len(members), rtol=1e-14, atol=1e-15)


def test_two_ranks_with_their_shares_do_what_one_does_with_everything():
    # In the second batch the hinge is open for the whole, and would be closed for the second half alone.
    options, labels = OltrStep.Options(margin=0.8, repel_weight=1.0), [0, 1, 0, 0, 2, 1, 1, 1]

    def work(reducer):
        step = make_step(options, reducer)
        whole = batch_of([0, 0, 1, 2, 1, 0, 2], seed=5)
        mine = slice(reducer.rank, None, reducer.world_size)
        step.first_pass(iter([Batch(whole.images[mine], whole.labels[mine], whole.index[mine])]), lambda images: images)
        for seed in range(4):
            batch = batch_of(labels, seed)
            step(Batch(*(reducer.mine(t) for t in (batch.images, batch.labels, batch.index))))
        return step.model.state_dict()

    alone = work(Reducer())
    first, second = run_ranks(2, work)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12, msg=name)


# Runs


def words_of(digits_words, *more):
    """Twelve plain iterations, then what `more` says."""
    return [*digits_words, "stages.end_to_end.method=plain", *more]


def make(digits_words, case, name="oltr", *more):
    return Trainer(
        prepare(load_recipe(RECIPE, words_of(digits_words, f"stages.memory={STAGES[case]}", f"name={name}", *more)))
    )


def measured(result):
    return {key: result[key] for key in ("top1", "per_class_accuracy", "ece", "selected_iteration")}


@pytest.mark.parametrize("case", STAGES)
def test_a_run_starts_from_the_exact_centroids_and_trains_what_the_options_say(digits_words, case):
    trainer, seen = make(digits_words, case), []
    first_pass = OltrStep.first_pass

    def spy(step, batches, prepare):
        kept = list(batches)
        first_pass(step, iter(kept), prepare)
        assert not step.model.training
        features = torch.cat([step.model.features(prepare(b.images)) for b in kept]).double()
        labels = torch.cat([b.labels for b in kept])
        assert sorted(torch.cat([b.index for b in kept]).tolist()) == list(range(len(labels)))
        expected = torch.stack([features[labels == c].mean(0) for c in range(10)]).float()
        torch.testing.assert_close(step.model.head.centroids.detach(), expected, rtol=1e-6, atol=1e-7)
        seen.append(len(labels))

    OltrStep.first_pass = spy
    try:
        result = trainer.fit()
    finally:
        OltrStep.first_pass = first_pass
    assert seen == [trainer.context.counts.counts.sum()]
    assert result["iterations"] == 18
    folder = trainer.folder / "checkpoints"
    before = torch.load(folder / "final_end_to_end.pt", weights_only=True)["model"]
    last = final_state(trainer.folder)["step"]["model"]
    moved = {n for n in before if n.startswith("backbone.") and not torch.equal(before[n], last[n])}
    assert bool(moved) == (not case.startswith("frozen"))
    attention = [n for n in last if ".global_pool." in n]
    assert bool(attention) == case.endswith("attention")
    assert all(last[n].any() for n in attention)  # among them the mask, which was zero
    best = torch.load(folder / "final_memory.pt", weights_only=True)["model"]
    assert torch.equal(trainer.model.head.centroids, best["head.centroids"])
    lines = [line for line in log_lines(trainer.folder) if line["kind"] == "train" and line["stage"] == "memory"]
    assert all(line["attract"] > 0 for line in lines)


# 12 is between the stages, 16 inside the second.
@pytest.mark.parametrize(("case", "at"), [("attention", 12), ("trained", 16), ("frozen-attention", 16)])
def test_a_resumed_run_agrees_bit_for_bit(digits_words, case, at):
    more = ["model.drop_rate=0.2"]
    whole = make(digits_words, case, "whole", *more)
    result = whole.fit()
    with pytest.raises(Interrupted):
        stop_after(make(digits_words, case, "stopped", *more), at).fit()
    resumed = make(digits_words, case, "stopped", *more)
    again = resumed.fit()
    assert_same(comparable(whole.folder), comparable(resumed.folder))
    assert measured(result) == measured(again)


def test_a_head_retrained_behind_oltr_is_a_linear_one_again_and_resumes(digits_words):
    third = "{method: crt, batch_size: 32, lr: 0.1, sampling: class_balanced, iterations: 4, evaluate_every: 2}"
    whole = make(digits_words, "attention", "whole", f"stages.third={third}")
    result = whole.fit()
    with pytest.raises(Interrupted):
        stop_after(make(digits_words, "attention", "stopped", f"stages.third={third}"), 20).fit()
    assert measured(make(digits_words, "attention", "stopped", f"stages.third={third}").fit()) == measured(result)
    assert isinstance(whole.model.head, LinearHead)


HEAD = "batch_size: 32, lr: 0.1, sampling: class_balanced, iterations: 4, evaluate_every: 2"
LAS = f"stages.scaled={{method: las, loss: label_aware_smoothing, {HEAD}}}"
CRT = f"stages.new={{method: crt, {HEAD}}}"
TAU = "{method: tau_norm, lr: 0.1, iterations: 21, evaluate_every: 1, select: best, sampling: instance}"


@pytest.mark.parametrize("last", [STAGES["trained"], TAU], ids=["oltr", "tau_norm"])
def test_a_new_head_after_a_scaled_one_is_a_plain_one(digits_words, last):
    """What takes a plain linear head is refused behind las, and trains behind las and crt."""
    with pytest.raises(ValueError, match="plain linear head"):
        load_recipe(RECIPE, words_of(digits_words, LAS, f"stages.last={last}"))
    recipe = load_recipe(RECIPE, words_of(digits_words, LAS, CRT, f"stages.last={last}"))
    assert Trainer(prepare(recipe)).fit()["top1"] > 0


# Refusals

ALONE = ["stages.end_to_end=null", f"stages.memory={STAGES['trained']}"]
REFUSED = {
    "alone": (ALONE, "'oltr' without a stage before it"),
    "fresh": (
        [f"stages.memory={STAGES['trained'].replace('method', 'start: fresh, method')}"],
        "without a stage before",
    ),
    "cosine": (["model.head=cosine", f"stages.memory={STAGES['trained']}"], "with model.head 'cosine'"),
    "twice": (
        [f"stages.memory={STAGES['trained']}", f"stages.more={STAGES['trained']}"],
        "after a stage of method 'oltr'",
    ),
    "side": (
        [f"stages.memory={STAGES['attention'].replace('side: 2', 'side: 7')}"],
        "are 2 x 2; set attention_side: 2",
    ),
    "margin": ([f"stages.memory={STAGES['trained'].replace('1000', '-1')}"], "margin: is -1"),
    "factor": (
        [f"stages.memory={STAGES['trained'].replace('margin: 1000', 'backbone_lr_factor: 0')}"],
        "backbone_lr_factor: is 0",
    ),
    "classes": (
        [f"stages.memory={STAGES['trained'].replace('method', 'classes: few, method')}"],
        "for all classes at once",
    ),
    "tau": (
        [
            f"stages.memory={STAGES['trained']}",
            "stages.tau={method: tau_norm, lr: 0.1, iterations: 21, sampling: instance}",
        ],
        "oltr and expert rebuild it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_an_oltr_stage_is_refused_by_the_recipe(digits_words, case):
    words, expected = REFUSED[case]
    given = [*digits_words[:5], *words] if case == "alone" else words_of(digits_words, *words)
    with pytest.raises(ValueError, match=expected):
        load_recipe(RECIPE, given)


def test_a_checkpoint_without_a_head_is_refused_before_work(digits_words, tmp_path):
    model = build_model("cifar_resnet8", num_classes=10)
    torch.save({k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}, tmp_path / "features.pt")
    words = [*digits_words[:5], *ALONE, f"model.checkpoint={tmp_path / 'features.pt'}"]
    with pytest.raises(ValueError, match="goes on from a trained head"):
        Trainer(prepare(load_recipe(RECIPE, words)))
