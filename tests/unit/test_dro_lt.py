"""DRO-LT: the robust loss and whole iterations against slow versions of themselves; runs, resuming, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from short_runs import RECIPE, assert_same, comparable, final_state, stop_after
from test_augment import NoSync
from test_paco import CLASSES, COUNTS, LR, Views

from fastlt.device.distributed import Reducer
from fastlt.losses import build_loss
from fastlt.losses.contrastive import robust_contrastive
from fastlt.models import build_model
from fastlt.models.retrained_heads import ScaledHead
from fastlt.recipe import load_recipe
from fastlt.run.class_history import read_class_history
from fastlt.run.folder import class_history_file
from fastlt.run.preflight import check_dataset, prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.state import Batch
from fastlt.steps import StepParts
from fastlt.steps.dro_lt import DroLtStep


def slow_loss(features, labels, centroids, radius, temperature):
    """One class, one sample at a time."""
    per_class = []
    for c in sorted(set(labels.tolist())):
        scores = []
        for z, y in zip(features, labels.tolist(), strict=True):
            distance = ((z - centroids[c]) ** 2).sum().sqrt()
            scores.append(-(distance + radius[c] if y == c else distance) / temperature)
        shares = torch.softmax(torch.stack(scores), 0)
        own = [share for share, y in zip(shares, labels.tolist(), strict=True) if y == c]
        per_class.append(-sum(torch.log(share) for share in own) / len(own))
    return sum(per_class) / len(per_class)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_robust_loss_and_its_gradients_equal_the_formula(temperature):
    torch.manual_seed(0)
    labels = torch.tensor([0, 3, 3, 1, 0, 3])  # no sample of classes 2 and 4
    values = [torch.randn(6, 4).double(), torch.randn(CLASSES, 4).double(), torch.rand(CLASSES).double()]
    results = []
    for loss in (robust_contrastive, slow_loss):
        features, centroids, radius = (v.clone().requires_grad_(i != 1) for i, v in enumerate(values))
        result = loss(features, labels, centroids, radius, temperature)
        results.append([result.detach(), *torch.autograd.grad(result, [features, radius])])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)
    assert not results[0][2][[2, 4]].any()
    assert (results[0][2][[0, 1, 3]] > 0).all()


def test_a_sample_at_its_centroid_has_a_finite_gradient():
    features = torch.zeros(2, 3, requires_grad=True)
    loss = robust_contrastive(features, torch.tensor([0, 1]), torch.eye(3)[:2] * 0, torch.ones(2), 1.0)
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(gradient).all()


def draw(size, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(size) // 4 % CLASSES, torch.arange(size))


def make(**options):
    torch.manual_seed(1)
    model = build_model("cifar_resnet8", num_classes=CLASSES).double()
    options = DroLtStep.Options(**options)
    DroLtStep.prepare_model(model, options, seed=3)
    whole = draw(30, seed=5)
    parts = StepParts(
        model=model,
        loss=build_loss("cross_entropy", COUNTS),
        optimizer=torch.optim.SGD(DroLtStep.parameter_groups(model, options), lr=LR, momentum=0.9, weight_decay=5e-4),
        augment=Views(),
        meta_augment=None,
        training_images=lambda: zip(Views()(whole.images).split(8), whole.labels.split(8), strict=True),
        class_counts=COUNTS,
    )
    step = DroLtStep(parts, options)
    step.train_mode()
    return step, whole


def test_a_head_that_wraps_another_gets_radii_of_its_classes():
    model = build_model("cifar_resnet8", num_classes=CLASSES).double()
    model.head = ScaledHead(model.head)
    DroLtStep.prepare_model(model, DroLtStep.Options(radius=0.5), seed=3)
    assert torch.equal(model.auxiliary.radius, torch.full((CLASSES,), 0.5).double())


def test_iterations_equal_the_slow_reference_over_two_epochs():
    step, whole = make(temperature=0.7, robust_weight=0.4, radius=0.5)
    model = copy.deepcopy(step.model)
    trained = [*model.backbone.parameters(), model.auxiliary.radius]
    sgd = torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=5e-4, foreach=False)
    weights = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.05]).double()
    head = copy.deepcopy(step.model.head.state_dict())
    for iteration in range(4):
        if iteration % 2 == 0:
            step.start_epoch(iteration // 2)
            model.eval()
            with torch.no_grad():
                z = model.features(Views()(whole.images))
            centroids = [z[whole.labels == c].mean(0) for c in range(CLASSES)]
            model.train()
        batch = draw(12, seed=iteration)
        output = step(batch)
        features = model.features(Views()(batch.images))
        losses = F.cross_entropy(model.head(features), batch.labels, weights)
        objective = losses + 0.4 * slow_loss(features, batch.labels, centroids, model.auxiliary.radius, 0.7)
        torch.testing.assert_close(output.loss, objective.detach(), rtol=1e-9, atol=0)
        sgd.zero_grad()
        objective.backward()
        sgd.step()
    for (name, fast), slow in zip(step.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-10, msg=name)
    assert_same(step.model.head.state_dict(), head)
    assert (step.radius[:3] < 0.5).all()


def test_an_iteration_never_waits_for_the_device():
    step, _ = make(radius_floor=0.0)
    step.start_epoch(0)
    with NoSync():
        step(draw(12, seed=0))


def test_centroids_leave_no_trace_in_the_model():
    step, _ = make()
    before = copy.deepcopy(step.model.state_dict())
    step.start_epoch(0)
    assert_same(before, step.model.state_dict())
    assert step.model.backbone.training
    assert not step.model.head.training
    assert not step.centroids.requires_grad


def test_a_floor_keeps_a_radius_a_radius():
    for floor, lowest in ((None, -10.0), (0.2, 0.2)):
        step, _ = make(radius=0.3, radius_floor=floor)
        step.start_epoch(0)
        for group in step.optimizer.param_groups:
            group["lr"] = 5.0
        step(draw(12, seed=0))
        assert step.radius.min() >= lowest
        assert (step.radius.min() < 0.2) == (floor is None)


# Runs

ROBUST = (
    "{method: dro_lt, batch_size: 32, lr: 0.01, sampling: class_aware_4, iterations: 20, evaluate_every: 10, "
    "options: {radius: 0.5}}"
)
HEAD = "{method: crt, batch_size: 32, lr: 0.1, sampling: class_aware_4, iterations: 4, evaluate_every: 2}"


def words_of(digits_words, *more, robust=ROBUST):
    return [*digits_words, "stages.end_to_end.method=plain", f"stages.robust={robust}", *more]


def test_resumed_and_uninterrupted_runs_agree_bit_for_bit(digits_words):
    """Stopped in the middle of the robust stage's first epoch of 13 iterations: centroids come from the checkpoint."""

    def run(name):
        return Trainer(
            prepare(load_recipe(RECIPE, words_of(digits_words, f"stages.classifier={HEAD}", f"name={name}")))
        )

    whole = run("whole")
    result = whole.fit()
    stopped = stop_after(run("stopped"), 12 + 8)
    with pytest.raises(Interrupted):
        stopped.fit()
    middle = final_state(stopped.folder)
    assert middle["step"]["centroids"].abs().sum() > 0
    resumed = run("stopped")
    again = resumed.fit()
    assert_same(comparable(whole.folder), comparable(resumed.folder))
    assert result["per_class_accuracy"] == again["per_class_accuracy"]
    records, _ = read_class_history(class_history_file(whole.folder))
    first, second = (record.values["radius"] for record in records if record.stage == "robust")
    assert (first != second).any()
    folder = whole.folder / "checkpoints"
    before, after = (
        torch.load(folder / f"final_{stage}.pt", weights_only=True)["model"] for stage in ("end_to_end", "robust")
    )
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])


REFUSED = {
    "sampling": (ROBUST.replace("class_aware_4", "class_balanced"), "set sampling: class_aware_4"),
    "batch": (ROBUST.replace("32", "30"), "allowed: a multiple of 4"),
    "temperature": (ROBUST.replace("radius: 0.5", "temperature: 0"), "temperature: is 0"),
    "weight": (ROBUST.replace("radius: 0.5", "robust_weight: 0"), "robust_weight: is 0"),
    "floor": (ROBUST.replace("radius: 0.5", "radius: 0.5, radius_floor: 1"), "radius is 0.5, below radius_floor 1.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_the_recipe(digits_words, case):
    robust, expected = REFUSED[case]
    with pytest.raises(ValueError, match=expected):
        load_recipe(RECIPE, words_of(digits_words, robust=robust))


def test_a_process_gets_whole_groups_of_a_class(digits_words):
    context = prepare(load_recipe(RECIPE, words_of(digits_words)))
    with pytest.raises(ValueError, match=r"stages\.robust\.batch_size is 32 .* give a multiple of 64"):
        check_dataset(replace(context, reducer=Reducer(0, 16)))


def test_it_is_no_first_stage(digits_words):
    words = [w for w in digits_words if not w.startswith("stages.")]
    with pytest.raises(ValueError, match="'dro_lt' without a stage before it"):
        load_recipe(RECIPE, [*words, "stages.end_to_end=null", f"stages.robust={ROBUST}"])
