"""Experts: what they share, RIDE's objective against numpy, the router, distillation, resuming, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from short_runs import RECIPE, STAGE, assert_same, final_state, log_lines, stop_after

from fastlt.losses import build_loss
from fastlt.losses.experts import class_temperatures, distillation, expert_divergence
from fastlt.meta.class_accuracy import evaluation_mode
from fastlt.models import CosineHead, ExpertClassifier, build_model
from fastlt.recipe import load_recipe
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts
from fastlt.steps.ride import RideRouterStep, RideStep, helpful, running_mean

COUNTS = ClassCounts(np.array([40, 12, 3, 2]), ("a", "b", "c", "d"))


def experts(count=3, name="cifar_resnet8", **options):
    torch.manual_seed(0)
    return build_model(name, num_classes=4, head="cosine", experts=count, **options)


def images(n=6, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# The network


@pytest.mark.parametrize(
    ("name", "shared", "own", "features"),
    [
        ("cifar_resnet8", {"conv1", "bn1", "layer1"}, {"layer2": 24, "layer3": 48}, 48),
        ("resnet10", {"conv1", "bn1", "layer1", "layer2"}, {"layer3": 192, "layer4": 384}, 384),
        ("resnet50", {"conv1", "bn1", "layer1", "layer2"}, {"layer3": 768, "layer4": 1536}, 1536),
    ],
)
def test_the_last_two_stages_are_each_experts_own_at_three_quarters_of_the_width(name, shared, own, features):
    with torch.device("meta"):
        model = build_model(name, num_classes=4, experts=2)
    assert {n.split(".")[0] for n, _ in model.backbone.shared.named_parameters()} == shared
    for expert in model.backbone.experts:
        assert {n.split(".")[0] for n, _ in expert.named_parameters()} == set(own)
        for stage, width in own.items():
            last = [m for m in getattr(expert, stage).modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
            assert last.num_features == width
    assert model.backbone.num_features == features
    # What is shared has the width of the plain network.
    plain = dict(build_model("resnet10" if name == "resnet50" else name, num_classes=4).backbone.named_parameters())
    if name != "resnet50":
        assert all(p.shape == plain[n].shape for n, p in model.backbone.shared.named_parameters())


def test_experts_share_no_parameter_and_start_different():
    model = experts(3)
    for group in (model.backbone.experts, model.head.heads):
        parameters = [dict(e.named_parameters()) for e in group]
        for name in parameters[0]:
            trio = [p[name] for p in parameters]
            assert len({p.data_ptr() for p in trio}) == 3
            if trio[0].dim() > 1:
                assert not torch.equal(trio[0], trio[1])
                assert not torch.equal(trio[1], trio[2])


def test_an_experts_loss_reaches_its_own_branch_and_the_stem_only():
    model = experts(3)
    model.expert_logits(images())[1].square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("backbone.shared.conv1") for n in reached)
    assert {n.split(".")[2] for n in reached if n.startswith(("backbone.experts.", "head.heads."))} == {"1"}


def test_the_logits_are_the_mean_over_experts_each_computed_alone():
    model = experts(3).double().eval()
    x = images().double()
    one = []
    for branch, head in zip(model.backbone.experts, model.head.heads, strict=True):
        shared = model.backbone.shared
        maps = shared.layer1(torch.relu(shared.bn1(shared.conv1(x))))
        f = branch.layer3(branch.layer2(maps)).mean((2, 3)).detach().numpy()
        w = head.weight.detach().numpy()
        norms = np.linalg.norm(f, axis=1)[:, None] * np.linalg.norm(w, axis=1)[None]
        one.append(30.0 * f @ w.T / norms)
    np.testing.assert_allclose(model.expert_logits(x).detach().numpy(), one, rtol=1e-9)
    np.testing.assert_allclose(model(x).detach().numpy(), np.mean(one, axis=0), rtol=1e-9)


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet10"])
def test_one_expert_of_full_width_is_the_plain_network(name):
    plain = build_model(name, num_classes=4, head="cosine").double()
    model = experts(1, name, expert_width=1.0).double()
    weights = {}
    for key, tensor in plain.state_dict().items():
        layer = key.split(".")[1]
        own = layer in (("layer2", "layer3") if name.startswith("cifar") else ("layer3", "layer4"))
        part = "experts.0" if own else "shared"
        key = key.replace("backbone.", f"backbone.{part}.") if key.startswith("backbone.") else "head.heads.0.weight"
        weights[key] = tensor
    model.load_state_dict(weights)
    x = images(size=32).double()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenetv3_small_050", "ecaresnet50d_pruned"])
def test_other_backbones_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"{name} cannot be split into experts"):
        build_model(name, num_classes=4, experts=2)


# The objective, against numpy in float64


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def divergence_in_words(z, temperature):
    """T^2 * sum_e KL(mean || expert), image by image and class by class; z (E, N, C), temperature (C,)."""
    losses = []
    for i in range(z.shape[1]):
        q = softmax(z[:, i].mean(0) / temperature)
        total = 0.0
        for e in range(z.shape[0]):
            p = softmax(z[e, i] / temperature)
            total += sum(q[c] * np.log(q[c] / p[c]) for c in range(z.shape[2]))
        losses.append(np.mean(temperature) ** 2 * total)
    return np.array(losses)


def random_logits(e=3, n=5, c=4, seed=0):
    return np.random.default_rng(seed).normal(size=(e, n, c)) * 3


@pytest.mark.parametrize("temperature", [np.full(4, 1.0), np.full(4, 2.5), np.array([1.0, 0.9, 0.7, 0.6])])
def test_the_divergence_equals_the_formula_written_out(temperature):
    z = random_logits()
    got = expert_divergence(torch.from_numpy(z), torch.from_numpy(temperature))
    np.testing.assert_allclose(got.numpy(), divergence_in_words(z, temperature), rtol=1e-10)
    assert (got > 0).all()


def test_the_divergence_has_the_gradient_with_the_mean_held_still():
    z = random_logits(n=1)
    temperature = np.full(4, 1.7)
    leaf = torch.from_numpy(z).requires_grad_(True)
    expert_divergence(leaf, torch.from_numpy(temperature)).sum().backward()
    q = softmax(z[:, 0].mean(0) / 1.7)
    # d/dz_e T^2 KL(q || p_e) = T (p_e - q) for a constant q.
    expected = [1.7 * (softmax(z[e, 0] / 1.7) - q) for e in range(3)]
    np.testing.assert_allclose(leaf.grad[:, 0].numpy(), expected, rtol=1e-9)


def test_experts_that_agree_do_not_diverge_and_one_expert_never_does():
    same = torch.from_numpy(random_logits(e=1))
    for count in (1, 4):
        value = expert_divergence(same.expand(count, -1, -1), torch.tensor(1.3, dtype=torch.float64))
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)


def test_class_temperatures_are_largest_for_the_largest_class():
    counts = np.array([500, 100, 20, 5])
    share = counts / counts.sum()
    raw = [4 * s * 0.05 + 1 - 0.05 for s in share]
    np.testing.assert_allclose(class_temperatures(counts, 2.0, 0.05), [2.0 * r / max(raw) for r in raw], rtol=1e-12)
    np.testing.assert_array_equal(class_temperatures(counts, 2.0, 0.0), [2.0] * 4)


def test_distillation_is_the_divergence_from_the_teacher():
    student, teacher = random_logits(e=2)
    expected = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(s / 1.5), softmax(t / 1.5)
        expected.append(1.5**2 * sum(q[c] * np.log(q[c] / p[c]) for c in range(4)))
    got = distillation(torch.from_numpy(student), torch.from_numpy(teacher), 1.5)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10)


class Logits(ExpertClassifier):
    """A model of experts whose logits are its parameters: what a step does to them is its gradient."""

    def __init__(self, z):
        torch.nn.Module.__init__(self)
        self.z = torch.nn.Parameter(torch.from_numpy(z).clone())

    def expert_logits(self, images):
        return self.z

    def forward(self, images):
        return self.z.mean(0)


def ride_step(model, options, lr=0.1, **loss_options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = build_loss("ldam", COUNTS, **loss_options).double()
    return RideStep(StepParts(model, loss, optimizer, lambda i: i, None, COUNTS), options)


def objective_in_words(z, labels, k, temperature, weights):
    """sum_e LDAM, in the mean by weight over images, - k * divergence, in the plain mean."""
    margin = COUNTS.counts**-0.25
    margin *= 0.5 / margin.max()
    total = 0.0
    for e in range(z.shape[0]):
        for i, y in enumerate(labels):
            shifted = z[e, i].copy()
            shifted[y] -= 30.0 * margin[y]
            total -= weights[y] * np.log(softmax(shifted)[y])
    return total / weights[labels].sum() - k * divergence_in_words(z, temperature).mean()


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_iteration_equals_the_objective_and_its_slope_written_out(epoch):
    """Before and after the epoch from which weights and temperatures differ by class."""
    z, labels = random_logits(e=3, n=6), np.array([0, 1, 2, 3, 0, 2])
    options = RideStep.Options(diversity=0.45, temperature=1.2, spread=0.05, spread_from_epoch=3)
    model = Logits(z)
    step = ride_step(model, options, lr=1.0, reweight_from_epoch=3)
    step.start_epoch(epoch)
    output = step(Batch(torch.zeros(6, 3, 1, 1), torch.from_numpy(labels), torch.arange(6)))
    temperature, weights = np.full(4, 1.2), np.ones(4)
    if epoch == 3:
        temperature = class_temperatures(COUNTS.counts, 1.2, 0.05)
        weights = (1 - 0.9999) / (1 - 0.9999**COUNTS.counts)
        weights *= 4 / weights.sum()
    value = objective_in_words(z, labels, 0.45, temperature, weights)
    assert output.loss.item() == pytest.approx(value, rel=1e-5)

    # One descent of rate 1 moved the logits by minus the gradient. The reference's mean is held still by hand.
    margin = COUNTS.counts**-0.25
    margin *= 30.0 * 0.5 / margin.max()
    scale = np.mean(temperature) ** 2
    for e in range(3):
        for i, y in enumerate(labels):
            shifted = z[e, i] - margin[y] * np.eye(4)[y]
            slope = 6 * weights[y] / weights[labels].sum() * (softmax(shifted) - np.eye(4)[y])
            q, p = softmax(z[:, i].mean(0) / temperature), softmax(z[e, i] / temperature)
            slope -= 0.45 * scale * (p - q) / temperature
            moved = z[e, i] - model.z[e, i].detach().numpy()
            np.testing.assert_allclose(moved, slope / 6, rtol=2e-5, atol=1e-8)


def test_diversity_pushes_the_experts_apart_and_none_leaves_them():
    z, labels = random_logits(e=2, n=4), torch.tensor([0, 1, 2, 3])
    after = {}
    for k in (0.0, 0.5):
        model = Logits(z)
        step = ride_step(model, RideStep.Options(diversity=k))
        for _ in range(5):
            step(Batch(torch.zeros(4, 3, 1, 1), labels, torch.arange(4)))
        after[k] = expert_divergence(model.z.detach(), torch.tensor(1.0, dtype=torch.float64)).mean()
    assert after[0.5] > after[0.0]


def test_one_expert_is_trained_as_by_its_loss_alone():
    z, labels = random_logits(e=1, n=4), torch.tensor([0, 1, 2, 3])
    ride, plain = Logits(z), Logits(z)
    batch = Batch(torch.zeros(4, 3, 1, 1), labels, torch.arange(4))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    parts = StepParts(plain, build_loss("ldam", COUNTS).double(), optimizer, lambda i: i, None, COUNTS)
    one, other = ride_step(ride, RideStep.Options(diversity=0.45)), STEPS["plain"](parts)
    for _ in range(3):
        assert one(batch).loss.item() == pytest.approx(other(batch).loss.item(), rel=1e-12)
    torch.testing.assert_close(ride.z, plain.z, rtol=1e-12, atol=1e-12)


# The router


def test_the_running_mean_and_what_is_helpful():
    z = random_logits(e=3, n=40, seed=3)
    labels = np.random.default_rng(4).integers(0, 4, 40)
    means = running_mean(torch.from_numpy(z))
    right = np.array([[z[: i + 1, n].mean(0).argmax() == y for n, y in enumerate(labels)] for i in range(3)])
    np.testing.assert_allclose(means.numpy(), [z[: i + 1].mean(0) for i in range(3)], rtol=1e-12)
    expected = [[not right[i, n] and any(right[j, n] for j in range(i + 1, 3)) for n in range(40)] for i in range(2)]
    assert helpful(means, torch.from_numpy(labels)).tolist() == expected
    assert np.array(expected).any()


def routed(count=3, seed=0):
    model = experts(count).double()
    with torch.no_grad():
        for _ in range(3):
            model(images(64, seed=7).double())
    model.add_router(top=3, seed=seed)
    return model.eval()


def test_the_router_asks_expert_after_expert_and_counts_them():
    x = images(64).double()
    model = routed()
    with torch.no_grad():
        # A bias at which some images go on and some stop.
        features = model.features(x)
        z = model.head(features)
        scores = model.router(0, features[0], z[0])
        model.router.score.bias -= scores.median()
        expected, asked = [], 0
        for n in range(64):
            used = 1
            while used < 3:
                f, mean = features[used - 1, n], z[:used, n].mean(0)
                hidden = torch.relu(model.router.hidden[used - 1](f / f.norm()))
                top = mean.sort(descending=True).values[:3]
                if model.router.score(torch.cat([top, hidden])) <= 0:
                    break
                used += 1
            asked += used
            expected.append(z[:used, n].mean(0))
        got = model(x)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert 64 < asked < 3 * 64
    assert model.counters()["experts_asked"].tolist() == [asked, 64]


@pytest.mark.parametrize(("bias", "used"), [(-1e6, 1), (1e6, 3)])
def test_a_router_that_never_or_always_asks(bias, used):
    x, model = images(10).double(), routed()
    with torch.no_grad():
        model.router.score.bias.fill_(bias)
        torch.testing.assert_close(model(x), model.expert_logits(x)[:used].mean(0), rtol=1e-9, atol=1e-9)
    assert model.counters()["experts_asked"].tolist() == [10 * used, 10]
    model.train()
    assert not torch.equal(model(x), model.expert_logits(x)[:1].mean(0))


def test_an_iteration_of_the_router_equals_its_loss_written_out():
    model, x = experts(3), images(32)
    labels = torch.from_numpy(np.random.default_rng(5).integers(0, 4, 32))
    options = RideRouterStep.Options(top=2, positive_weight=7.0)
    RideRouterStep.prepare_model(model, options, seed=1)
    model.double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = build_loss("cross_entropy", COUNTS)
    step = RideRouterStep(StepParts(model, loss, optimizer, lambda i: i, None, COUNTS), options)
    step.train_mode()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        features = model.features(x.double())
        z = model.head(features)
        total = 0.0
        target = helpful(running_mean(z), labels)
        for i in range(2):
            scores = model.router(i, features[i], z[: i + 1].mean(0))
            for s, t in zip(torch.sigmoid(scores), target[i], strict=True):
                total -= 7.0 * torch.log(s) if t else torch.log(1 - s)
    output = step(Batch(x.double(), labels, torch.arange(32)))
    assert output.loss.item() == pytest.approx(total.item() / 64, rel=1e-9)
    assert 0 < output.metrics["helpful"] < 1
    after = model.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith("router.")}


def test_a_new_router_follows_from_the_seed_and_draws_nothing_else():
    model = experts(3)
    state = torch.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        model.add_router(top=50, seed=seed)
        weights.append(model.router.score.weight.clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert model.router.top == 4


# Runs

RIDE = [
    f"{STAGE}.method=ride",
    f"{STAGE}.loss=ldam",
    f"{STAGE}.loss_options={{reweight_from_epoch: 1}}",
    f"{STAGE}.options={{diversity: 0.45, spread: 0.05, spread_from_epoch: 1}}",
    f"{STAGE}.batch_size=64",
    f"{STAGE}.lr=0.02",
    "model.head=cosine",
    "model.experts=2",
    "model.name=cifar_resnet8",
]
ROUTER = (
    "stages.router={method: ride_router, sampling: class_balanced, iterations: 6, batch_size: 64, lr: 0.1, "
    "evaluate_every: 3, options: {top: 5}}"
)


def make(words, *more):
    return Trainer(prepare(load_recipe(RECIPE, [*words, *RIDE, *more])))


def test_a_run_trains_experts_and_a_router_and_reports_what_it_asked(digits_words):
    trainer = make(digits_words, ROUTER)
    result = trainer.fit()
    assert json.loads((trainer.folder / "result.json").read_text()) == result
    assert 1 <= result["experts_asked"] <= 2
    lines = log_lines(trainer.folder)
    assert all("divergence" in line for line in lines if line["kind"] == "train" and line["stage"] == "end_to_end")
    validated = [line for line in lines if line["kind"] == "evaluation"]
    assert all(("experts_asked" in line) == (line["stage"] == "router") for line in validated)
    first, second = (
        torch.load(trainer.folder / "checkpoints" / f"final_{name}.pt", weights_only=True)["model"]
        for name in ("end_to_end", "router")
    )
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert {k.split(".")[0] for k in second if k not in first} == {"router"}
    # A mean over the 400 test images, each shown to one expert or two.
    assert result["experts_asked"] * 400 == pytest.approx(round(result["experts_asked"] * 400))


@pytest.mark.parametrize("stop", [8, 16])
def test_resumed_and_uninterrupted_runs_agree_bit_for_bit(digits_words, stop):
    """An epoch has 6 iterations: deferred weights and temperatures set in at the seventh, the router at the 13th."""
    whole = make(digits_words, ROUTER, "name=whole")
    result = whole.fit()
    stopped = stop_after(make(digits_words, ROUTER, "name=stopped"), stop)
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed = make(digits_words, ROUTER, "name=stopped")
    again = resumed.fit()
    one, other = final_state(whole.folder), final_state(resumed.folder)
    for state in (one, other):
        for key in ("train_s", "wait_s", "aside_s"):
            del state["progress"][key]
    assert_same(one, other)
    assert result["experts_asked"] == again["experts_asked"]
    kept = [[line["loss"] for line in log_lines(f) if line["kind"] == "train"] for f in (whole.folder, resumed.folder)]
    assert kept[0] == kept[1]


def test_a_finished_run_serves_as_the_routers_first_stage(digits_words):
    first = make(digits_words)
    first.fit()
    best = first.folder / "checkpoints" / "final_end_to_end.pt"
    words = [w for w in digits_words if not w.startswith("stages.")] + [w for w in RIDE if not w.startswith("stages.")]
    alone = Trainer(
        prepare(load_recipe(RECIPE, [*words, f"{STAGE}=null", ROUTER, f"model.checkpoint={best}", "name=alone"]))
    )
    assert 1 <= alone.fit()["experts_asked"] <= 2
    trained, after = torch.load(best, weights_only=True)["model"], alone.model.state_dict()
    assert all(torch.equal(after[k], trained[k]) for k in trained)


def test_a_student_learns_from_a_teacher_with_more_experts(digits_words):
    teacher = make(digits_words, "name=teacher", "model.experts=3")
    teacher.fit()
    best = teacher.folder / "checkpoints" / "best_end_to_end.pt"
    with_teacher = f"{STAGE}.options={{diversity: 0.2, distillation: 3.0, teacher: {best}}}"
    trainer = make(digits_words, "name=student", with_teacher)
    student = trainer.build_stage("end_to_end").step
    assert len(student.teacher.head.heads) == 3
    assert not any(p.requires_grad for p in student.teacher.parameters())
    x = images(8, size=8)
    with torch.no_grad(), evaluation_mode(teacher.model):
        assert torch.equal(student.teacher(x), teacher.model(x))
    trainer.fit()
    lines = [line for line in log_lines(trainer.folder) if line["kind"] == "train"]
    for line in lines:
        assert line["distillation"] > 0
        total = 2 * line["expert_loss"] - 0.2 * line["divergence"] + 3.0 * line["distillation"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert len(trainer.model.head.heads) == 2

    wide = make(digits_words, "name=wide", with_teacher, "model.expert_width=1.0")
    with pytest.raises(ValueError, match="not of this model"):
        wide.fit()
    path = trainer.folder / "plain.pt"
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), path)
    with pytest.raises(ValueError, match="holds no model with experts"):
        trainer.model.teacher(path)


def test_bfloat16_trains_and_routes(digits_words):
    result = make(digits_words, ROUTER, "precision=bf16").fit()
    assert 1 <= result["experts_asked"] <= 2
    assert 0 <= result["top1"] <= 1


def test_a_cosine_head_of_each_expert_keeps_the_scale():
    model = build_model("cifar_resnet8", num_classes=4, head="cosine", head_scale=16.0, experts=2)
    assert all(isinstance(h, CosineHead) and h.scale == 16.0 for h in model.head.heads)
    assert model.expert_logits(images()).abs().max() <= 16.0 + 1e-4


# Refusals

REFUSED = {
    "none": (["model.experts=null"], "set model.experts"),
    "zero": (["model.experts=0"], "model.experts: is 0"),
    "width": (["model.expert_width=0"], "model.expert_width: is 0"),
    "backbone": (["model.name=vit_tiny_patch16_224"], "cannot be split into experts"),
    "pretrained": (["model.name=resnet18", "model.pretrained=true"], "pretrained weights do not fit"),
    "linear": (["model.head=linear"], "set model.head=cosine"),
    "method": ([f"{STAGE}.method=cdb", f"{STAGE}.options={{}}"], "take a method of plain, ride, ride_router"),
    "diversity": ([f"{STAGE}.options.diversity=-1"], "diversity: is -1"),
    "spread": ([f"{STAGE}.options.spread=1"], "spread: is 1"),
    "temperature": ([f"{STAGE}.options.temperature=0"], "temperature: is 0"),
    "teacher": ([f"{STAGE}.options.teacher=nowhere.pt"], "nowhere.pt is not a file"),
    "first": ([f"{STAGE}=null", ROUTER], "'ride_router' without a stage before it"),
    "alone": (["model.experts=1", ROUTER], "nothing to route between"),
    "loss": ([ROUTER, "stages.router.loss=balanced_softmax"], "has a loss of its own"),
    "last": ([ROUTER, "stages.more={method: plain, iterations: 2, lr: 0.1}"], "put this stage last"),
    "top": ([ROUTER, "stages.router.options.top=0"], "top: is 0"),
    "decoupled": (
        [ROUTER.replace("ride_router", "crt").replace("options: {top: 5}", "options: {}")],
        "'crt', which trains one network",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_the_recipe(digits_words, case):
    words, expected = REFUSED[case]
    if case == "first":
        digits_words = [w for w in digits_words if not w.startswith("stages.")]
        words = [*RIDE[6:], *words]
    else:
        words = [*RIDE, *words]
    with pytest.raises(ValueError, match=expected):
        load_recipe(RECIPE, [*digits_words, *words])
