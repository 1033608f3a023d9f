"""Steps in float64 on small networks, for comparisons with slow references."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import nn

from fastlt import optim
from fastlt.losses import build_loss
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.models import Classifier, LinearHead, build_model
from fastlt.state import Batch, ClassCounts
from fastlt.steps import STEPS, StepParts

CLASSES, LR, BETA, EPS, DECAY = 4, 3e-3, 0.97, 1e-8, 0.05
COUNTS = ClassCounts(torch.tensor([40, 20, 10, 5]).numpy(), tuple("abcd"))


class Float64Augment:
    """Normalises in float64."""

    def __call__(self, images, dtype=None):
        return images.double() / 127.5 - 1

    def state_dict(self):
        return {}


class Scaled:
    """uint8 to floats around 0, times a factor."""

    def __init__(self, factor=1.0, dtype=torch.float64):
        self.factor, self.dtype = factor, dtype

    def __call__(self, images, dtype=None):
        return (images.to(self.dtype) / 128 - 1) * self.factor

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


def some(count):
    """A batch of random images."""
    labels = torch.randint(0, CLASSES, (count,))
    return Batch(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), labels, torch.arange(count))


def without_batch_norm():
    """A small network whose samples do not couple."""
    layers = [nn.Conv2d(3, 8, 3, stride=4), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=4), nn.Flatten()]
    return Classifier(nn.Sequential(*layers), LinearHead(32, CLASSES))


def make_step(
    method,
    network,
    optimizer="sgd",
    layer_decay=None,
    loss="balanced_softmax",
    clip=None,
    accumulate=1,
    lr_factors=MappingProxyType({}),
    **options,
):
    """A step with weights, images of the meta set and a Difficulty-Net that the same arguments give again."""
    torch.manual_seed(0)
    model = without_batch_norm() if network == "small" else build_model(network, num_classes=CLASSES, image_size=32)
    model = model.double()
    kind = STEPS[method]
    made = kind.Options(**options)
    kind.prepare_model(model, made, seed=0)
    kind.set_train_mode(model, made)
    groups = kind.parameter_groups(model, made)
    rates = {"layer_decay": layer_decay, "lr_factors": lr_factors}
    groups = optim.parameter_groups(model, groups, weight_decay=DECAY, decay="weights", **rates)
    for group in groups:
        group["lr"] = LR * group.get("lr_factor", 1.0)
    more = {"options": {"betas": [0.9, BETA], "eps": EPS}} if optimizer in ("adam", "adamw", "lamb") else {}
    everything = some(12)
    accuracy = ClassAccuracy(everything.images, everything.labels, CLASSES, prepare=Float64Augment())
    parts = StepParts(
        model=model,
        loss=build_loss(loss, COUNTS),
        optimizer=optim.make_optimizer(optimizer, groups, lr=LR, device=torch.device("cpu"), **more),
        augment=Float64Augment(),
        meta_augment=Float64Augment(),
        class_counts=COUNTS,
        class_accuracy=accuracy if kind.needs.class_accuracy else None,
        clip=clip,
        accumulate=accumulate,
    )
    return kind(parts, made)
