"""Optimizers by name, groups of parameters by decay and by layer, preconditioners."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from fastlt import optim
from fastlt.device.compiled import load_optimizer
from fastlt.models import build_model
from fastlt.optim.factory import options_of
from fastlt.recipe import load_recipe

CPU = torch.device("cpu")


def quadratic(name, steps=3, dtype=torch.float64, **more):
    """The weights after some steps of an optimizer on a quadratic, and the optimizer."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)) for _ in range(2)]
    optimizer = optim.make_optimizer(name, [{"params": weights}], lr=1e-2, device=CPU, **more)
    for _ in range(steps):
        take_step(optimizer, weights)
    return weights, optimizer


def take_step(optimizer, weights):
    for weight in weights:
        weight.grad = 2 * weight.detach() + 0.1
    optimizer.step()


def test_sgd_is_torchs_own_bit_for_bit():
    ours, _ = quadratic("sgd", momentum=0.9, nesterov=True, weight_decay=1e-3)
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2)]
    sgd = torch.optim.SGD(theirs, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3, foreach=True)
    for _ in range(3):
        take_step(sgd, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_of_the_list_takes_steps_and_goes_on_from_its_state(name):
    optim.check_optimizer(name, {})
    torch.manual_seed(1)
    weights, optimizer = quadratic(name, dtype=torch.float32)
    others, other = quadratic(name, steps=0, dtype=torch.float32)
    for weight, another in zip(weights, others, strict=True):
        assert not torch.equal(weight, another), "it moved"
        another.data.copy_(weight)
    load_optimizer(other, copy.deepcopy(optimizer.state_dict()))
    for one, ws in ((optimizer, weights), (other, others)):
        torch.manual_seed(2)
        take_step(one, ws)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_options_reach_the_optimizer():
    _, optimizer = quadratic("adamw", options={"betas": [0.8, 0.95], "eps": 1e-6}, weight_decay=0.05)
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.05)
    assert quadratic("rmsprop", momentum=0.7)[1].param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("adam_w", {}, "optimizer: unknown optimizer 'adam_w'.*did you mean 'adamw'"),
        ("adamw", {"options": {"beta": 0.9}}, "optimizer_options.beta: .*allowed are amsgrad, betas, eps"),
        ("adamw", {"options": {"betas": [0.9, 1.5]}}, "refused by adamw: Invalid beta"),
        ("adamw", {"options": {"betas": [0.9]}}, "refused by adamw"),
        ("adamw", {"momentum": 0.8}, "momentum: is 0.8, but adamw has none.*betas"),
        ("lamb", {"nesterov": True}, "nesterov: is true, which belongs to optimizer sgd, not to lamb"),
        ("sgd", {"options": {"momentum": 0.5}}, "optimizer_options.momentum: .*allowed are dampening"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused_by_name(name, more, message):
    options = more.pop("options", {})
    with pytest.raises(ValueError, match=message):
        optim.check_optimizer(name, options, **more)


def test_options_are_those_that_are_no_keys_of_a_stage():
    assert options_of("sgd") == ["dampening"]
    assert {"betas", "eps"} <= set(options_of("lamb"))
    assert not {"lr", "weight_decay", "foreach", "fused"} & set(options_of("adamw"))


NETWORKS = ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_lite0", "resnet18"]


def by_parameter(groups, key, default):
    return {p: group.get(key, default) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_decays_and_layers_are_those_of_timm(name):
    """Of the whole network of timm, whose parameters come in the order of ours: backbone, then classifier."""
    theirs = timm.create_model(name, num_classes=5)
    ours = build_model(name, num_classes=5)
    groups = optim.parameter_groups(
        ours, [{"params": list(ours.parameters())}], weight_decay=0.05, decay="weights", layer_decay=0.7
    )
    excluded = getattr(theirs, "no_weight_decay", set)()
    layers = by_parameter(param_groups_layer_decay(theirs, layer_decay=0.7), "lr_scale", None)
    decays = by_parameter(param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=excluded), "weight_decay", None)
    factors, own = by_parameter(groups, "lr_factor", 1.0), by_parameter(groups, "weight_decay", None)
    last = theirs.pretrained_cfg["classifier"]
    names = {
        f"backbone.{n}" if not n.startswith(f"{last}.") else n.replace(last, "head", 1): n
        for n in dict(theirs.named_parameters())
    }
    assert len(names) == len(list(ours.parameters()))
    for n, parameter in ours.named_parameters():
        other = theirs.get_parameter(names[n])
        assert factors[parameter] == pytest.approx(layers[other]), n
        assert own[parameter] == decays[other], n
    assert groups[0].get("lr_factor", 1.0) == 1, "the first rate is that of the stage"
    assert sum(len(g["params"]) for g in groups) == len(names)


def test_rates_by_name_are_those_of_the_narrowest_pattern_that_matches():
    model = build_model("convnext_atto", num_classes=5)
    head_first = [{"params": list(model.head.parameters())}, {"params": list(model.backbone.parameters())}]
    head_first[1]["lr_factor"] = 0.5  # of the method
    factors = {"head": 1, "stages.3": 2, "*.bias": 3, "backbone": 0.1}  # of 4, 24, 55 and more parameters
    groups = optim.parameter_groups(model, head_first, weight_decay=0.1, lr_factors=factors)
    found = by_parameter(groups, "lr_factor", 1.0)
    expected = {}
    for name, parameter in model.named_parameters():
        if name.startswith(("head.", "backbone.head.")):  # the norm before the head is in the backbone
            factor = 1.0
        elif name.startswith("backbone.stages.3."):
            factor = 2.0
        else:
            factor = 3.0 if name.endswith(".bias") else 0.1
        expected[parameter] = pytest.approx(factor * (0.5 if name.startswith("backbone.") else 1))
    assert found == expected
    assert {g.get("lr_factor", 1.0) for g in groups} == {0.05, 0.5, 1.0, 1.5}
    assert all(g["weight_decay"] == 0.1 for g in groups)
    assert groups[0].get("lr_factor", 1.0) == 1, "the first rate is that of the stage"


def test_rates_by_name_and_by_layer_are_multiplied():
    model = build_model("convnext_atto", num_classes=5)
    whole = [{"params": list(model.parameters())}]
    by_layer = optim.parameter_groups(model, whole, weight_decay=0.1, layer_decay=0.7)
    both = optim.parameter_groups(model, whole, weight_decay=0.1, layer_decay=0.7, lr_factors={"stem": 10})
    before, after = by_parameter(by_layer, "lr_factor", 1.0), by_parameter(both, "lr_factor", 1.0)
    stem = set(model.backbone.stem.parameters())
    assert all(after[p] == pytest.approx((10 if p in stem else 1) * before[p]) for p in model.parameters())


def test_the_first_rate_is_that_of_the_stage_where_others_are_larger():
    model = build_model("cifar_resnet8", num_classes=3)
    groups = optim.parameter_groups(
        model, [{"params": list(model.parameters())}], weight_decay=0, lr_factors={"head": 9}
    )
    assert [group.get("lr_factor", 1.0) for group in groups] == [1, 9]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"layer9": 0.1}, "lr_factors: 'layer9' matches no parameter that is trained.*did you mean layer3"),
        ({"backbone.layer1": 0.1, "head": 2}, "lr_factors: 'backbone.layer1' matches no parameter that is trained"),
        ({"head.*": 2, "backbone": 0.1, "*": 0.3}, r"lr_factors: narrower patterns take all parameters of '\*'"),
        ({"head.weight": 2, "*d.weight": 0.1}, r"'head.weight' and '\*d.weight' both match head.weight"),
    ],
    ids=["nothing", "frozen", "of others", "equal"],
)
def test_a_pattern_that_decides_no_rate_is_refused(factors, message):
    model = build_model("cifar_resnet8", num_classes=3)
    model.backbone.layer1.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        optim.check_lr_factors(model, factors)


def test_the_release_of_difficulty_net_trains_the_last_block_and_the_head_of_its_resnet_152_faster():
    recipe = load_recipe("places_lt_as_released")
    factors = recipe.stages["end_to_end"].lr_factors
    model = build_model("resnet152", num_classes=3, head="cosine")
    optim.check_lr_factors(model, factors)
    groups = optim.parameter_groups(model, [{"params": list(model.parameters())}], weight_decay=0, lr_factors=factors)
    found = by_parameter(groups, "lr_factor", 1.0)
    for name, parameter in model.named_parameters():
        assert found[parameter] == (1 if name.startswith(("head.", "backbone.layer4.2.")) else 0.1), name


def test_groups_stay_as_they_are_by_default():
    model = build_model("cifar_resnet8", num_classes=3)
    groups = [{"params": list(model.parameters())}]
    assert optim.parameter_groups(model, groups, weight_decay=0.1) is groups


def test_a_network_without_layers_is_refused_by_name():
    model = build_model("cifar_resnet8", num_classes=3)
    with pytest.raises(ValueError, match=r"layer_decay: .*cifar_resnet8"):
        optim.check_layer_decay(model, "cifar_resnet8")


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "nadamw", "adamax", "rmsprop", "adagrad"])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_preconditioner_is_what_the_optimizers_own_step_divides_by(name, steps, decay):
    """Read off a step without momentum: with beta1 = 0 it is lr P g, once decoupled weight decay is taken off."""
    betas = {"betas": [0.0, 0.97]} if re.match("n?ada(m|max)w?$", name) else {}
    if name in ("nadam", "nadamw"):
        betas = {"betas": [1e-14, 0.97]}
    weights, optimizer = quadratic(
        name, steps, momentum=0.0 if name == "rmsprop" else 0.9, options=betas, weight_decay=decay
    )
    before = [w.detach().clone() for w in weights]
    gradients = [2 * w.detach() + 0.1 for w in weights]
    state = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state.items()}
    found = optim.preconditioner(optimizer, weights, gradients)
    assert all(torch.equal(v, optimizer.state[k][n]) for k, s in state.items() for n, v in s.items())
    take_step(optimizer, weights)
    for weight, old, gradient, p in zip(weights, before, gradients, found, strict=True):
        if name in ("adamw", "nadamw"):
            moved = old * (1 - 1e-2 * decay) - weight
        else:
            moved, gradient = old - weight, gradient + decay * old
        torch.testing.assert_close(moved, 1e-2 * p * gradient, rtol=1e-6, atol=1e-12)
