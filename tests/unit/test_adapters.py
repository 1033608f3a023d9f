"""Adapters: what they compute, what is trained, how they are merged, and which checkpoints they leave."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from short_runs import RECIPE, assert_same, comparable, make, stop_after
from test_trained_part import Normalised, batch_of, step_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlt.autograd import FoldedForward
from fastlt.models import build_model
from fastlt.models.adapters import adapted_layers, has_adapters, read_adapter
from fastlt.models.adaptformer import Bottleneck, bottleneck_for
from fastlt.models.frozen_part import content_hash
from fastlt.recipe import RecipeError, load_recipe
from fastlt.run.network_checks import check_network
from fastlt.run.stopping import Interrupted
from fastlt.run.trained import load_trained

VIT = "vit_tiny_patch16_224"
KINDS = {
    "lora": {"lora": {"rank": 4, "targets": ["qkv", "fc1"]}},
    "dora": {"dora": {"rank": 2, "alpha": 4}},
    "lokr": {"lokr": {"rank": 4, "targets": ["attn.proj"]}},
    "ia3": "ia3",
    "adaptformer": {"adaptformer": {"bottleneck": 5}},
    "bitfit": "bitfit",
}


def vit(adapt=None, name=VIT, **more):
    torch.manual_seed(0)
    return build_model(name, num_classes=3, image_size=32, adapt=adapt, **more)


def moved(model):
    """The model after every trained parameter went a random way."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw).to(parameter))
    return model


# What is put in


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_computes_the_same_with_new_adapters_and_something_else_with_trained_ones(kind):
    images = torch.randn(2, 3, 32, 32)
    plain, adapted = vit().eval(), vit(KINDS[kind]).eval()
    with torch.no_grad():
        adapted.head.load_state_dict(plain.head.state_dict())
        torch.testing.assert_close(adapted(images), plain(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(moved(adapted)(images), plain(images), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "adapt", "size"),
    [
        ("swin_tiny_patch4_window7_224", "adaptformer", 224),
        ("deit3_small_patch16_224", "adaptformer", 32),
        ("eva02_tiny_patch14_224", "adaptformer", 28),
        ("resnet18", {"lora": {"targets": ["layer4.*.conv1", "downsample.0"]}}, 32),
        ("efficientnet_lite0", {"lora": {"targets": ["conv_pw", "conv_pwl"]}}, 32),
    ],
)
def test_other_networks_take_them_too(name, adapt, size):
    images = torch.randn(1, 3, size, size)
    models = []
    for one in (None, adapt):
        torch.manual_seed(0)
        models.append(build_model(name, num_classes=3, image_size=size, adapt=one).eval())
    plain, adapted = models
    assert {n for n, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        torch.testing.assert_close(adapted.features(images), plain.features(images), rtol=1e-4, atol=1e-5)


def test_what_is_trained_are_the_adapters_and_the_head_and_what_else_is_named():
    model = vit(KINDS["lora"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert len(trained) == 2 + 12 * 2 * 2
    more = vit(KINDS["lora"], train="norms")
    extra = {n for n, p in more.named_parameters() if p.requires_grad} - trained
    assert extra == {n for n in extra if "norm" in n}
    assert len(extra) == 2 * 25
    model.requires_grad_(False)
    model.unfreeze()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    biases = {n for n, p in vit("bitfit").named_parameters() if p.requires_grad}
    assert biases == {n for n, _ in vit().named_parameters() if n.endswith("bias")} | {"head.weight"}


def test_a_bottleneck_is_that_of_its_formula():
    torch.manual_seed(0)
    adapter = moved(Bottleneck(6, 4).double())
    x = torch.randn(5, 6, dtype=torch.float64)
    values = {n: p.detach() for n, p in adapter.named_parameters()}
    for row, out in zip(x, adapter(x), strict=True):
        centred = row - row.mean()
        unit = centred / (centred.square().mean() + 1e-5).sqrt() * values["norm.weight"] + values["norm.bias"]
        hidden = (values["down.weight"] @ unit + values["down.bias"]).clamp_min(0)
        torch.testing.assert_close(out, values["scale"] * (values["up.weight"] @ hidden + values["up.bias"]))


def test_the_bottleneck_stands_beside_norm_and_mlp_of_a_block():
    model = moved(vit(KINDS["adaptformer"], train=["blocks.0.norm2"]).double())
    block, x = model.backbone.get_submodule("blocks.3").eval(), torch.randn(2, 5, 192, dtype=torch.float64)
    half = x + block.attn(block.norm1(x))
    parts = block.mlp
    torch.testing.assert_close(block(x), half + parts.mlp(parts.norm(half)) + parts.adapter(half))


@pytest.mark.parametrize(("classes", "width"), [(1000, 32), (365, 8), (100, 4), (8142, 256), (10, 1)])
def test_the_default_bottleneck_is_that_of_lift_for_twelve_blocks(classes, width):
    assert bottleneck_for(classes, 12) == width
    model = build_model(VIT, num_classes=classes, image_size=32, adapt="adaptformer")
    assert {m.down.out_features for m in model.modules() if isinstance(m, Bottleneck)} == {width}


def test_lora_is_a_product_of_its_rank_times_alpha_over_rank():
    model = moved(vit({"lora": {"rank": 4, "alpha": 8, "targets": ["blocks.0.attn.qkv"]}}).double())
    (layer,) = adapted_layers(model).values()
    x = torch.randn(3, 192, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (4, 192)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 2 * x @ a.T @ b.T)


# The meta-gradient


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_of_adapters_is_that_of_differentiating_twice(kind):
    model = moved(vit(KINDS[kind]).double())
    step = step_of(model, "mwn")
    batch, meta_batch, weights = batch_of(4), batch_of(6, seed=1), torch.linspace(0.5, 2, 4).double()
    found, _ = step.per_sample_gradient(step.training_pass(batch), weights, meta_batch)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def losses(values, one):
        logits = torch.func.functional_call(model, values, (Normalised()(one.images),))
        return nn.functional.cross_entropy(logits, one.labels, reduction="none")

    with sdpa_kernel(SDPBackend.MATH):
        w = weights.clone().requires_grad_()
        inner = (w * losses(parameters, batch)).mean()
        slopes = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
        ahead = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), slopes, strict=True)}
        (expected,) = torch.autograd.grad(losses(ahead, meta_batch).mean(), [w])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))


# Merging


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_a_plain_network_with_the_same_logits_where_that_can_be(kind):
    model, images = moved(vit(KINDS[kind]).double()).eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    one = model.merged()
    with torch.no_grad():
        torch.testing.assert_close(one(images), model(images), rtol=1e-9, atol=1e-10)
    assert_same(dict(model.state_dict()), dict(before))
    plain = kind != "adaptformer"
    assert has_adapters(one) == (not plain)
    assert (one.state_dict().keys() == vit().state_dict().keys()) == plain
    assert has_adapters(model) == (kind != "bitfit")


def test_convolutions_merge_too():
    adapt = {"lora": {"rank": 2, "targets": ["conv2", "downsample.0"]}}
    model = moved(build_model("resnet18", num_classes=3, adapt=adapt).double()).eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.merged()(images), model(images), rtol=1e-9, atol=1e-10)


def test_folded_batch_norm_sees_the_adapters():
    adapt = {"lora": {"rank": 2, "targets": ["conv1", "conv2"]}}
    model = moved(build_model("cifar_resnet8", num_classes=3, adapt=adapt)).eval()
    images = torch.randn(4, 3, 16, 16)
    folded = FoldedForward(model, images[:1])
    with torch.no_grad(), folded.weights():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lorra", "unknown adapter 'lorra'.*did you mean 'lora'"),
        ({"lora": {"rnak": 4}}, "unknown option of lora 'rnak'.*did you mean 'rank'"),
        ({"lora": {"rank": 0}}, "rank is 0: give a number >= 1"),
        ({"lora": {"rank": "4"}}, "lora.rank is '4'; allowed: an integer"),
        ({"lora": {"targets": "qkv"}}, "lora.targets is 'qkv'; allowed: a list of names or null"),
        ({"lora": {"dropout": 1.0}}, "dropout is 1.0"),
        ({"bitfit": {"rank": 2}}, "bitfit has no options"),
        ({"lora": 4}, "allowed: a name, or a name with its options"),
        ({"lora": {}, "ia3": {}}, "allowed: a name, or a name with its options"),
    ],
)
def test_a_bad_adapter_is_refused_with_the_recipe(spec, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(spec)
    with pytest.raises(RecipeError, match=r"model\.adapt: "):
        load_recipe(RECIPE, [f"model.adapt={spec}"])


@pytest.mark.parametrize(
    ("name", "adapt", "message"),
    [
        ("resnet18", "lora", r"model.adapt.lora.targets: ResNet has none of qkv, .*: conv1, conv2, downsample.0"),
        (
            VIT,
            {"lora": {"targets": ["kqv"]}},
            r"targets: 'kqv' is not there in VisionTransformer; .* targets: proj, qkv, fc1, fc2",
        ),
        (VIT, {"lora": {"targets": ["norm1"]}}, r"'norm1' is LayerNorm in VisionTransformer"),
        (VIT, {"ia3": {"inputs": ["proj"]}}, "model.adapt.ia3.inputs: 'proj' is none of the targets"),
        ("resnet18", "adaptformer", r"adaptformer goes beside the MLP .* ResNet has none \(it has BasicBlock\)"),
        ("swinv2_tiny_window8_256", "adaptformer", r"has none \(it has SwinTransformerV2Block\)"),
    ],
)
def test_targets_that_are_not_there_are_refused_with_those_that_are(name, adapt, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build_model(name, num_classes=3, adapt=adapt)


def test_a_layer_whose_weight_is_taken_by_hand_is_refused():
    recipe = load_recipe(RECIPE, ["model={name: beit_base_patch16_224, adapt: lora}", "data.image_size=32"])
    model = build_model("beit_base_patch16_224", num_classes=3, image_size=32, adapt="lora")
    with pytest.raises(ValueError, match=r"takes the weights of backbone.blocks.0.attn.qkv, .* by hand"):
        check_network(recipe, model)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora needs the package peft.*pip install 'fastlt\[adapt\]'"):
        vit("lora")
    vit("adaptformer")
    vit("bitfit")


# Checkpoints

LORA = "model.adapt={lora: {rank: 2, targets: [conv2, conv1]}}"


@pytest.fixture
def pretrained(tmp_path):
    """A file with the weights of a backbone."""
    torch.manual_seed(7)
    path = tmp_path / "pretrained.pt"
    torch.save(build_model("cifar_resnet8", num_classes=10).backbone.state_dict(), path)
    return path


@pytest.mark.parametrize("more", [[LORA], [LORA, "model.norm=train"], ["model.train=norms"]])
def test_a_run_keeps_the_trained_part_alone_and_goes_on_from_it(digits_words, pretrained, more):
    words = [*digits_words, f"model.checkpoint={pretrained}", *more]
    whole = make(words, "name=whole")
    result = whole.fit()
    state = torch.load(whole.folder / "checkpoints" / "best_end_to_end.pt", weights_only=True)
    assert state["frozen"]["name"] == "cifar_resnet8"
    assert str(pretrained) in state["frozen"]["source"]
    assert not state["model"].keys() & whole.model.frozen
    assert state["model"].keys() | whole.model.frozen == whole.model.state_dict().keys()
    trained = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert trained <= state["model"].keys()

    with pytest.raises(Interrupted):
        stop_after(make(words, "name=stopped"), 5).fit()
    resumed = make(words, "name=stopped")
    resumed.fit()
    one, other = comparable(whole.folder), comparable(resumed.folder)
    one["progress"].pop("parts"), other["progress"].pop("parts")
    assert_same(one, other)

    loaded = load_trained(whole.folder, torch.device("cpu"))
    assert_same(dict(loaded.model.state_dict()), dict(whole.model.state_dict()))
    assert loaded.run.result["top1"] == result["top1"]


def test_other_weights_in_the_place_of_the_frozen_ones_are_refused(digits_words, pretrained):
    words = [*digits_words, f"model.checkpoint={pretrained}", LORA]
    run = make(words)
    run.fit()
    weights = torch.load(pretrained)
    weights["conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(weights, pretrained)
    with pytest.raises(ValueError, match=r"cifar_resnet8 from .*whose weights are others now"):
        load_trained(run.folder, torch.device("cpu"))
    pretrained.unlink()
    with pytest.raises(ValueError, match=r"pretrained.pt does not exist"):
        load_trained(run.folder, torch.device("cpu"))


def test_a_network_that_began_at_random_is_kept_whole(digits_words):
    run = make(digits_words, LORA)
    run.fit()
    state = torch.load(run.folder / "checkpoints" / "best_end_to_end.pt", weights_only=True)
    assert "frozen" not in state
    assert state["model"].keys() == run.model.state_dict().keys()
    load_trained(run.folder, torch.device("cpu"))


def test_adapters_of_a_large_network_take_a_few_megabytes(tmp_path):
    torch.save(build_model("vit_small_patch16_224", num_classes=10).backbone.state_dict(), tmp_path / "vit.pt")
    from fastlt.models.trained_state import trained_state

    model = build_model("vit_small_patch16_224", num_classes=10, checkpoint=tmp_path / "vit.pt", adapt="lora")
    torch.save(trained_state(model), tmp_path / "adapters.pt")
    assert (tmp_path / "adapters.pt").stat().st_size < 1.5e6 < 40 * (tmp_path / "vit.pt").stat().st_size


def test_the_hash_of_weights_is_of_names_types_shapes_and_values():
    one = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": one["b"], "a": torch.arange(6.0).view(2, 3).T.contiguous().T}
    assert content_hash(one) == content_hash(same)
    others = [
        {**one, "a": one["a"].view(3, 2)},
        {**one, "a": one["a"].double()},
        {"c": one["a"], "b": one["b"]},
        {**one, "b": one["b"] + 1},
        {"a": one["a"]},
    ]
    assert len({content_hash(other) for other in [one, *others]}) == 6
