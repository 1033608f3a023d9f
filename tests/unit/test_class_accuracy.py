"""A_t: what is scored when, and that the answer is the accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastlt.device.distributed import Reducer
from fastlt.meta import class_accuracy
from fastlt.meta.class_accuracy import ClassAccuracy, stratified_order
from fastlt.meta.difficulty import driver_target
from fastlt.models import build_model

CLASSES, PER_CLASS = 7, 10


class Thermometer(nn.Module):
    """Predicts the class written in an image's first pixel, plus `shift`: a network whose accuracy is known."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.shift = 0
        self.seen = []

    def forward(self, images):
        assert not self.training
        self.norm(images.float())
        classes = images[:, 0, 0, 0].long()
        self.seen.append(images[:, 1, 0, 0].long())
        return nn.functional.one_hot((classes + self.shift) % CLASSES, CLASSES).float()


def meta_set(right_per_class):
    """Images whose first pixel is their label, except that only `right_per_class[c]` of class c say so."""
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    rank = torch.arange(len(labels)) // CLASSES
    right = rank < torch.tensor(right_per_class)[labels]
    images[:, 0] = torch.where(right, labels, (labels + 1) % CLASSES)[:, None, None]
    images[:, 1] = torch.arange(len(labels))[:, None, None]
    return images, labels


def tracker(right, **options):
    return ClassAccuracy(*meta_set(right), CLASSES, prepare=lambda x: x, **options)


RIGHT = [0, 1, 3, 5, 7, 9, 10]


@pytest.mark.parametrize("options", [{}, {"batch_size": 13}, {"refresh": "rolling"}, {"refresh": "epoch"}])
def test_the_first_answer_is_the_accuracy_of_every_class(options):
    accuracy = tracker(RIGHT, **options).update(Thermometer())
    assert torch.allclose(accuracy, torch.tensor(RIGHT) / PER_CLASS)


@pytest.mark.parametrize("window", [1, 3, 7, 10, 70, 100])
def test_rolling_scores_every_image_at_least_once_in_a_window(window):
    accuracy, model = tracker(RIGHT, refresh="rolling", window=window), Thermometer()
    accuracy.update(model)
    model.seen.clear()
    last = torch.zeros(CLASSES * PER_CLASS)
    for call in range(1, 3 * window + 1):
        accuracy.update(model)
        for seen in model.seen:
            last[seen] = call
        model.seen.clear()
        if call >= window:
            assert call - last.min() < window, "an image was left unscored for a whole window"


def test_rolling_equals_exact_when_the_network_is_frozen_and_follows_it_when_it_changes():
    rolling, exact, model = tracker(RIGHT, refresh="rolling", window=7), tracker(RIGHT), Thermometer()
    for _ in range(10):
        assert torch.equal(rolling.update(model), exact.update(model))
    model.shift = 6
    for _ in range(7):
        latest = rolling.update(model)
    assert torch.equal(latest, exact.update(model))


def test_a_rolling_slice_holds_the_classes_about_equally():
    accuracy, model = tracker(RIGHT, refresh="rolling", window=5), Thermometer()
    accuracy.update(model)
    model.seen.clear()
    for _ in range(5):
        accuracy.update(model)
        counts = torch.bincount(meta_set(RIGHT)[1][torch.cat(model.seen)], minlength=CLASSES)
        model.seen.clear()
        assert counts.tolist() == [2] * CLASSES


def test_epoch_scores_again_only_after_a_new_epoch():
    accuracy, model = tracker(RIGHT, refresh="epoch"), Thermometer()
    first = accuracy.update(model)
    model.shift = 6
    assert torch.equal(accuracy.update(model), first)
    accuracy.start_epoch()
    assert not torch.equal(accuracy.update(model), first)


def test_buffers_and_modes_stay_as_they_are():
    model = Thermometer().train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tracker(RIGHT).update(model)
    assert model.training
    assert not model.norm.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("limit", [class_accuracy.PREPARED_BYTES, 0])
def test_a_network_with_batchnorm_is_scored_as_its_own_eval_pass_does(limit, monkeypatch):
    """With enough images to be folded; rolling slices of 10 are not. Images are kept prepared, or not."""
    monkeypatch.setattr(class_accuracy, "PREPARED_BYTES", limit)
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", num_classes=CLASSES).train()
    images, labels = torch.randint(0, 256, (70, 3, 8, 8), dtype=torch.uint8), torch.arange(70) % CLASSES

    def prepare(x):
        return x.float() / 64 - 2

    rolling = ClassAccuracy(images, labels, CLASSES, prepare=prepare, refresh="rolling", window=7, batch_size=32)
    exact = ClassAccuracy(images, labels, CLASSES, prepare=prepare, batch_size=32)
    assert (rolling.images.dtype == torch.uint8) == (limit == 0)
    answers = []
    for round_ in range(2):
        model(prepare(images[:16]))  # moves BatchNorm's statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        with class_accuracy.evaluation_mode(model):
            right = (model(prepare(images)).argmax(1) == labels).float()
        expected = torch.stack([right[labels == c].mean() for c in range(CLASSES)])
        for _ in range(7 if round_ else 1):
            latest = rolling.update(model)
        assert torch.equal(latest, expected)
        assert torch.equal(exact.update(model), expected)
        answers.append(expected)
    assert not torch.equal(*answers), "both rounds must differ, for what is folded to be of the latest network"
    assert len(rolling.folded.pairs) == len(exact.folded.pairs) == 7


def test_state_continues_in_the_middle_of_a_round():
    model = Thermometer()
    one = tracker(RIGHT, refresh="rolling", window=7)
    for _ in range(4):
        one.update(model)
    other = tracker(RIGHT, refresh="rolling", window=7)
    other.load_state_dict(one.state_dict())
    model.shift = 6
    for _ in range(9):
        assert torch.equal(one.update(model), other.update(model))


def test_shares_of_several_processes_cover_the_meta_set_once():
    shares = [tracker(RIGHT, reducer=Reducer(rank, 3)).images[:, 1, 0, 0] for rank in range(3)]
    assert sorted(torch.cat(shares).tolist()) == list(range(CLASSES * PER_CLASS))


def test_stratified_order_goes_round_the_classes():
    labels = torch.tensor([2, 2, 0, 1, 0, 1, 2])
    assert labels[stratified_order(labels)].tolist() == [0, 1, 2, 0, 1, 2, 2]


def test_a_class_without_meta_images_has_the_mean_accuracy_of_the_others():
    images, labels = meta_set(RIGHT)
    keep = (labels != 3) & (labels != 0)
    accuracy = ClassAccuracy(images[keep], labels[keep], CLASSES, prepare=lambda x: x).update(Thermometer())
    known = [right / PER_CLASS for c, right in enumerate(RIGHT) if c not in (0, 3)]
    mean = sum(known) / len(known)
    expected = [mean if c in (0, 3) else right / PER_CLASS for c, right in enumerate(RIGHT)]
    assert accuracy.tolist() == pytest.approx(expected)
    # So their target of the driver loss is that of the average class.
    assert driver_target(accuracy, "relative")[3].item() == pytest.approx(1 - 1 / CLASSES)


PARTS = {
    "head": (["head"], "dropout"),
    "a parameter of a module that is never called": (["backbone.blocks.1.shift", "head"], "backbone.blocks.0"),
    "late block": (["backbone.blocks.2", "backbone.norm", "head"], "backbone.blocks.1"),
    "a layer in the middle of a block": (["backbone.blocks.2.mlp.fc1", "head"], "backbone.blocks.1"),
    "the second of two branches": (["backbone.blocks.1.norm2", "backbone.blocks.2", "head"], "backbone.blocks.0"),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_comes_before_the_first_trained_parameter_is_computed_once_and_again_when_it_changes(part):
    trained, cut = PARTS[part]
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", num_classes=CLASSES, image_size=32, drop_rate=0.5).train()
    model.backbone.blocks = model.backbone.blocks[:3]
    block = model.backbone.blocks[1]
    block.shift = nn.ParameterDict({"by": nn.Parameter(torch.zeros(192))})
    block.norm1.register_forward_hook(lambda module, args, output: output + block.shift["by"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trained)))
    images, labels = torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8), torch.arange(70) % CLASSES
    first, passes = model.backbone.patch_embed, []
    first.register_forward_hook(lambda module, args, output: passes.append(torch.isfinite(output).all().item()))

    def expected():
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(images.float() / 255)
        passes.clear()
        return torch.zeros(CLASSES).index_add_(0, labels, (logits.argmax(1) == labels).float()) / 10

    accuracy = ClassAccuracy(images, labels, CLASSES, prepare=lambda x: x.float() / 255, batch_size=40)
    for iteration in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        assert torch.equal(accuracy.update(model), expected())
        if iteration == 0:
            assert accuracy.prefix.cut is model.get_submodule(cut)
    passes.clear()
    accuracy.update(model)
    assert not any(passes), "the patches were embedded again"
    assert "forward" not in vars(first)
    with torch.no_grad():
        first.proj.weight.mul_(-1)
    assert torch.equal(accuracy.update(model), expected())


@pytest.mark.parametrize("why", ["all is trained", "statistics that move", "no room"])
def test_outputs_are_not_kept_where_they_change_or_are_too_large(why, monkeypatch):
    norm = "train" if why == "statistics that move" else "frozen"
    train = "all" if why == "all is trained" else "head"
    model = build_model("cifar_resnet8", num_classes=CLASSES, train=train, norm=norm).train()
    monkeypatch.setattr(class_accuracy, "KEPT_BYTES", 70 * 64 * 4 - (why == "no room"))
    accuracy = ClassAccuracy(*meta_set(RIGHT), CLASSES, prepare=lambda x: x.float())
    accuracy.update(model)
    assert accuracy.kept is None
    cut = {"all is trained": None, "statistics that move": model.backbone.conv1, "no room": model.dropout}[why]
    assert (accuracy.prefix and accuracy.prefix.cut) is cut


class Overwrites(nn.Module):
    """Writes to what its frozen layer returned."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 8, 4).requires_grad_(False), nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.head(self.layer(images).flatten(1).sub_(0.5).relu_())


def test_what_is_kept_is_not_overwritten_by_the_network():
    torch.manual_seed(0)
    model, (images, labels) = Overwrites(), meta_set(RIGHT)
    accuracy = ClassAccuracy(images, labels, CLASSES, prepare=lambda x: x.float())
    for _ in range(3):
        with torch.no_grad():
            model.head.weight.normal_()
            right = (model(images.float()).argmax(1) == labels).float()
        wanted = torch.zeros(CLASSES).index_add_(0, labels, right) / PER_CLASS
        assert torch.equal(accuracy.update(model), wanted)
    assert accuracy.prefix.cut is model.layer


class Overwriting(nn.Sequential):
    """A network that normalises its input in place."""

    def forward(self, images):
        return super().forward(images.sub_(0.5).mul_(2.0))


@pytest.mark.parametrize("part", ["all", "head"])
def test_a_network_that_overwrites_its_input_leaves_the_meta_set_as_it_is(part):
    torch.manual_seed(0)
    labels = torch.arange(CLASSES).repeat(3)
    images = torch.rand(len(labels), 3, 8, 8)
    model = Overwriting(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    if part == "head":
        model[0].requires_grad_(False)
    accuracy = ClassAccuracy(images.clone(), labels, CLASSES, prepare=lambda x: x, batch_size=8)
    kept, first = accuracy.images.clone(), accuracy.update(model)
    for _ in range(3):
        assert torch.equal(accuracy.update(model), first)
    assert torch.equal(accuracy.images, kept)
