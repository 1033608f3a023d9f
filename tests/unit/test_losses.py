"""Every loss against a slow float64 reference written from its equation, and what it has to do at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.device.distributed import Reducer
from fastlt.losses import LOSSES, build_loss, check_loss
from fastlt.losses.class_balanced import effective_number_weights
from fastlt.losses.cross_entropy import BalancedSoftmax
from fastlt.losses.ldam import margins
from fastlt.losses.smoothing import smoothing_by_class
from fastlt.state import ClassCounts
from fastlt.steps.base import Step

COUNTS = np.array([500, 230, 97, 40, 11, 2], dtype=np.int64)


def class_counts(values=COUNTS) -> ClassCounts:
    values = np.asarray(values, dtype=np.int64)
    return ClassCounts(values, tuple(f"class {i}" for i in range(len(values))))


def batch(num: int = 24, dtype=torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(num, len(COUNTS), generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.arange(num) % len(COUNTS)


# ---- references: one sample at a time, as the equations are written -------------------------------------------------


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def effective_number(n: int, beta: float) -> float:
    """(1 - beta^n) / (1 - beta) as the sum it is: 1 + beta + ... + beta^(n-1)."""
    return sum(beta**k for k in range(int(n)))


def cb_weights(beta: float) -> list[float]:
    w = [1 / effective_number(n, beta) for n in COUNTS]
    return [len(w) * x / sum(w) for x in w]


def sigmoid_terms(z, y, gamma):
    total = 0.0
    for c, value in enumerate(z):
        p = 1 / (1 + math.exp(-value if c == y else value))
        total -= (1 - p) ** gamma * math.log(p)
    return total


def ref_cross_entropy(z, y):
    return -math.log(softmax(z)[y])


def ref_smoothed(z, y, eps):
    every = [ref_cross_entropy(z, k) for k in range(len(z))]
    return (1 - eps) * every[y] + eps * sum(every) / len(every)


def ref_balanced_softmax(z, y):
    terms = [n * math.exp(v) for n, v in zip(COUNTS, z, strict=True)]
    return -math.log(terms[y] / sum(terms))


def ref_focal(z, y):
    p = softmax(z)[y]
    return -((1 - p) ** 2) * math.log(p)


def ref_ldam(z, y):
    m = 0.5 * (COUNTS[y] / COUNTS.min()) ** -0.25
    z = z.copy()
    z[y] -= 30 * m
    return -math.log(softmax(z)[y])


def ref_smoothing(z, y):
    share = (COUNTS[y] - COUNTS.min()) / (COUNTS.max() - COUNTS.min())
    eps = 0.1 + (0.4 - 0.1) * math.sin(math.pi / 2 * share)
    log_p = np.log(softmax(z))
    return (1 - eps) * -log_p[y] + eps * -log_p.mean()


CASES = {
    "cross_entropy": ("cross_entropy", {}, ref_cross_entropy),
    "balanced_softmax": ("balanced_softmax", {}, ref_balanced_softmax),
    "smoothed": ("cross_entropy", {"label_smoothing": 0.2}, lambda z, y: ref_smoothed(z, y, 0.2)),
    "tau": ("balanced_softmax", {"tau": 0.5}, lambda z, y: ref_cross_entropy(z + 0.5 * np.log(COUNTS), y)),
    "smoothed_tau": (
        "balanced_softmax",
        {"tau": 2, "label_smoothing": 0.1},
        lambda z, y: ref_smoothed(z + 2 * np.log(COUNTS), y, 0.1),
    ),
    "focal": ("focal", {"gamma": 2}, ref_focal),
    "cb_softmax": ("class_balanced", {"beta": 0.99}, lambda z, y: cb_weights(0.99)[y] * ref_cross_entropy(z, y)),
    "cb_sigmoid": (
        "class_balanced",
        {"kind": "sigmoid", "beta": 0.99},
        lambda z, y: cb_weights(0.99)[y] * sigmoid_terms(z, y, 0),
    ),
    "cb_focal": (
        "class_balanced",
        {"kind": "focal", "beta": 0.99, "gamma": 0.5},
        lambda z, y: cb_weights(0.99)[y] * sigmoid_terms(z, y, 0.5),
    ),
    "ldam": ("ldam", {}, ref_ldam),
    "ldam_drw": (
        "ldam",
        {"reweight_from_epoch": 0},
        lambda z, y: cb_weights(0.9999)[y] * ref_ldam(z, y),
    ),
    "label_aware_smoothing": ("label_aware_smoothing", {"head": 0.4, "tail": 0.1}, ref_smoothing),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    name, options, reference = CASES[case]
    logits, labels = batch()
    loss = build_loss(name, class_counts(), **options)
    expected = [reference(z, y) for z, y in zip(logits.numpy(), labels.tolist(), strict=True)]
    torch.testing.assert_close(
        loss(logits, labels), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_equalization_equals_the_reference_for_its_draws():
    logits, labels = batch(600)
    loss = build_loss("equalization", class_counts(), gamma=0.9, threshold=0.05)
    loss.draw(600)
    rare = COUNTS / COUNTS.sum() < 0.05
    assert rare.tolist() == [False, False, False, True, True, True]
    expected = []
    for z, y, drawn in zip(logits.numpy(), labels.tolist(), loss.dropped.numpy(), strict=True):
        weights = [1 - float(drawn[k]) * float(rare[k]) * float(k != y) for k in range(len(z))]
        denominator = sum(w * math.exp(v) for w, v in zip(weights, z, strict=True))
        expected.append(-math.log(math.exp(z[y]) / denominator))
    torch.testing.assert_close(loss(logits, labels), torch.tensor(expected, dtype=torch.float64))
    share = loss.dropped[:, rare].double().mean().item()
    assert share == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 1800))
    assert not loss.dropped[:, ~rare].any()


@pytest.mark.parametrize("dropped", [True, False])
def test_sigmoid_equalization_equals_the_reference_for_its_one_draw(dropped):
    logits, labels = batch(40)
    loss = build_loss("equalization", class_counts(), kind="sigmoid", gamma=float(dropped), threshold=0.05)
    loss.draw(40)
    rare = COUNTS / COUNTS.sum() < 0.05
    expected = []
    for z, y in zip(logits.numpy(), labels.tolist(), strict=True):
        p = [1 / (1 + math.exp(-v)) for v in z]
        terms = [-math.log(p[k]) if k == y else -math.log(1 - p[k]) for k in range(len(z))]
        expected.append(sum(t for k, t in enumerate(terms) if k == y or not (rare[k] and dropped)))
    torch.testing.assert_close(loss(logits, labels), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_equalization_draws_by_the_runs_seed_and_for_all_processes(kind):
    def drawn(*share, **options):
        loss = build_loss("equalization", class_counts(), kind=kind, gamma=0.5, threshold=0.05, **options)
        loss.share_draws(*share)
        found = []
        for _ in range(3):
            loss.draw(8 // share[2])
            found.append(loss.dropped.clone())
        return found

    alone = drawn(4, 0, 1)
    assert not all(torch.equal(a, b) for a, b in zip(alone, drawn(5, 0, 1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, drawn(4, 0, 1, seed=1), strict=True))
    for whole, first, second in zip(alone, drawn(4, 0, 2), drawn(4, 1, 2), strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_sigmoid_equalization_draws_once_a_batch():
    loss = build_loss("equalization", class_counts(), kind="sigmoid", gamma=0.7, threshold=0.05)
    draws = []
    for _ in range(400):
        loss.draw(3)
        assert not loss.dropped[:, :3].any()
        draws.append(loss.dropped[:, 3:].double().mean().item())
    assert set(draws) == {0.0, 1.0}
    assert np.mean(draws) == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 400))


# ---- forward mode, precision ----------------------------------------------------------------------------------------


def everything():
    yield from ((name, options) for name, options, _ in CASES.values())
    yield "equalization", {"threshold": 0.05}
    yield "equalization", {"threshold": 0.05, "kind": "sigmoid"}


def built(name, options, num):
    loss = build_loss(name, class_counts(), **options)
    loss.draw(num)
    return loss


@pytest.mark.parametrize(("name", "options"), everything())
def test_forward_mode_reverse_mode_and_difference_agree(name, options):
    logits, labels = batch()
    loss = built(name, options, len(labels))
    direction = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, derivative = torch.func.jvp(lambda z: loss(z, labels), (logits,), (direction,))
    difference = (loss(logits + 1e-6 * direction, labels) - loss(logits - 1e-6 * direction, labels)) / 2e-6
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, labels).sum(), leaf)
    torch.testing.assert_close((gradient * direction).sum(1), derivative)
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(logits, direction), labels)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, derivative)


@pytest.mark.parametrize(("name", "options"), everything())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float32_at_least(name, options, dtype):
    logits, labels = batch(dtype=dtype)
    loss = built(name, options, len(labels))
    value, tangent = torch.func.jvp(lambda z: loss(z, labels), (logits,), (torch.ones_like(logits),))
    assert value.shape == labels.shape
    assert value.dtype == tangent.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), loss(logits.double(), labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), everything())
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_logits_stay_finite(name, options, scale):
    logits, labels = batch(dtype=torch.float32, scale=scale)
    logits.requires_grad_()
    loss = built(name, options, len(labels))(logits, labels)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


def test_focal_with_a_fractional_power_is_finite_when_the_answer_is_certain():
    logits = torch.tensor([[200.0, 0, 0, 0, 0, 0]], requires_grad=True)
    build_loss("focal", class_counts(), gamma=0.5)(logits, torch.tensor([0])).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


# ---- behaviour at the limits ----------------------------------------------------------------------------------------


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def test_focal_with_gamma_zero_is_cross_entropy():
    logits, labels = batch()
    torch.testing.assert_close(
        build_loss("focal", class_counts(), gamma=0)(logits, labels), cross_entropy(logits, labels)
    )


def test_balanced_softmax_ignores_a_common_factor_and_becomes_cross_entropy_as_counts_become_equal():
    logits, labels = batch()
    one = build_loss("balanced_softmax", class_counts())(logits, labels)
    torch.testing.assert_close(build_loss("balanced_softmax", class_counts(COUNTS * 10))(logits, labels), one)
    nearly = class_counts([10**8, 10**8 + 1] + [10**8] * 4)
    uniform = build_loss("balanced_softmax", nearly)(logits, labels)
    torch.testing.assert_close(uniform, cross_entropy(logits, labels), rtol=1e-6, atol=1e-6)


def test_balanced_softmax_with_uniform_counts_is_cross_entropy():
    # By the class itself: `build_loss` refuses such a training set.
    logits, labels = batch()
    expected = [ref_cross_entropy(z, y) for z, y in zip(logits.numpy(), labels.tolist(), strict=True)]
    uniform = BalancedSoftmax(class_counts([50] * 6))(logits, labels)
    torch.testing.assert_close(uniform, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_class_balanced_as_beta_tends_to_one_weighs_by_inverse_frequency():
    logits, labels = batch()
    inverse = [1 / n for n in COUNTS.tolist()]
    expected = [
        len(COUNTS) * inverse[y] / sum(inverse) * ref_cross_entropy(z, y)
        for z, y in zip(logits.numpy(), labels.tolist(), strict=True)
    ]
    limit = build_loss("class_balanced", class_counts(), beta=1 - 1e-12)(logits, labels)
    torch.testing.assert_close(limit, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_effective_number_weights_at_both_ends():
    assert effective_number_weights(COUNTS, 0.0) == pytest.approx(np.ones(len(COUNTS)))
    inverse = 1 / COUNTS
    assert effective_number_weights(COUNTS, 1 - 1e-12) == pytest.approx(inverse * len(COUNTS) / inverse.sum(), rel=1e-6)
    for beta in (0.0, 0.9, 0.9999):
        assert effective_number_weights(COUNTS, beta).sum() == pytest.approx(len(COUNTS))
    with pytest.raises(ValueError, match="beta is 1"):
        effective_number_weights(COUNTS, 1)


def test_class_balanced_with_beta_zero_is_the_loss_without_weights():
    logits, labels = batch()
    torch.testing.assert_close(
        build_loss("class_balanced", class_counts(), beta=0)(logits, labels), cross_entropy(logits, labels)
    )


def test_ldam_margins():
    m = margins(COUNTS, 0.5)
    assert m.argmax() == COUNTS.argmin()
    assert m.max() == pytest.approx(0.5)
    assert m * COUNTS**0.25 == pytest.approx(np.full(len(COUNTS), 0.5 * COUNTS.min() ** 0.25))
    assert margins(np.array([16, 1]), 0.5) == pytest.approx([0.25, 0.5])
    logits, labels = batch()
    without = build_loss("ldam", class_counts(), max_margin=0)(logits, labels)
    torch.testing.assert_close(without, cross_entropy(logits, labels))


@pytest.mark.parametrize(("name", "option"), [("ldam", "reweight_from_epoch"), ("class_balanced", "from_epoch")])
def test_deferred_reweighting_starts_at_its_epoch(name, option):
    logits, labels = batch()
    loss = build_loss(name, class_counts(), **{option: 160})
    weights = torch.tensor(cb_weights(0.9999))[labels]
    early = loss(logits, labels)
    loss.on_epoch(159)
    torch.testing.assert_close(loss(logits, labels), early)
    storage = loss.class_weights.data_ptr()
    loss.on_epoch(160)
    torch.testing.assert_close(loss(logits, labels), weights * early, rtol=1e-6, atol=1e-6)
    assert loss.class_weights.data_ptr() == storage
    loss.on_epoch(0)
    torch.testing.assert_close(loss(logits, labels), early)


def test_reweighted_ldam_is_averaged_by_the_weights_of_the_batch():
    logits, labels = batch()
    labels[:12] = 0  # a long tail, so that the two averages differ
    loss = build_loss("ldam", class_counts(), reweight_from_epoch=1)
    assert loss.mean_weight(labels) == 1
    loss.on_epoch(1)
    step = Step.__new__(Step)
    step.loss, step.reducer = loss, Reducer()
    mine = step.mean_loss(loss(logits, labels), labels)
    weights = np.array(cb_weights(0.9999))[labels.numpy()]
    terms = [ref_ldam(z, y) for z, y in zip(logits.numpy(), labels.tolist(), strict=True)]
    assert mine.item() == pytest.approx((weights * terms).sum() / weights.sum(), rel=1e-6)
    assert abs(weights.mean() - 1) > 0.2
    step.loss = build_loss("class_balanced", class_counts())
    losses = step.loss(logits, labels)
    assert step.mean_loss(losses, labels) == losses.mean()


def test_ldam_never_reweights_unless_told():
    logits, labels = batch()
    loss = build_loss("ldam", class_counts())
    before = loss(logits, labels)
    loss.on_epoch(10**6)
    torch.testing.assert_close(loss(logits, labels), before)


def test_smoothing_at_its_end_points():
    eps = smoothing_by_class(COUNTS, 0.4, 0.1)
    assert eps[COUNTS.argmax()] == pytest.approx(0.4)
    assert eps[COUNTS.argmin()] == pytest.approx(0.1)
    assert (np.diff(eps) < 0).all()
    logits, labels = batch()
    none = build_loss("label_aware_smoothing", class_counts(), head=0, tail=0)
    torch.testing.assert_close(none(logits, labels), cross_entropy(logits, labels))
    constant = build_loss("label_aware_smoothing", class_counts(), head=0.25, tail=0.25)
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.25)
    torch.testing.assert_close(constant(logits, labels), expected)


def test_smoothing_of_the_largest_and_the_smallest_class_is_head_and_tail():
    logits, _ = batch()
    loss = build_loss("label_aware_smoothing", class_counts(), head=0.4, tail=0.1)
    for y, eps in ((int(COUNTS.argmax()), 0.4), (int(COUNTS.argmin()), 0.1)):
        expected = []
        for z in logits.numpy():
            target = np.full(len(z), eps / len(z))
            target[y] += 1 - eps
            expected.append(-(target * np.log(softmax(z))).sum())
        value = loss(logits, torch.full((len(logits),), y))
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_ldam_pulls_the_label_back_by_scale_times_margin():
    logits, _ = batch()
    loss = build_loss("ldam", class_counts(), max_margin=0.5, scale=30)
    for y, n in enumerate(COUNTS.tolist()):
        margin = 0.5 * (min(COUNTS.tolist()) / n) ** 0.25
        expected = []
        for z in logits.numpy():
            others = sum(math.exp(v) for k, v in enumerate(z) if k != y)
            expected.append(math.log1p(others / math.exp(z[y] - 30 * margin)))
        value = loss(logits, torch.full((len(logits),), y))
        torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=3e-6, atol=1e-6)


class TestEqualization:
    """The draws: when they matter, that they are held, and that they resume."""

    def test_without_rare_classes_it_is_cross_entropy(self):
        logits, labels = batch()
        loss = build_loss("equalization", class_counts(), threshold=COUNTS.min() / COUNTS.sum())
        loss.draw(len(labels))
        torch.testing.assert_close(loss(logits, labels), cross_entropy(logits, labels))

    def test_with_gamma_zero_it_is_cross_entropy(self):
        logits, labels = batch()
        loss = build_loss("equalization", class_counts(), gamma=0, threshold=0.05)
        loss.draw(len(labels))
        torch.testing.assert_close(loss(logits, labels), cross_entropy(logits, labels))

    def test_gamma_one_drops_every_rare_negative(self):
        loss = build_loss("equalization", class_counts(), gamma=1, threshold=0.05)
        logits, labels = batch()
        loss.draw(len(labels))
        leaf = logits.clone().requires_grad_()
        loss(leaf, labels).sum().backward()
        negative = ~F.one_hot(labels, 6).bool()
        assert (leaf.grad[:, 3:][negative[:, 3:]] == 0).all()
        assert (leaf.grad[:, :3][negative[:, :3]] > 0).all()

    def test_draws_hold_until_the_next_draw(self):
        loss = build_loss("equalization", class_counts(), gamma=0.5, threshold=0.05)
        logits, labels = batch()
        loss.draw(len(labels))
        first = loss(logits, labels)
        torch.rand(3)
        assert torch.equal(loss(logits, labels), first)
        storage = loss.dropped.data_ptr()
        loss.draw(len(labels))
        assert not torch.equal(loss(logits, labels), first)
        assert loss.dropped.data_ptr() == storage

    def test_it_asks_to_be_drawn(self):
        logits, labels = batch()
        with pytest.raises(RuntimeError, match=r"call draw\(batch_size\)"):
            build_loss("equalization", class_counts())(logits, labels)

    def test_resumed_draws_are_those_of_the_uninterrupted_run(self):
        loss = build_loss("equalization", class_counts(), gamma=0.5, threshold=0.05, seed=3)
        loss.draw(24)
        state = loss.state_dict()
        loss.draw(24)
        resumed = build_loss("equalization", class_counts(), gamma=0.5, threshold=0.05, seed=9)
        resumed.load_state_dict(state)
        resumed.draw(24)
        assert torch.equal(resumed.dropped, loss.dropped)


# ---- the table ------------------------------------------------------------------------------------------------------

NEED_IMBALANCE = [name for name, loss in LOSSES.items() if loss.without_imbalance is not None]
TAKE_ANY_COUNTS = [name for name in LOSSES if name not in NEED_IMBALANCE]


def test_every_loss_is_compared_with_a_reference():
    missing = sorted(set(LOSSES) - {name for name, _ in everything()})
    assert not missing, f"add a case to CASES, with a reference, for {', '.join(missing)}"


@pytest.mark.parametrize("name", NEED_IMBALANCE)
def test_balanced_training_sets_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"loss {name} needs classes of different size, but each has 50"):
        build_loss(name, class_counts([50] * 6))


@pytest.mark.parametrize("name", TAKE_ANY_COUNTS)
def test_losses_without_counts_take_balanced_training_sets_and_are_the_same_there(name):
    logits, labels = batch()
    balanced, tailed = (build_loss(name, class_counts(counts)) for counts in ([50] * 6, COUNTS))
    for loss in (balanced, tailed):
        loss.draw(len(labels))
    assert torch.equal(balanced(logits, labels), tailed(logits, labels)), (
        f"{name} depends on counts: set without_imbalance"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ballanced_softmax", {}, "did you mean 'balanced_softmax'"),
        ("focal", {"gama": 1}, "option of loss focal 'gama': allowed are gamma; did you mean 'gamma'"),
        ("cross_entropy", {"gamma": 1}, "option of loss cross_entropy 'gamma': allowed are label_smoothing"),
    ],
)
def test_wrong_names(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_loss(name, class_counts(), **options)
    with pytest.raises(ValueError, match=message):
        check_loss(name, options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("focal", {"gamma": -1}, "gamma is -1; it must be a number of at least 0"),
        ("focal", {"gamma": "two"}, "gamma is 'two'"),
        ("class_balanced", {"beta": 1.0}, "beta is 1.0; it must be a number of at least 0 and below 1"),
        ("class_balanced", {"kind": "focl"}, "did you mean 'focal'"),
        ("label_aware_smoothing", {"head": 0.1, "tail": 0.3}, "head is 0.1; it must be a number of at least 0.3"),
        ("equalization", {"gamma": 1.5}, "gamma is 1.5"),
        ("ldam", {"reweight_from_epoch": -1}, "from_epoch is -1"),
    ],
)
def test_bad_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_loss(name, class_counts(), **options)


def test_tables_of_class_constants_follow_the_module():
    for name, options in everything():
        loss = build_loss(name, class_counts(), **options).to("meta")
        assert all(b.device.type == "meta" for b in loss.buffers())
