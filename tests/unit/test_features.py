"""Training on features of a frozen backbone that are computed once: as through the network, and kept on disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from fastlt.models import build_model
from fastlt.models.trained_state import load_trained_state, trained_state
from fastlt.recipe import load_recipe
from fastlt.run import feature_cache
from fastlt.run.cut_images import validation_images
from fastlt.run.features import FeatureLoader
from fastlt.run.preflight import prepare
from fastlt.run.stopping import Interrupted
from fastlt.run.trained import load_trained
from fastlt.run.trainer import Trainer
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.stored.dataset import ConvertedDataset

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
STAGE = "stages.end_to_end"
SECOND = "batch_size: 32, lr: 0.05, iterations: 6, evaluate_every: 3"


@pytest.fixture
def head_words(digits_words, tmp_path):
    """The head of a network with given weights is trained, without augmentation."""
    torch.manual_seed(5)
    weights = tmp_path / "weights.pt"
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), weights)
    return [*digits_words, "model.train=head", f"model.checkpoint={weights}", "data.augment=[]"]


def run(words, *more):
    trainer = Trainer(prepare(load_recipe(RECIPE, [*words, *more])))
    return trainer, trainer.fit()


def head(trainer):
    return {name: value for name, value in trainer.model.state_dict().items() if name.startswith("head.")}


# The loader


@pytest.mark.parametrize("sampling", ["instance", "class_balanced"])
def test_batches_come_in_the_order_of_images_and_resume_in_an_epoch(digits, sampling):
    dataset = ConvertedDataset.open(digits)
    labels = torch.from_numpy(dataset.labels("train"))
    views = torch.randn(3, len(labels), 4)
    options = {"batch_size": 32, "train": True, "sampling": sampling, "seed": 7}
    images = make_loader(dataset, "train", backend="resident", device="cpu", crop=CropSpec("none"), **options)
    features = FeatureLoader(views, labels, **options)
    assert len(features) == len(images)
    seen = set()
    for epoch in range(3):
        ours, theirs = list(features.epoch(epoch)), list(images.epoch(epoch))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels, b.labels)
            which = (views[:, a.index] == a.images.flatten(1)).all(2)
            assert (which.sum(0) == 1).all()
            seen |= set(which.int().argmax(0).tolist())
        for a, b in zip(features.epoch(epoch, 5), ours[5:], strict=True):
            assert torch.equal(a.images, b.images)
    assert seen == {0, 1, 2}


def test_every_image_has_a_view_of_its_own(digits_words, head_words):
    """The training split does not fill its last batch, and views are drawn anew."""
    words = [*head_words[:-1], "data.augment=[{random_crop: {padding: 2}}]", "data.cached_views=3"]
    trainer, _ = run(words)
    train = trainer.context.features.training["train"]
    assert train.shape == (3, len(trainer.context.dataset.labels("train")), 64)
    assert (train.abs().sum(2) > 0).all()
    differ = (train[0] != train[1]).any(1).double().mean()
    assert 0.8 < differ < 1  # one of 25 places of the crop is drawn for each


# Training


@pytest.mark.parametrize(
    "more",
    {
        "difficulty": [],
        "plain": [f"{STAGE}.method=plain", f"{STAGE}.loss=balanced_softmax"],
        "mwn": [f"{STAGE}.method=mwn"],
        "cosine": [f"{STAGE}.method=plain", "model.head=cosine", "model.drop_rate=0.3"],
        "class means": [f"{STAGE}.method=plain", "model.head_init=class_mean", "model.head=cosine"],
        "second stage": [f"stages.second={{method: crt, sampling: class_balanced, {SECOND}}}"],
        "lws": [f"stages.second={{method: lws, sampling: class_balanced, {SECOND}}}"],
    }.items(),
    ids=lambda item: item[0],
)
def test_training_on_features_is_training_through_the_network(head_words, more, caplog):
    through, result = run(head_words, *more[1], "name=through")
    features, same = run(head_words, *more[1], "name=features", "data.cached_views=1")
    ours, theirs = head(features), head(through)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert result["per_class_accuracy"] == same["per_class_accuracy"]
    assert not list(features.model.backbone.parameters())  # passes do not look at what is not trained
    images = validation_images(features.context.recipe.data, 8)
    caplog.clear()
    for folder in (features.folder, features.folder / "model"):
        loaded = load_trained(folder, torch.device("cpu"))
        torch.testing.assert_close(
            loaded.logits(images), load_trained(through.folder, loaded.device).logits(images), rtol=1e-4, atol=1e-4
        )
    assert not caplog.records  # of the file whose weights the backbone has, nothing is news


def test_weights_go_between_a_network_and_one_without_its_backbone(tmp_path):
    """A backbone with moved statistics, whose checkpoints keep these when it is there, and nothing when it is not."""
    begun = build_model("cifar_resnet8", num_classes=3)
    begun.train()(torch.randn(8, 3, 32, 32))
    torch.save(begun.backbone.state_dict(), tmp_path / "backbone.pt")
    whole, bare = (
        build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "backbone.pt", train="head") for _ in range(2)
    )
    bare.drop_backbone()
    for source, target in ((whole, bare), (bare, whole)):
        torch.nn.init.normal_(source.head.weight)
        load_trained_state(target, trained_state(source))
        assert torch.equal(target.head.weight, source.head.weight)
    for name, value in begun.backbone.state_dict().items():
        assert torch.equal(whole.backbone.state_dict()[name], value), name


def test_a_resumed_run_agrees_bit_for_bit(head_words):
    words = [*head_words[:-1], "data.augment=[{random_crop: {padding: 1}}]", "data.cached_views=2"]
    whole, result = run(words, "name=whole")
    stopped = Trainer(prepare(load_recipe(RECIPE, [*words, "name=stopped"])))
    save, count = stopped.checkpoints.save_last, []

    def save_and_stop(*arguments):
        save(*arguments)
        count.append(1)
        if len(count) == 1:
            signal.raise_signal(signal.SIGTERM)

    stopped.checkpoints.save_last = save_and_stop
    with pytest.raises(Interrupted):
        stopped.fit()
    resumed, again = run(words, "name=stopped")
    assert all(torch.equal(value, head(resumed)[name]) for name, value in head(whole).items())
    assert result["per_class_accuracy"] == again["per_class_accuracy"]


# The files


def test_features_are_read_from_the_disk_and_computed_again_where_they_are_damaged(head_words, monkeypatch, caplog):
    first, result = run(head_words, "data.cached_views=2", "name=first")
    files = sorted((Path(first.folder).parent / feature_cache.FOLDER).iterdir())
    assert len(files) == 6  # two views of train and meta, one of meta and test for evaluation
    computed = []
    compute = feature_cache._Source._compute
    monkeypatch.setattr(
        feature_cache._Source, "_compute", lambda self, *which: computed.append(which) or compute(self, *which)
    )
    _, again = run(head_words, "data.cached_views=2", f"{STAGE}.lr=0.05", "name=second")
    assert computed == []
    assert again["top1"] is not None
    content = bytearray(files[0].read_bytes())
    content[len(content) // 2] ^= 1
    files[0].write_bytes(content)
    _, third = run(head_words, "data.cached_views=2", "name=third")
    assert len(computed) == 1
    assert "its features are computed again" in caplog.text
    assert third["per_class_accuracy"] == result["per_class_accuracy"]
    # Another seed draws other views, and evaluates on the same features.
    run(head_words, "data.cached_views=2", "seed=1", "name=fourth")
    assert [view for _, view in computed[1:]] == [0, 1, 0, 1]


def test_another_way_of_drawing_crops_has_features_of_its_own(head_words, tmp_path, monkeypatch):
    """The resident loader draws crops on the device, the others by the plan of the epoch."""
    crop = ["data.train_crop=random_resized", "data.image_size=8", "data.cached_views=1"]
    run(head_words, *crop, "data.loader=resident", "name=first")
    computed = []
    compute = feature_cache._Source._compute
    monkeypatch.setattr(
        feature_cache._Source, "_compute", lambda self, *which: computed.append(which) or compute(self, *which)
    )
    abandoned, in_use = (tmp_path / "runs" / feature_cache.FOLDER / f"{n}.pt.1.part" for n in "ab")
    for part in (abandoned, in_use):
        part.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    run(head_words, *crop, "data.loader=auto", "name=second")
    assert computed == [], "auto chooses the same loader"
    run(head_words, *crop, "data.loader=ffcv", "name=third")
    assert computed == [("train", 0), ("meta", 0)], "the views of evaluation are the same"
    assert in_use.exists()
    assert not abandoned.exists()


REFUSED = {
    "whole network": (["model.train=all"], "data.cached_views: is set, but the backbone's features change"),
    "moving statistics": (["model.norm=train"], "data.cached_views: is set, but the backbone's features change"),
    "random weights": (["model.checkpoint=null"], "the backbone has random weights"),
    "stochastic depth": (["model.drop_path_rate=0.1"], "without model.drop_path_rate"),
    "several crops": (["data.test_crops=5", "data.eval_crop=center"], "features of one crop are tested"),
    "mixup": ([f"{STAGE}.method=mixup"], "method: is 'mixup', which needs the images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_the_images_is_refused(head_words, case):
    words, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_recipe(RECIPE, [*head_words, "data.cached_views=1", *words])


def test_more_features_than_memory_are_refused(head_words, monkeypatch):
    monkeypatch.setattr(feature_cache, "free_share", lambda device, processes: 100_000)
    with pytest.raises(ValueError, match=r"data\.cached_views: is 4, whose features take .* take fewer views"):
        Trainer(prepare(load_recipe(RECIPE, [*head_words, "data.cached_views=4"])))
