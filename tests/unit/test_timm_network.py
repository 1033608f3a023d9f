"""A classifier as timm's network: heads folded into one layer, and what cannot be folded refused."""

from __future__ import annotations

import pytest
import torch

from fastlt.models import CosineHead, LinearHead, build_model
from fastlt.models.meta_embedding import MetaEmbeddingHead
from fastlt.models.restricted_head import RestrictedHead
from fastlt.models.retrained_heads import ScaledHead
from fastlt.models.timm_network import folded_head, from_timm_network, timm_network

# A linear classifier under "fc" and under "head.fc", one behind a layer of its own, a convolution, a pair for
# distillation, and networks for one size of images.
NAMES = {
    "test_resnet": 32,
    "test_efficientnet": 32,
    "test_convnext": 32,
    "test_vit": 32,
    "mobilenetv3_small_050": 32,
    "dpn48b": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "cifar_resnet8": 32,
}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_classifier_and_back_again(name):
    torch.manual_seed(0)
    model = build_model(name, num_classes=7, image_size=NAMES[name])
    model.head = ScaledHead(model.head)
    torch.nn.init.uniform_(model.head.scale, 0.5, 2)
    images = torch.randn(3, 3, NAMES[name], NAMES[name])
    before = torch.get_rng_state()
    network = timm_network(model.eval(), name, NAMES[name])
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        expected = model(images)
        again = from_timm_network(network.state_dict(), name, NAMES[name], 7).eval()
        assert isinstance(again.head, LinearHead)
        for other in (network, again):
            torch.testing.assert_close(other(images), expected, rtol=1e-5, atol=1e-5)


def test_scales_are_folded_exactly():
    head = ScaledHead(LinearHead(4, 3)).double()
    torch.nn.init.uniform_(head.scale, -2, 2)
    weight, bias = folded_head(head)
    x = torch.randn(5, 4, dtype=torch.float64)
    for i in range(5):
        for c in range(3):
            z = head.scale[c] * (sum(head.inner.weight[c, d] * x[i, d] for d in range(4)) + head.inner.bias[c])
            assert torch.isclose(weight[c] @ x[i] + bias[c], z, rtol=1e-12)


def test_classes_that_an_expert_does_not_know_stay_impossible():
    head = RestrictedHead(LinearHead(4, 3))
    head.known.copy_(torch.tensor([True, False, True]))
    weight, bias = folded_head(head)
    x = 1e3 * torch.randn(5, 4)
    torch.testing.assert_close(x @ weight.T + bias, head(x))
    assert torch.isneginf(x @ weight.T + bias)[:, 1].all()


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (CosineHead(4, 3), "takes cosines"),
        (ScaledHead(CosineHead(4, 3)), "takes cosines"),
        (MetaEmbeddingHead(LinearHead(4, 3), 0), "MetaEmbeddingHead, which is no linear layer"),
    ],
    ids=["cosine", "scaled cosine", "oltr"],
)
def test_what_is_no_linear_layer_says_so(head, why):
    with pytest.raises(ValueError, match=why):
        folded_head(head)


def test_no_linear_head_gives_the_probabilities_of_a_cosine_head():
    """Rows of unit length rank the classes of an image as cosines do, but one factor for all images there is not."""
    head, x = CosineHead(4, 3, scale=1.0), torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2, 3, 4]])
    linear = x @ (torch.nn.functional.normalize(head.weight, dim=1)).T
    assert torch.equal(linear.argsort(1), head(x).argsort(1))
    torch.testing.assert_close(head(x)[0], head(x)[1])
    assert not torch.allclose(linear[0].softmax(0), linear[1].softmax(0))


@pytest.mark.parametrize("adapt", ["lora", "dora", "ia3"])
def test_adapters_are_merged_into_the_weights(adapt):
    pytest.importorskip("peft")
    model = build_model("test_vit", num_classes=5, image_size=32, adapt=adapt).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "ia3" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(timm_network(model, "test_vit", 32)(images), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(images), expected)  # the model keeps its adapters


def test_a_bottleneck_beside_the_mlp_is_not_in_timm():
    model = build_model("test_vit", num_classes=5, image_size=32, adapt="adaptformer").eval()
    with pytest.raises(ValueError, match="AdaptFormer"):
        timm_network(model, "test_vit", 32)


def test_networks_that_timm_has_not_say_why():
    with pytest.raises(ValueError, match="mean over experts"):
        timm_network(build_model("cifar_resnet8", num_classes=3, experts=2).eval(), "cifar_resnet8", 32)
    model = build_model("test_resnet", num_classes=3)
    model.backbone.add_module("attention", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="its backbone has attention, which timm's test_resnet has not"):
        timm_network(model.eval(), "test_resnet", 32)
