"""PaCo: the loss, whole iterations and the queue against slow versions of themselves; runs, resuming, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from short_runs import RECIPE, assert_same, comparable, stop_after
from test_augment import NoSync

from fastlt.losses import build_loss
from fastlt.losses.contrastive import parametric_contrastive
from fastlt.models import build_model
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, ClassCounts
from fastlt.steps import StepParts
from fastlt.steps.paco import KeyEncoder, KeyQueue, PacoStep

CLASSES, LR = 5, 0.1
COUNTS = ClassCounts(np.array([40, 20, 10, 5, 2]), tuple("abcde"))


# The loss, in numpy


def slow_losses(class_logits, similarities, labels, other_labels, own, alpha):
    """One anchor and one candidate at a time."""
    losses = []
    for i, y in enumerate(labels):
        terms = [(z, 1.0 if c == y else 0.0) for c, z in enumerate(class_logits[i])]
        for j, s in enumerate(similarities[i]):
            if j != own[i]:
                terms.append((s, alpha if other_labels[j] == y else 0.0))
        total = sum(np.exp(z) for z, _ in terms)
        losses.append(-sum(w * np.log(np.exp(z) / total) for z, w in terms) / sum(w for _, w in terms))
    return np.array(losses)


def drawn(others=20, b=6, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, b)
    other_labels = np.concatenate([labels, draw.integers(0, CLASSES, others - b)])
    return draw.normal(size=(b, CLASSES)), 4 * draw.normal(size=(b, others)), labels, other_labels, np.arange(b)


def fast_losses(class_logits, similarities, labels, other_labels, own, alpha):
    tensors = map(torch.from_numpy, (class_logits, similarities, labels, other_labels, own))
    return parametric_contrastive(*tensors, alpha).numpy()


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
def test_the_loss_equals_the_formula(alpha):
    arguments = drawn()
    np.testing.assert_allclose(fast_losses(*arguments, alpha), slow_losses(*arguments, alpha), rtol=1e-12)


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    class_logits, similarities, labels, other_labels, own = map(torch.from_numpy, drawn())
    similarities = (200 * similarities).float().requires_grad_()
    parametric_contrastive(class_logits.float(), similarities, labels, other_labels, own, 0.05).sum().backward()
    assert torch.isfinite(similarities.grad).all()
    assert not similarities.grad[torch.arange(6), own].any()


@pytest.mark.parametrize("loss", ["cross_entropy", "balanced_softmax"])
def test_without_other_samples_it_is_the_loss_of_the_class_logits(loss):
    class_logits, _, labels, _, own = map(torch.from_numpy, drawn())
    plain = build_loss(loss, COUNTS)
    shifted = class_logits + plain.log_prior if loss == "balanced_softmax" else class_logits
    alone = parametric_contrastive(shifted, torch.zeros(6, 1).double(), labels, labels[:1], own * 0, 0.05)
    torch.testing.assert_close(alone, plain(class_logits, labels), rtol=1e-12, atol=0)


def test_as_alpha_and_the_samples_share_vanish_it_tends_to_cross_entropy():
    class_logits, similarities, labels, other_labels, own = drawn()
    plain = F.cross_entropy(torch.from_numpy(class_logits), torch.from_numpy(labels), reduction="none").numpy()
    distance = [
        np.abs(fast_losses(class_logits, similarities - far, labels, other_labels, own, 10.0**-far) - plain).max()
        for far in (2, 8, 30)
    ]
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-9


# The queue and the key encoder


def test_the_queue_is_first_in_first_out_and_wraps_around():
    queue, kept = KeyQueue(7, 2, like=torch.zeros(1)), []
    assert queue.content[0].shape == (0, 2)
    for start, size in ((0, 3), (3, 3), (6, 3), (9, 7), (16, 2)):
        numbers = torch.arange(start, start + size)
        queue.put(torch.stack([numbers, -numbers], 1).float(), numbers % 4)
        kept = (kept + numbers.tolist())[-7:]
        keys, labels = queue.content
        assert sorted(keys[:, 0].int().tolist()) == kept
        assert torch.equal(keys[:, 1], -keys[:, 0])
        assert torch.equal(labels, keys[:, 0].long() % 4)
        assert queue.pointer == (start + size) % 7
    resumed = KeyQueue(7, 2, like=torch.zeros(1))
    resumed.load_state_dict(copy.deepcopy(queue.state_dict()))
    for q in (queue, resumed):
        q.put(torch.full((3, 2), 50.0), torch.ones(3, dtype=torch.int64))
    assert_same(queue.state_dict(), resumed.state_dict())


class Views:
    """uint8 to float64 around 0; a second view is mirrored and brighter."""

    def __init__(self, second=False):
        self.second = second

    def __call__(self, images, dtype=None):
        out = images.double() / 128 - 1
        return out.flip(3) * 1.1 + 0.05 if self.second else out

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def make(loss="balanced_softmax", **options):
    torch.manual_seed(1)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double()
    options = PacoStep.Options(**{"dim": 6, "queue": 20, "alpha": 0.05, "temperature": 0.2, "momentum": 0.9, **options})
    PacoStep.prepare_model(model, options, seed=3)
    parts = StepParts(
        model=model,
        loss=build_loss(loss, COUNTS),
        optimizer=torch.optim.SGD(PacoStep.parameter_groups(model, options), lr=LR, momentum=0.9, weight_decay=5e-4),
        augment=Views(),
        meta_augment=None,
        second_augment=Views(second=True),
        class_counts=COUNTS,
    )
    step = PacoStep(parts, options)
    step.train_mode()
    return step


def batches(number, size=8):
    generator = torch.Generator().manual_seed(2)
    for _ in range(number):
        images = torch.randint(0, 256, (size, 3, 12, 12), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        yield Batch(images, labels, torch.arange(size))


@pytest.mark.parametrize("loss", ["cross_entropy", "balanced_softmax"])
@pytest.mark.parametrize("queue", [20, 0])
def test_iterations_equal_the_slow_reference(loss, queue):
    """Five iterations of eight keys each go two and a half times around a queue of twenty (sixteen is no multiple)."""
    step = make(loss, queue=queue)
    model, key_model, remembered = copy.deepcopy(step.model), copy.deepcopy(step.model), []
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, foreach=False)
    shift = torch.log(torch.tensor(COUNTS.counts / COUNTS.counts.sum())) if loss == "balanced_softmax" else 0.0
    for batch in batches(5):
        output = step(batch)
        with torch.no_grad():
            for k, q in zip(key_model.parameters(), model.parameters(), strict=True):
                k.copy_(0.9 * k + 0.1 * q)
            keys = key_model.auxiliary(key_model.backbone(Views(second=True)(batch.images)))
        features = model.backbone(Views()(batch.images))
        logits = model.head(features) + shift
        queries = model.auxiliary(features)
        total = 0.0
        for i, y in enumerate(batch.labels.tolist()):
            scores, weights = list(logits[i]), [1.0 if c == y else 0.0 for c in range(CLASSES)]
            others = [(q, c) for j, (q, c) in enumerate(zip(queries, batch.labels, strict=True)) if j != i]
            others += [*zip(keys, batch.labels, strict=True), *remembered]
            for other, c in others:
                scores.append((queries[i] * other).sum() / 0.2)
                weights.append(0.05 if c == y else 0.0)
            log_share = torch.log_softmax(torch.stack(scores), 0)
            total = total - (torch.tensor(weights).double() * log_share).sum() / sum(weights)
        objective = total / len(batch)
        torch.testing.assert_close(output.loss, objective.detach(), rtol=1e-6, atol=0)
        sgd.zero_grad()
        objective.backward()
        sgd.step()
        remembered = [*remembered, *zip(keys, batch.labels, strict=True)][-queue:] if queue else []
    for (name, fast), slow in zip(step.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6, msg=name)
    own = [*step.key_encoder.parameters()]
    for k, slow in zip(own, [*key_model.backbone.parameters(), *key_model.auxiliary.parameters()], strict=True):
        torch.testing.assert_close(k, slow, rtol=1e-5, atol=1e-6)
        assert k.grad is None
        assert not k.requires_grad


def test_gradients_reach_centres_encoder_and_projection_but_no_key():
    step = make()
    seen = {}
    step.descend = lambda objective: seen.update(
        zip(dict(step.model.named_parameters()), torch.autograd.grad(objective, step.parameters), strict=True)
    )
    before = copy.deepcopy(step.key_encoder.state_dict())
    step(next(batches(1)))
    for name in ("backbone.conv1.weight", "head.weight", "head.bias", "auxiliary.layers.0.weight"):
        assert seen[name].abs().sum() > 0, name
    assert all(p.grad is None for p in step.key_encoder.parameters())
    assert_same(before, step.key_encoder.state_dict())  # nothing has moved yet that it could follow
    assert not step.queue.content[0].requires_grad


def test_the_key_encoder_moves_a_share_of_the_way_and_keeps_no_statistics():
    step = make(momentum=0.75)
    encoder = KeyEncoder(step.model)
    assert all("running" not in name for name in encoder.state_dict())
    old = [p.clone() for p in encoder.parameters()]
    with torch.no_grad():
        for p in step.model.parameters():
            p.add_(1.0)
    encoder.follow(step.model, 0.75)
    for p, before in zip(encoder.parameters(), old, strict=True):
        torch.testing.assert_close(p, before + 0.25)
    images = torch.rand(4, 3, 12, 12).double()
    assert torch.equal(encoder(images), encoder.eval()(images))
    torch.testing.assert_close(encoder(images).norm(dim=1), torch.ones(4).double())


def test_an_iteration_never_waits_for_the_device():
    step = make()
    for number, batch in enumerate(batches(4)):
        step.queue.pointer = 17 if number == 2 else step.queue.pointer  # wraps in the middle of a batch
        with NoSync():
            step(batch)


def test_a_second_crop_of_the_loader_is_the_second_view():
    batch = next(batches(1))
    other = Batch(batch.images, batch.labels, batch.index, second_crop=batch.images.roll(3, 2))
    seen = []
    for one in (batch, other):
        step = make()
        step(one)
        seen.append(step.queue.content[0].clone())
    assert not torch.equal(*seen)


# Runs


def words_of(digits_words, *more):
    stage = "stages.end_to_end"
    options = [f"{stage}.method=paco", f"{stage}.options={{dim: 8, queue: 80}}", f"{stage}.meta_batch_size=null"]
    views = ["data.augment=[{random_crop: {padding: 1}}]", "data.second_augment=[{gaussian_blur: {p: 0.5}}]"]
    return [*digits_words, *options, *views, f"{stage}.loss=balanced_softmax", *more]


def test_resumed_and_uninterrupted_runs_agree_bit_for_bit(digits_words):
    def run(name):
        return Trainer(prepare(load_recipe(RECIPE, words_of(digits_words, f"name={name}", "model.drop_rate=0.2"))))

    whole = run("whole")
    whole.fit()
    stopped = stop_after(run("stopped"), 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = run("stopped")
    resumed.fit()
    one = comparable(whole.folder)
    assert_same(one, comparable(resumed.folder))
    assert one["step"]["queue"]["filled"] == 80
    views = [one["processes"][0]["step"][key]["generator"] for key in ("augment", "second_augment")]
    assert not torch.equal(*views)


def test_the_best_checkpoint_evaluates_alone_and_starts_other_runs(digits_words):
    second = "{method: crt, batch_size: 32, lr: 0.1, sampling: class_balanced, iterations: 4, evaluate_every: 2}"
    trainer = Trainer(prepare(load_recipe(RECIPE, words_of(digits_words, f"stages.classifier={second}"))))
    assert 0 <= trainer.fit()["top1"] <= 1
    best = trainer.folder / "checkpoints" / "best_end_to_end.pt"
    names = torch.load(best, weights_only=True)["model"]
    assert {n.split(".")[0] for n in names} == {"backbone", "head", "auxiliary"}
    model = build_model(trainer.context.recipe.model.name, num_classes=10, image_size=8, checkpoint=best)
    assert model.head_is_trained
    assert not hasattr(model, "auxiliary")
    assert torch.equal(model.head.weight, names["head.weight"])


def test_random_resized_crops_of_a_cropping_loader_come_in_pairs(digits_words):
    words = words_of(digits_words, "data.train_crop=random_resized", "data.loader=torch", "data.num_workers=0")
    trainer = Trainer(prepare(load_recipe(RECIPE, words)))
    loaders = trainer.build_stage("end_to_end").loaders
    batch = next(iter(loaders.train.epoch(0)))
    assert (batch.images != batch.second_crop).any()
    loaders.close()
    assert trainer.fit()["iterations"] == 12


REFUSED = {
    "loss": (["loss=focal"], "log pi is added"),
    "smoothing": (["loss_options={label_smoothing: 0.1}"], "has label_smoothing, which paco's loss does not take"),
    "queue": (["options={queue: 16}"], "options.queue: is 16 with batch_size 64"),
    "alpha": (["options={alpha: -1}"], "alpha: is -1"),
    "temperature": (["options={temperature: 0}"], "temperature: is 0"),
    "momentum": (["options={momentum: 1.5}"], "momentum: is 1.5"),
    "dim": (["options={dim: 0}"], "dim: is 0"),
    "negative": (["options={queue: -1}"], "queue: is -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_the_recipe(digits_words, case):
    words, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected):
        load_recipe(RECIPE, words_of(digits_words, *(f"stages.end_to_end.{w}" for w in words)))


def test_a_second_augmentation_without_a_second_view_is_refused(digits_words):
    with pytest.raises(ValueError, match=r"data\.second_augment: is set, but no stage .*: paco"):
        load_recipe(RECIPE, [*digits_words, "data.second_augment=[flip]"])


def test_a_mistake_in_the_second_views_augmentation_is_named(digits_words):
    with pytest.raises(ValueError, match=r"data\.second_augment: .*did you mean 'grayscale'"):
        load_recipe(RECIPE, words_of(digits_words, "data.second_augment=[{greyscale: {p: 0.2}}]"))
