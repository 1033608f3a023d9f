"""`fastlt check` refuses all that a run refuses before it looks at its data, and trains nothing."""

from __future__ import annotations

import pytest
import torch

from fastlt import cli
from fastlt.models import build_model
from fastlt.recipe import load_recipe
from fastlt.run.network_checks import check_network
from fastlt.run.preflight import check_without_data

STAGE = "stages.end_to_end"
WORDS = ["data.image_size=32", "model.name=resnet18", f"{STAGE}.batch_size=1", f"{STAGE}.meta_batch_size=8"]


def recipe(*words):
    return load_recipe("digits_lt", [*WORDS, f"{STAGE}.method=plain", f"{STAGE}.options={{}}", *words])


def test_one_image_under_batch_norm_is_refused_by_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{STAGE}\.batch_size: is 1, one image, of which BatchNorm .* give 2 or more"
    ):
        check_without_data(recipe())
    with pytest.raises(ValueError, match=rf"{STAGE}\.meta_batch_size: is 1, one image, "):
        check_without_data(recipe(f"{STAGE}.method=difficulty", f"{STAGE}.batch_size=8", f"{STAGE}.meta_batch_size=1"))
    model = build_model("resnet18", num_classes=10)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"is 4, one image a process, .* give 8 or more"):
        check_network(recipe(f"{STAGE}.batch_size=4"), model, processes=4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    "words",
    [
        [f"{STAGE}.batch_size=2"],
        ["data.image_size=64"],  # maps of 2 x 2 have a variance
        ["model.name=vit_tiny_patch16_224"],  # no BatchNorm
        [
            f"{STAGE}.batch_size=2",
            "stages.head={method: crt, lr: 1, iterations: 1, batch_size: 1, sampling: class_balanced}",  # in eval mode
        ],
    ],
    ids=["two", "larger", "layer norm", "frozen"],
)
def test_a_batch_that_can_be_normalised_is_taken(words):
    check_network(recipe(*words), build_model(recipe(*words).model.name, num_classes=10, image_size=32))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["model.name=vgg11_bn", "data.image_size=16", f"{STAGE}.batch_size=8"],
            "data.image_size: is 16, which vgg11_bn",
        ),
        (["trackers=[wandbb]"], "unknown tracker 'wandbb'.*did you mean 'wandb'"),
        (["model.drop_path_rate=0.1", "model.name=vgg11_bn"], "leave drop_path_rate at 0"),
        (["model.checkpoint=w.pt", f"{STAGE}.batch_size=8"], "not of this model"),
        (
            ["model.train=[layer4]", f"{STAGE}.batch_size=8", f"{STAGE}.lr_factors={{layer3: 0.1, head: 1}}"],
            rf"{STAGE}\.lr_factors: 'layer3' matches no parameter that is trained, .*did you mean layer4",
        ),
        (
            [
                f"{STAGE}.method=difficulty",
                f"{STAGE}.batch_size=8",
                f"{STAGE}.options.approximate.lookahead_only=[hed]",
            ],
            rf"{STAGE}\.options: approximate.lookahead_only names 'hed'",
        ),
    ],
)
def test_what_the_run_would_refuse_is_refused_by_the_check(words, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(build_model("cifar_resnet8", num_classes=10).state_dict(), "w.pt")
    with pytest.raises(ValueError, match=expected):
        check_without_data(recipe(*words))


def test_the_command_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["check", "digits_lt", "trackers=[wandbb]"]) == 2
    assert "unknown tracker 'wandbb'" in capsys.readouterr().err
    assert cli.main(["check", "digits_lt"]) == 0
    assert not [*tmp_path.iterdir()]


ONE_PASS = "one backward pass keeps the gradients of all samples"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.name=vit_tiny_patch16_224"], ONE_PASS),
        (["model.name=cifar_resnet8"], "passes of their own, since backbone.bn1 normalises with its batch"),
        (["model.name=cifar_resnet8", "model.norm=frozen", "model.train=norms"], ONE_PASS),
        (["model.name=vit_tiny_patch16_224", "compile=inductor"], "passes of their own, since compile: inductor"),
        (
            ["model.name=vit_tiny_patch16_224", "precision=bf16", f"{STAGE}.options.tangent=fp32"],
            "options.tangent is fp32",
        ),
        (["model.name=vit_tiny_patch16_224", "precision=bf16"], ONE_PASS),
        (["model.name=cifar_resnet8", f"{STAGE}.options.meta_weight=0"], "none is taken, options.meta_weight is 0"),
    ],
)
def test_the_command_says_how_the_meta_gradient_is_taken(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage = [f"{STAGE}.method=difficulty", f"{STAGE}.batch_size=8", f"{STAGE}.meta_batch_size=8"]
    assert cli.main(["check", "digits_lt", "data.image_size=32", *stage, *words]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "meta-gradient:" in line]
    assert line.startswith(f"# {STAGE}: meta-gradient: ")
    assert expected in line


def test_the_check_says_nothing_of_stages_without_a_meta_gradient(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_without_data(recipe(f"{STAGE}.batch_size=8")) == []
