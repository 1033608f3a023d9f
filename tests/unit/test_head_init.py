"""How the head of a new network begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from short_runs import RECIPE, STAGE, make

from fastlt.models import CosineHead, LinearHead, build_model
from fastlt.models.head_init import check_head_init, read_rows, set_head
from fastlt.models.restricted_head import RestrictedHead
from fastlt.recipe import RecipeError, load_recipe


def new_head(trainer):
    """The head of a run's first stage before its first iteration."""
    stage = trainer._start_stage("end_to_end")
    stage.loaders.close()
    return trainer.model.head


def class_means(trainer):
    """Image after image in float64, apart from the code that is tested."""
    model, data = trainer.model.double().eval(), trainer.context.dataset
    sums, counts = np.zeros((10, model.head.in_features)), np.zeros(10)
    for images, labels in trainer.evaluation.training_images():
        for image, label in zip(images, labels, strict=True):
            with torch.no_grad():
                sums[label] += model.features(image[None].double())[0].numpy()
            counts[label] += 1
    assert (counts == np.bincount(data.labels("train"))).all()
    return torch.from_numpy(sums / counts[:, None])


def test_a_linear_head_begins_as_the_nearest_class_mean(digits_words):
    head = new_head(trainer := make(digits_words, "model.head_init=class_mean"))
    means = class_means(trainer)
    torch.testing.assert_close(head.weight.double(), means, rtol=1e-4, atol=1e-5)
    x = torch.randn(20, means.shape[1], dtype=torch.float64)
    assert torch.equal(head.double()(x).argmax(1), torch.cdist(x, means).argmin(1))


def test_a_cosine_head_begins_with_the_directions_of_the_means(digits_words):
    head = new_head(trainer := make(digits_words, "model.head_init=class_mean", "model.head=cosine"))
    means = class_means(trainer)
    torch.testing.assert_close(head.weight.double(), means / means.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_run_from_class_means_starts_better_than_one_from_a_random_head(digits_words):
    words = [*digits_words, f"{STAGE}.iterations=1", f"{STAGE}.warmup=0", f"{STAGE}.lr=1e-6", "model.train=head"]
    random = make(words, "name=random").fit()
    means = make(words, "name=means", "model.head_init=class_mean").fit()
    assert means["top1"] > random["top1"] + 0.2


def test_a_later_stage_goes_on_with_the_head_that_it_gets(digits_words):
    second = "stages.second={method: plain, lr: 1e-9, iterations: 1}"
    run = make(digits_words, "model.head_init=zeros", f"{STAGE}.method=plain", second)
    run.fit()
    assert run.model.head.weight.abs().max() > 0.01


def test_zeros_give_every_class_the_same_logit(digits_words):
    head = new_head(make(digits_words, "model.head_init=zeros"))
    assert not head.weight.any()
    assert not head.bias.any()


def test_a_uniform_prior_moves_the_bias_alone(digits_words):
    random, head = new_head(make(digits_words)), new_head(make(digits_words, "model.head_init=uniform_prior"))
    assert torch.equal(head.weight, random.weight)
    torch.testing.assert_close(torch.sigmoid(head.bias.double()), torch.full((10,), 0.1, dtype=torch.float64))


def save_rows(path, rows):
    if path.suffix == ".npy":
        np.save(path, rows.numpy())
    elif path.suffix == ".safetensors":
        save_file({"text_features": rows}, path)
    else:
        torch.save({"text_features": rows} if path.suffix == ".pth" else rows, path)
    return path


@pytest.mark.parametrize("name", ["rows.npy", "rows.safetensors", "rows.pt", "rows.pth"])
def test_a_head_begins_with_the_rows_of_a_file(name, tmp_path):
    rows = torch.randn(3, 5)
    path = save_rows(tmp_path / name, rows)
    linear, cosine = LinearHead(5, 3), CosineHead(5, 3)
    for head in (linear, cosine):
        set_head(RestrictedHead(head), read_rows(path), means=False)
    assert torch.equal(linear.weight, rows)
    assert not linear.bias.any()
    torch.testing.assert_close(cosine.weight, rows / rows.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.ones(3, 4), "has 3 rows of 4 numbers, where the head has 3 classes and 64 features"),
        (torch.ones(2, 64), "has 2 rows of 64 numbers"),
        (torch.ones(3), "holds no single matrix"),
        (torch.ones(3, 64).index_fill(0, torch.tensor([1]), 0), "has a row that is zero or not finite"),
        (torch.ones(3, 64).index_fill(0, torch.tensor([1]), float("nan")), "has a row that is zero or not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(rows, message, tmp_path):
    model = build_model("cifar_resnet8", num_classes=3)
    with pytest.raises(ValueError, match=message):
        check_head_init(str(save_rows(tmp_path / "rows.npy", rows)), model)


def test_what_is_no_beginning_is_refused(tmp_path, digits_words):
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match=r"text.npy cannot be read"):
        read_rows(tmp_path / "text.npy")
    with pytest.raises(RecipeError, match=r"model.head_init: .*class_means is not a file; give class_mean, zeros"):
        load_recipe(RECIPE, ["model.head_init=class_means"])
    with pytest.raises(RecipeError, match=r"model.head_init: is zeros with model.head cosine"):
        load_recipe(RECIPE, ["model.head_init=zeros", "model.head=cosine"])
    with pytest.raises(RecipeError, match=r"model.head_init: is uniform_prior with model.head cosine"):
        load_recipe(RECIPE, ["model.head_init=uniform_prior", "model.head=cosine"])
    path = save_rows(tmp_path / "rows.npy", torch.ones(10, 3))
    with pytest.raises(ValueError, match="has 10 rows of 3 numbers"):
        make(digits_words, f"model.head_init={path}")


def test_a_method_that_goes_on_from_a_trained_head_refuses_another_beginning(tmp_path):
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), tmp_path / "model.pt")
    words = [f"model.checkpoint={tmp_path / 'model.pt'}", "model.head_init=class_mean", f"{STAGE}.method=lws"]
    with pytest.raises(RecipeError, match=r"method: is 'lws', which goes on from a trained head, but model.head_init"):
        load_recipe(RECIPE, [*words, f"{STAGE}.sampling=class_balanced"])
