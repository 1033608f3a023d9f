"""LFME: its schedules and losses against loops in float64, experts on their part, resuming, and what is refused."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from short_runs import RECIPE, assert_same, comparable, log_lines, stop_after
from thread_ranks import SEEDED, run_ranks
from torch import nn

from fastlt.device.distributed import Reducer
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import Classifier, LinearHead
from fastlt.models.restricted_head import RestrictedHead
from fastlt.recipe import load_recipe
from fastlt.run.class_history import read_class_history
from fastlt.run.preflight import check_dataset, prepare
from fastlt.run.stage import prepare_model
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StageModel, StepParts
from fastlt.steps.lfme import (
    ExpertStep,
    LfmeStep,
    curriculum_weights,
    scaled_in_class,
    self_paced_weights,
)

# 20 training images of 5 classes: two are many-shot, two medium-shot, one few-shot.
COUNTS = ClassCounts(np.array([7, 6, 3, 3, 1]), tuple("abcde"), shots=(5, 2))
LABELS = torch.from_numpy(np.repeat(np.arange(5), COUNTS.counts))
WIDTH, CLASSES = 4, 5
GROUPS = {"many": [0, 1], "medium": [2, 3], "few": [4]}


# Formulas


def softmax(z):
    return [math.exp(v) / sum(math.exp(u) for u in z) for v in z]


def test_an_expert_teaches_less_as_the_student_comes_near():
    student = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.0], dtype=torch.float64)
    expert = torch.tensor([0.5] * 7 + [0.0], dtype=torch.float64)
    expected = []
    for a, e in zip(student.tolist(), expert.tolist(), strict=True):
        expected.append(0.0 if a >= e else 1.0 if a < 0.3 * e else (e - a) / e / 0.7)
    np.testing.assert_allclose(self_paced_weights(student, expert, 0.3).numpy(), expected, rtol=1e-12)
    assert expected[0] == 1
    assert 0 < expected[3] < 1
    assert expected[-3:] == [0, 0, 0]


def test_the_curriculum_goes_from_the_start_weights_to_one_and_stays_there():
    start = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    for epoch in range(8):
        expected = [min(1.0, v + (1 - v) * epoch / 4) for v in start.tolist()]
        np.testing.assert_allclose(curriculum_weights(start, epoch, 4).numpy(), expected, rtol=1e-12)
    assert torch.equal(curriculum_weights(start, 0, 0), torch.ones(3, dtype=torch.float64))


def scaled_by_loops(values, labels, floors):
    result = []
    for v, y in zip(values, labels, strict=True):
        members = [u for u, other in zip(values, labels, strict=True) if other == y]
        low, high = min(members), max(members)
        result.append(1.0 if low == high else floors[y] + (1 - floors[y]) * (v - low) / (high - low))
    return result


def test_confidences_are_scaled_in_each_class_from_its_floor_to_one():
    values = np.random.default_rng(0).random(len(LABELS))
    values[LABELS == 3] = 0.25
    floors = [0.1, 0.2, 0.5, 0.6, 1.0]
    found = scaled_in_class(torch.from_numpy(values), LABELS, torch.tensor(floors, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), scaled_by_loops(values, LABELS.tolist(), floors), rtol=1e-12)
    assert (found[LABELS >= 3] == 1).all()
    assert found.min() == 0.1


# Experts


def test_a_restricted_head_is_the_head_of_the_known_classes_alone():
    torch.manual_seed(0)
    inner = LinearHead(WIDTH, CLASSES).double()
    head = RestrictedHead(inner)
    x, labels = torch.randn(6, WIDTH, dtype=torch.float64), torch.tensor([2, 3, 3, 2, 2, 3])
    assert torch.equal(head(x), inner(x))
    head.known.copy_(torch.tensor([False, False, True, True, False]))
    F.cross_entropy(head(x), labels).backward()

    small = LinearHead(WIDTH, 2).double()
    with torch.no_grad():
        small.weight.copy_(inner.weight[2:4])
        small.bias.copy_(inner.bias[2:4])
    loss = F.cross_entropy(small(x), labels - 2)
    loss.backward()
    torch.testing.assert_close(F.cross_entropy(head(x), labels), loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(inner.weight.grad[2:4], small.weight.grad, rtol=1e-14, atol=1e-16)
    assert not inner.weight.grad[[0, 1, 4]].any()
    assert not inner.bias.grad[[0, 1, 4]].any()
    assert set(head(x).argmax(1).tolist()) <= {2, 3}


# The student's iteration


class Affine(nn.Module):
    """A backbone with something to learn, on images of one column."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, images):
        return torch.tanh(self.linear(images[:, 0, :, 0]))


def network(seed, known=None):
    torch.manual_seed(seed)
    model = Classifier(Affine(), LinearHead(WIDTH, CLASSES).double())
    if known is not None:
        model.head = RestrictedHead(model.head)
        model.head.known.copy_(torch.from_numpy(known))
        model.requires_grad_(False).eval()
    return model


def mask_of(classes):
    mask = np.zeros(CLASSES, dtype=bool)
    mask[classes] = True
    return mask


def images_of(number, seed):
    return torch.randn(number, 3, WIDTH, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def identity(images):
    return images


def make_step(groups, reducer=None, lr=0.3, unseen=(), **options):
    """A student whose experts know `groups`; the validation set is three images a class, none of those `unseen`."""
    with SEEDED:
        student = network(0)
        experts = [network(10 + i, mask_of(known)) for i, known in enumerate(groups.values())]
    reducer = reducer or Reducer()
    validation = torch.arange(3 * CLASSES) % CLASSES
    held = torch.tensor([label not in unseen for label in validation.tolist()])
    images = images_of(len(validation), 9)[held]
    accuracy = ClassAccuracy(images, validation[held], CLASSES, prepare=identity, refresh="epoch", reducer=reducer)
    options = LfmeStep.Options(experts=list(groups), **options)
    models = {name: StageModel(e, mask_of(known)) for (name, known), e in zip(groups.items(), experts, strict=True)}
    optimizer = torch.optim.SGD(LfmeStep.parameter_groups(student, options), lr=lr)
    loss = build_loss("cross_entropy", COUNTS)
    parts = StepParts(
        student, loss, optimizer, identity, None, COUNTS, class_accuracy=accuracy, reducer=reducer, stage_models=models
    )
    return LfmeStep(parts, options)


def training_set():
    return Batch(images_of(len(LABELS), 3), LABELS, torch.arange(len(LABELS)))


def pieces(batch, size=6):
    order = range(0, len(batch), size)
    return iter(
        [Batch(batch.images[a : a + size], batch.labels[a : a + size], batch.index[a : a + size]) for a in order]
    )


def accuracy_on(model, known):
    """Mean over the known classes of the share of right answers among the known classes, image by image."""
    labels, images = torch.arange(3 * CLASSES) % CLASSES, images_of(3 * CLASSES, 9)
    shares = []
    for c in known:
        mine = [i for i, y in enumerate(labels.tolist()) if y == c]
        shares.append(sum(int(model(images[i : i + 1]).argmax()) == c for i in mine) / len(mine))
    return sum(shares) / len(shares)


@pytest.mark.parametrize("groups", [GROUPS, {"many": [0, 1], "few": [4]}], ids=["all", "without-medium"])
def test_the_first_pass_finds_start_weights_and_accuracies_of_the_experts(groups):
    step, batch = make_step(groups), training_set()
    step.first_pass(pieces(batch), identity)
    mean_images = {name: np.mean([COUNTS.counts[c] for c in known]) for name, known in groups.items()}
    expected = [1.0] * len(batch)
    for (name, known), expert in zip(groups.items(), step.experts, strict=True):
        members = [i for i, y in enumerate(LABELS.tolist()) if y in known]
        confidences = []
        for i in members:
            z = expert.model(batch.images[i : i + 1])[0].tolist()
            confidences.append(softmax([z[c] for c in known])[known.index(int(LABELS[i]))])
        floor = min(mean_images.values()) / mean_images[name]
        scaled = scaled_by_loops(confidences, [int(LABELS[i]) for i in members], [floor] * CLASSES)
        for i, weight in zip(members, scaled, strict=True):
            expected[i] = weight
    np.testing.assert_allclose(step.instance_weights.numpy(), expected, rtol=1e-5)
    assert min(expected) < 0.2
    found = step.expert_accuracy.tolist()
    assert found == pytest.approx([accuracy_on(e.model, k) for e, k in zip(step.experts, groups.values(), strict=True)])
    assert max(found) > 0


def test_a_class_without_validation_images_counts_for_no_expert():
    """Others' mean stands for its accuracy elsewhere; of an expert, others are classes that it does not know."""
    groups = {"many": [0, 1, 2], "few": [3, 4]}
    step, whole = make_step(groups, unseen=[1]), make_step(groups)
    for one in (step, whole):
        one.first_pass(pieces(training_set()), identity)
    assert [known.tolist() for known in step.measured] == [[0, 2], [3, 4]]
    expected = [accuracy_on(step.experts[0].model, [0, 2]), accuracy_on(step.experts[1].model, [3, 4])]
    assert step.expert_accuracy.tolist() == pytest.approx(expected)
    assert expected[0] != pytest.approx(whole.expert_accuracy[0].item())
    step.expert_accuracy.fill_(1.0)
    student = copy.deepcopy(step.model)
    output = step(training_set())
    ours = [accuracy_on(student, known) for known in ([0, 2], [3, 4])]
    expected = self_paced_weights(torch.tensor(ours), torch.ones(2), step.options.distil_until)
    assert [output.metrics[f"expert_weight_{name}"].item() for name in groups] == pytest.approx(expected.tolist())


def test_an_iteration_descends_the_loss_written_out():
    step, batch = make_step(GROUPS, curriculum_epochs=4, temperature=2.0), training_set()
    step.first_pass(pieces(batch), identity)
    # Not what the random networks happen to have: one weight between 0 and 1, one of each.
    step.expert_accuracy.copy_(torch.tensor([1.0, 0.6, 0.05]))
    step.start_epoch(1)
    student = copy.deepcopy(step.model)
    output = step(batch)

    accuracies = [accuracy_on(student, known) for known in GROUPS.values()]
    losses = -torch.log_softmax(student(batch.images), 1)[torch.arange(len(LABELS)), LABELS]
    start = step.instance_weights.double()
    objective = sum((v + (1 - v) / 4) * loss for v, loss in zip(start, losses, strict=True)) / len(LABELS)
    for known, expert, theirs, ours in zip(GROUPS.values(), step.experts, [1.0, 0.6, 0.05], accuracies, strict=True):
        weight = 0.0 if ours >= theirs else 1.0 if ours < 0.3 * theirs else (theirs - ours) / theirs / 0.7
        q = torch.softmax(expert.model(batch.images)[:, known] / 2, 1)
        p = torch.softmax(student(batch.images)[:, known] / 2, 1)
        objective = objective + weight * (q * (q / p).log()).sum(1).mean()
    assert output.loss.item() == pytest.approx(objective.item(), rel=1e-6)
    gradients = torch.autograd.grad(objective, list(student.parameters()))
    for (name, value), gradient in zip(student.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(
            step.model.get_parameter(name), value - 0.3 * gradient, rtol=1e-6, atol=1e-7, msg=name
        )
    for expert in step.experts:
        assert all(p.grad is None for p in expert.model.parameters())


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_one_expert_for_every_class_without_curriculum_is_plain_distillation(temperature):
    step = make_step({"all": list(range(CLASSES))}, curriculum_epochs=0, temperature=temperature)
    batch = training_set()
    step.first_pass(pieces(batch), identity)
    step.expert_accuracy.fill_(1e6)  # never reached: its weight stays 1
    step.start_epoch(0)
    student, teacher = copy.deepcopy(step.model), step.experts[0].model
    output = step(batch)
    logits = student(batch.images)
    plain = F.cross_entropy(logits, LABELS) + F.kl_div(
        F.log_softmax(logits / temperature, 1), F.softmax(teacher(batch.images) / temperature, 1), reduction="batchmean"
    )
    assert output.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert output.metrics["instance_weight"] == 1


def test_two_ranks_with_their_shares_do_what_one_does_with_everything():
    def work(reducer):
        step, whole = make_step(GROUPS, reducer, curriculum_epochs=3), training_set()
        mine = slice(reducer.rank, None, reducer.world_size)
        step.first_pass(pieces(Batch(whole.images[mine], whole.labels[mine], whole.index[mine]), 3), identity)
        for epoch in range(4):
            step.start_epoch(epoch)
            step(Batch(*(reducer.mine(t) for t in (whole.images, whole.labels, whole.index))))
        return {
            **step.model.state_dict(),
            "weights": step.instance_weights.double(),
            "accuracy": step.expert_accuracy.double(),
        }

    alone = work(Reducer())
    first, second = run_ranks(2, work)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-9, msg=name)


# Runs

EXPERT = "method: expert, batch_size: 32, lr: 0.05, iterations: 4, evaluate_every: 2"
STUDENT = (
    "method: lfme, start: fresh, batch_size: 32, lr: 0.05, sampling: class_balanced, iterations: 14, "
    "evaluate_every: 7, accuracy: {refresh: epoch}, options: {experts: [many, medium, few], curriculum_epochs: 2}"
)
STAGES = [
    "stages.end_to_end=null",
    f"stages.many={{{EXPERT}, classes: many}}",
    f"stages.medium={{{EXPERT}, classes: medium, start: fresh}}",
    f"stages.few={{{EXPERT}, classes: few, start: fresh}}",
    f"stages.student={{{STUDENT}}}",
]


def make(digits_words, *more):
    return Trainer(prepare(load_recipe(RECIPE, [*digits_words[:5], *STAGES, *more])))


def test_experts_see_their_classes_only_and_the_student_learns_from_them(digits_words, monkeypatch):
    trainer, seen, students = make(digits_words), {}, []
    expert_call, first_pass = ExpertStep.__call__, LfmeStep.first_pass

    def watch(step, batch, meta_batch=None):
        group = tuple(step.model.head.known.tolist())
        seen.setdefault(group, set()).update(batch.labels.tolist())
        return expert_call(step, batch, meta_batch)

    def look(step, batches, prepare):
        students.append(step)
        for name, expert in zip(step.names, step.experts, strict=True):
            trained = torch.load(trainer.folder / "checkpoints" / f"final_{name}.pt", weights_only=True)["model"]
            assert_same(dict(expert.model.state_dict()), trained)
            assert not expert.model.training
        first_pass(step, batches, prepare)

    monkeypatch.setattr(ExpertStep, "__call__", watch)
    monkeypatch.setattr(LfmeStep, "first_pass", look)
    result = trainer.fit()
    masks = trainer.context.counts.shot_masks()
    assert seen == {tuple(mask.tolist()): set(np.flatnonzero(mask).tolist()) for mask in masks.values()}
    assert result["iterations"] == 26
    names = sorted(p.name for p in (trainer.folder / "checkpoints").glob("*.pt"))  # and the version before each
    stages = ["few", "many", "medium", "student"]
    assert names == [*(f"{kind}_{stage}.pt" for kind in ("best", "final") for stage in stages), "last.pt"]
    weights = students[0].instance_weights
    few = masks["few"][trainer.context.dataset.labels("train")]
    assert (weights[torch.from_numpy(few)] == 1).all()
    assert weights.min() < 0.3
    assert isinstance(trainer.model.head, LinearHead)
    lines = [line for line in log_lines(trainer.folder) if line["kind"] == "train" and line["stage"] == "student"]
    shown = [line["instance_weight"] for line in lines]
    # 13 batches an epoch: by then the weights have grown half of the way.
    assert max(shown[:13]) < shown[13] < 1
    records, _ = read_class_history(trainer.folder / "class_history.npy")
    assert {record.stage for record in records} == {"many", "medium", "few", "student"}
    for record in records:
        known = masks.get(record.stage)
        if known is not None:
            assert not record.values["accuracy"][~known].any()


def test_stages_that_start_afresh_have_weights_of_their_own_that_the_seed_decides(digits_words):
    def start(name, *more):
        trainer = make(digits_words, *more)
        model = prepare_model(trainer.context, trainer.model, trainer.context.recipe.stages[name])
        return model.state_dict()["backbone.conv1.weight"].clone()

    many, medium, few = (start(name) for name in ("many", "medium", "few"))
    assert torch.equal(medium, start("medium"))
    for other in (many, few, start("medium", "seed=1")):
        assert not torch.equal(medium, other)
    before = torch.get_rng_state()
    trainer = make(digits_words)
    before = torch.get_rng_state()
    prepare_model(trainer.context, trainer.model, trainer.context.recipe.stages["few"])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_agrees_bit_for_bit(digits_words):
    more = ["model.drop_rate=0.2"]
    whole = make(digits_words, *more, "name=whole")
    result = whole.fit()
    one = comparable(whole.folder)
    # Inside an expert, between two, between the last of them and the student, inside the student.
    for at in (6, 8, 12, 20):
        with pytest.raises(Interrupted):
            stop_after(make(digits_words, *more, f"name=stopped{at}"), at).fit()
        resumed = make(digits_words, *more, f"name=stopped{at}")
        again = resumed.fit()
        assert_same(one, comparable(resumed.folder), f"stopped at {at}")
        assert result["per_class_accuracy"] == again["per_class_accuracy"]


def test_a_student_goes_on_to_further_stages(digits_words):
    crt = "stages.crt={method: crt, batch_size: 32, lr: 0.1, sampling: class_balanced, iterations: 2}"
    oltr = "stages.oltr={method: oltr, batch_size: 32, lr: 0.1, sampling: class_balanced, iterations: 2}"
    result = make(digits_words, oltr, crt).fit()
    assert result["iterations"] == 30


# Refusals


def student(old, new):
    return [f"stages.student={{{STUDENT.replace(old, new)}}}"]


REFUSED = {
    "unknown": (student("few]", "fww]"), r"names \['fww'\], but the stages before this one are"),
    "smoothing": (["stages.many.loss_options={label_smoothing: 0.1}"], "smooths labels with classes: many"),
    "none": (student("[many, medium, few]", "[]"), "at least one"),
    "missing": (student("experts: [many, medium, few], ", ""), "experts"),
    "twice": (student("[many, medium, few]", "[many, many]"), "each once"),
    "overlap": (["stages.medium.classes=many"], "each class has one expert at most"),
    "all-and-few": (["stages.medium.classes=all"], "each class has one expert at most"),
    "method": (["stages.many.method=plain", "stages.many.classes=all"], "are stages of methods {'many': 'plain'}"),
    "previous": (student("start: fresh", "start: previous"), "set start: fresh"),
    "experts-previous": (["stages.few.start=previous"], "behind an expert, whose head knows a part of the classes"),
    "plain-previous": (
        ["stages.student={method: plain, lr: 0.1, iterations: 1}"],
        "behind an expert, whose head knows",
    ),
    "lws-previous": (
        ["stages.student={method: lws, sampling: class_balanced, lr: 0.1, iterations: 1}"],
        "take method crt, balms, with a new head",
    ),
    "plain-part": (["stages.many.method=plain"], "method 'plain' is for all classes at once"),
    "until": (student("curriculum_epochs: 2", "distil_until: 1.0"), "distil_until: is 1.0"),
    "temperature": (student("curriculum_epochs: 2", "temperature: 0"), "temperature: is 0"),
    "curriculum": (student("curriculum_epochs: 2", "curriculum_epochs: -1"), "curriculum_epochs: is -1"),
}


def test_behind_a_new_head_any_stage_may_follow_an_expert(digits_words):
    more = "sampling: class_balanced, batch_size: 32, lr: 0.05, iterations: 4, evaluate_every: 2"
    stages = f"end_to_end: {{{EXPERT}, classes: many}}, new: {{method: crt, {more}}}, scales: {{method: lws, {more}}}"
    assert list(load_recipe(RECIPE, [*digits_words[:5], f"stages={{{stages}}}"]).stages) == [
        "end_to_end",
        "new",
        "scales",
    ]


def test_behind_an_expert_of_all_classes_any_stage_may_follow(digits_words):
    more = "batch_size: 32, lr: 0.05, iterations: 4, evaluate_every: 2"
    stages = f"end_to_end: {{{EXPERT}, classes: all}}, further: {{method: plain, {more}}}"
    assert list(load_recipe(RECIPE, [*digits_words[:5], f"stages={{{stages}}}"]).stages) == ["end_to_end", "further"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_experts_and_student_is_refused_by_the_recipe(digits_words, case):
    words, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected.replace("{'many'", r"\{'many'").replace("'}", r"'\}")):
        load_recipe(RECIPE, [*digits_words[:5], *STAGES, *words])


def test_a_shot_group_without_classes_or_with_too_few_images_is_refused_before_work(digits_words):
    with pytest.raises(
        ValueError, match=r"stages\.few\.classes is 'few', but .* has no such class with data.shots \[60, 3\]"
    ):
        make(digits_words, "data.shots=[60, 3]")
    with pytest.raises(ValueError, match="batch_size is 64, but the train split has 43 images of few-shot classes"):
        make(digits_words, "stages.few.batch_size=64")


def test_an_expert_whose_classes_have_no_validation_image_is_refused(digits_words, monkeypatch):
    trainer = make(digits_words)
    context, labels = trainer.context, trainer.context.dataset.labels
    many = context.counts.shot_masks()["many"]
    without = {"meta": labels("meta")[~many[labels("meta")]], "train": labels("train")}
    monkeypatch.setattr(type(context.dataset), "labels", lambda self, split: without[split])
    with pytest.raises(ValueError, match=r"stages\.many\.classes is 'many', and no such class has an image in"):
        check_dataset(context)


def test_a_student_whose_expert_left_nothing_says_so(digits_words):
    trainer = make(digits_words)
    with pytest.raises(ValueError, match=r"final_many\.pt is not there, the model of stages\.many"):
        trainer.build_stage("student")


def test_the_accuracy_of_another_model_leaves_that_of_the_trained_one(digits_words):
    step = make_step(GROUPS)
    accuracy = step.parts.class_accuracy
    mine = accuracy.update(step.model).clone()
    theirs = accuracy.of(step.experts[0].model)
    assert not torch.equal(mine, theirs)
    assert torch.equal(accuracy.accuracy(), mine)
    assert "lfme" in STEPS
