"""The mixup stage: its objective is cross-entropy with soft labels, and its refusals say what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastlt.augment import build_augment, cutmix, mixup
from fastlt.losses import build_loss
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts

COUNTS = ClassCounts(np.array([40, 12, 3]), ("a", "b", "c"))
SEED, LR = 6, 0.5


class Float64:
    """uint8 to float64 in [0, 1]."""

    def __call__(self, images):
        return images.double() / 255


def pictures(size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (size, 3, 9, 9), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(size) % 3, torch.arange(size))


@pytest.mark.parametrize(("method", "mix"), [("mixup", mixup), ("cutmix", cutmix)])
def test_a_step_descends_the_cross_entropy_with_soft_labels(method, mix):
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Flatten(), nn.Linear(243, 3)).double()
    before = [p.detach().numpy().copy() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    kind = STEPS[method]
    parts = StepParts(model, build_loss("cross_entropy", COUNTS), optimizer, Float64(), None, COUNTS, seed=SEED)
    batch = pictures()
    output = kind(parts, kind.Options(alpha=0.7))(batch)

    mixed, _, partners, lam = mix(Float64()(batch.images), batch.labels, 0.7, torch.Generator().manual_seed(SEED))
    x, share = mixed.flatten(1).numpy(), float(lam)
    target = share * np.eye(3)[batch.labels] + (1 - share) * np.eye(3)[partners]
    z = x @ before[0].T + before[1]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert 0.01 < share < 0.99
    assert float(output.loss) == pytest.approx(-(target * np.log(p)).sum(1).mean(), rel=1e-6)
    after = [p.detach().numpy() for p in model.parameters()]
    np.testing.assert_allclose(after[0], before[0] - LR * (p - target).T @ x / len(x), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(after[1], before[1] - LR * (p - target).mean(0), rtol=1e-6, atol=1e-9)


def test_deferred_weights_are_averaged_by_themselves():
    """As `PerSampleLoss.mean_weight` says: else a step would shrink when the re-weighting begins."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Flatten(), nn.Linear(243, 3)).double()
    loss = build_loss("ldam", COUNTS, reweight_from_epoch=0, max_margin=0.0)
    parts = StepParts(model, loss, torch.optim.SGD(model.parameters(), lr=LR), Float64(), None, COUNTS, seed=SEED)
    batch, before = pictures(), [p.detach().clone() for p in model.parameters()]
    output = STEPS["mixup"](parts, STEPS["mixup"].Options(alpha=0.7))(batch)
    mixed, _, partners, lam = mixup(Float64()(batch.images), batch.labels, 0.7, torch.Generator().manual_seed(SEED))
    z = mixed.flatten(1) @ before[0].T + before[1]
    weights, log_p = loss.class_weights, torch.log_softmax(z, 1)
    total = over = 0.0
    for i in range(len(z)):
        for share, label in ((float(lam), batch.labels[i]), (1 - float(lam), partners[i])):
            total -= share * float(weights[label]) * float(log_p[i, label])
            over += share * float(weights[label])
    assert float(output.loss) == pytest.approx(total / over, rel=1e-6)


def test_nothing_to_blend_is_refused():
    for alpha in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha is {alpha}"):
            STEPS["mixup"].Options(alpha=alpha)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_it_is_no_augmentation_of_the_list(name):
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=f"method: {name} with options"):
        build_augment([{name: {"alpha": 1.0}}], image_size=8, seed=0, device="cpu", **statistics)
