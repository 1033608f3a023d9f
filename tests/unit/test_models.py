"""Backbones, heads, weights from files, and forward-mode derivatives through every kind of network."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastlt.models import CosineHead, build_model, forward_mode_safe

BACKBONES = [
    "cifar_resnet32",
    "resnet10",
    "resnet18",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "mobilenetv3_small_100",
]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shortcut_a(x: Tensor, out_channels: int) -> Tensor:
    """Option A of He et al., written out channel by channel."""
    n, channels, height, width = x.shape
    out = x.new_zeros(n, out_channels, height // 2, width // 2)
    first = (out_channels - channels) // 2
    for c in range(channels):
        out[:, first + c] = x[:, c, 0:height:2, 0:width:2]
    return out


@pytest.mark.parametrize(
    ("name", "convolutions", "millions"),
    [
        ("cifar_resnet8", 7, 0.08),
        ("cifar_resnet20", 19, 0.27),
        ("cifar_resnet32", 31, 0.46),
        ("cifar_resnet44", 43, 0.66),
        ("cifar_resnet56", 55, 0.85),
        ("resnet10", 12, 4.91),
    ],
)
def test_published_size(name, convolutions, millions):
    """Parameter counts of He et al. (Table 6) for CIFAR; resnet10 has 9 convolutions and 3 projections."""
    model = timm.create_model(name, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert round(count(model) / 1e6, 2) == millions


def test_option_a_shortcut_is_subsampling_and_zero_channels():
    shortcut = timm.create_model("cifar_resnet8").layer2[0].shortcut
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(shortcut(x), shortcut_a(x, 32), rtol=0, atol=0)
    assert count(shortcut) == 0


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet10"])
def test_registered_models_keep_timms_interface(name):
    model = timm.create_model(name, num_classes=7, drop_rate=0.5, drop_path_rate=0.1, in_chans=1)
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    assert isinstance(model.get_classifier(), nn.Linear)
    maps = model.forward_features(x)
    assert maps.shape[:2] == (2, model.num_features)
    model.eval()
    assert model.forward_head(maps, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert name in timm.list_models()


def test_drop_rate_of_the_registered_model_drops_only_in_training():
    model = timm.create_model("cifar_resnet8", num_classes=0, drop_rate=0.5)
    maps = torch.ones(2, 64, 8, 8)
    assert (model.forward_head(maps) == 0).any()
    torch.testing.assert_close(model.eval().forward_head(maps), torch.ones(2, 64))


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_gives_features_and_logits(name):
    model = build_model(name, num_classes=7, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.features(x)
    assert features.shape == (2, model.head.in_features)
    torch.testing.assert_close(model(x), F.linear(features, model.head.weight, model.head.bias))


def test_image_size_reaches_networks_built_for_one_size():
    vit = build_model("vit_tiny_patch16_224", num_classes=2, image_size=64)
    assert vit(torch.randn(1, 3, 64, 64)).shape == (1, 2)
    with pytest.raises(AssertionError):
        vit(torch.randn(1, 3, 224, 224))


def test_dropout_is_before_the_head_and_not_in_the_features():
    model = build_model("cifar_resnet8", num_classes=4, drop_rate=0.5).train()
    assert model.dropout.p == 0.5
    model.backbone.eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.features(x), model.features(x), rtol=0, atol=0)
    assert not torch.equal(model(x), model(x))


def test_drop_path_rate_reaches_the_backbone():
    model = build_model("cifar_resnet20", num_classes=4, drop_path_rate=0.2)
    rates = [m.drop_prob for m in model.modules() if hasattr(m, "drop_prob")]
    assert rates == pytest.approx([0.2 * i / 8 for i in range(1, 9)])


def test_drop_path_rate_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="no stochastic depth"):
        build_model("dla46_c", num_classes=2, drop_path_rate=0.1)
    assert build_model("dla46_c", num_classes=2).head.in_features == 256


def test_drop_path_rate_zero_is_zero_where_timms_default_is_not():
    swin = build_model("swin_tiny_patch4_window7_224", num_classes=2)
    assert not [m for m in swin.modules() if getattr(m, "drop_prob", 0)]


def test_cosine_head_is_scaled_cosines():
    head = CosineHead(5, 3, scale=16.0).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = [[16.0 * (torch.dot(a, w) / (a.norm() * w.norm())).item() for w in head.weight] for a in x]
    torch.testing.assert_close(head(x), torch.tensor(expected, dtype=torch.float64))
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    torch.testing.assert_close(head(3 * x), head(x))


def test_cosine_head_survives_a_dead_feature_vector():
    head = CosineHead(5, 3)
    x = torch.zeros(1, 5, requires_grad=True)
    head(x).sum().backward()
    _, tangent = torch.func.jvp(head, (x.detach(),), (torch.ones(1, 5),))
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(head.weight.grad).all()
    assert torch.isfinite(tangent).all()


def test_head_options():
    assert build_model("cifar_resnet8", num_classes=3, head="cosine").head.scale == 30
    assert build_model("cifar_resnet8", num_classes=3, head="cosine", head_scale=16).head.scale == 16
    with pytest.raises(ValueError, match="head_scale belongs to head: cosine"):
        build_model("cifar_resnet8", num_classes=3, head_scale=16)
    with pytest.raises(ValueError, match="must be positive"):
        build_model("cifar_resnet8", num_classes=3, head="cosine", head_scale=0)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        build_model("cifar_resnet8", num_classes=3, head="cosin")


@pytest.mark.parametrize(("word", "meant"), [("cifar_resnet33", "cifar_resnet32"), ("resnet5O", "resnet50")])
def test_unknown_name_says_what_was_meant(word, meant):
    with pytest.raises(ValueError, match=rf"unknown model '{word}'.*\b{meant}\b"):
        build_model(word, num_classes=3)


def test_pretrained_needs_weights_to_exist():
    with pytest.raises(ValueError, match="no pretrained weights"):
        build_model("cifar_resnet32", num_classes=3, pretrained=True)
    with pytest.raises(ValueError, match="not both"):
        build_model("resnet18", num_classes=3, pretrained=True, checkpoint="x.pth")


class TestCheckpoint:
    """Weights from a local file."""

    @pytest.mark.parametrize("kind", ["pth", "safetensors"])
    def test_ours_comes_back(self, tmp_path, kind):
        saved = build_model("cifar_resnet8", num_classes=3)
        path = tmp_path / f"w.{kind}"
        save_file(saved.state_dict(), path) if kind == "safetensors" else torch.save(saved.state_dict(), path)
        loaded = build_model("cifar_resnet8", num_classes=3, checkpoint=path)
        assert_same(loaded.state_dict(), saved.state_dict())

    def test_wrappers_are_stripped_and_a_plain_backbones_classifier_becomes_the_head(self, tmp_path):
        saved = timm.create_model("cifar_resnet8", num_classes=3)
        state = {f"module._orig_mod.{k}": v for k, v in saved.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "w.pth")
        loaded = build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "w.pth").eval()
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(loaded(x), saved.eval()(x))

    @pytest.mark.parametrize("head", ["linear", "cosine"])
    def test_a_head_that_does_not_fit_is_left_out_and_said(self, tmp_path, caplog, head):
        saved = timm.create_model("cifar_resnet8", num_classes=5 if head == "linear" else 3)
        torch.save(saved.state_dict(), tmp_path / "w.pth")
        with caplog.at_level(logging.WARNING, "fastlt"):
            loaded = build_model("cifar_resnet8", num_classes=3, head=head, checkpoint=tmp_path / "w.pth")
        assert "head does not fit and is left out" in caplog.text
        torch.testing.assert_close(loaded.backbone.conv1.weight, saved.conv1.weight, rtol=0, atol=0)

    def test_old_files_without_batch_counters_load(self, tmp_path):
        state = build_model("cifar_resnet8", num_classes=3).state_dict()
        torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.pth")
        loaded = build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "w.pth")
        torch.testing.assert_close(loaded.head.weight, state["head.weight"], rtol=0, atol=0)

    def test_what_does_not_match_is_listed(self, tmp_path):
        state = build_model("cifar_resnet8", num_classes=3).state_dict()
        del state["backbone.conv1.weight"]
        state["backbone.extra"] = torch.zeros(1)
        state["backbone.bn1.bias"] = torch.zeros(7)
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="not of this model") as error:
            build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "w.pth")
        for part in (
            "1 missing: backbone.conv1.weight",
            "1 unexpected: backbone.extra",
            "backbone.bn1.bias (7,) for (16,)",
        ):
            assert part in str(error.value)

    def test_files_that_are_no_weights(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "nothing.pth")
        torch.save({"epoch": 3}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="holds no weights"):
            build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "w.pth")
        (tmp_path / "t.pth").write_text("no checkpoint")
        with pytest.raises(ValueError, match="is no file of weights"):
            build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "t.pth")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def generic_point(model: nn.Module) -> nn.Module:
    """BatchNorm away from its start: timm starts the last one of a residual branch at 0, where ReLU has its kink."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=generator)
    return model


class ForwardMode:
    """The per-sample losses of a network in training mode on one batch, with a random unit direction."""

    def __init__(self, name: str, dtype: torch.dtype, memory_format: torch.memory_format, head: str = "linear") -> None:
        torch.manual_seed(0)
        model = forward_mode_safe(generic_point(build_model(name, num_classes=5, head=head, image_size=32)))
        self.model = model.to(dtype).to(memory_format=memory_format).train()
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        self.images = images.to(dtype).to(memory_format=memory_format)
        self.labels = torch.tensor([0, 1, 4, 2])
        self.parameters = {k: p.detach() for k, p in self.model.named_parameters()}
        direction = {k: torch.randn(p.shape, dtype=torch.float64) for k, p in self.parameters.items()}
        norm = torch.sqrt(sum(t.square().sum() for t in direction.values()))
        self.direction = {k: (t / norm).to(dtype) for k, t in direction.items()}

    def losses(self, parameters: dict[str, Tensor]) -> Tensor:
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        logits = torch.func.functional_call(self.model, {**buffers, **parameters}, (self.images,))
        return F.cross_entropy(logits.to(self.images.dtype), self.labels, reduction="none")

    def by_jvp(self) -> Tensor:
        return torch.func.jvp(self.losses, (self.parameters,), (self.direction,))[1]

    def by_dual_numbers(self) -> Tensor:
        forward_ad = torch.autograd.forward_ad
        with torch.no_grad(), forward_ad.dual_level():
            dual = {k: forward_ad.make_dual(p, self.direction[k]) for k, p in self.parameters.items()}
            return forward_ad.unpack_dual(self.losses(dual)).tangent

    @torch.no_grad()
    def by_difference(self, step: float = 1e-7) -> Tensor:
        """Central difference; so short a step that hardly any ReLU changes sides within it."""
        ahead, behind = ({k: p + s * self.direction[k] for k, p in self.parameters.items()} for s in (step, -step))
        return (self.losses(ahead) - self.losses(behind)) / (2 * step)

    def by_backward(self) -> Tensor:
        """The sum over samples, from the gradient."""
        parameters = {k: p.clone().requires_grad_() for k, p in self.parameters.items()}
        gradients = torch.autograd.grad(self.losses(parameters).sum(), list(parameters.values()))
        return sum((g * self.direction[k]).sum() for g, k in zip(gradients, parameters, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_forward_mode_equals_difference_and_gradient(name):
    case = ForwardMode(name, torch.float64, torch.contiguous_format)
    derivative = case.by_jvp()
    scale = derivative.abs().max().item()
    torch.testing.assert_close(derivative, case.by_difference(), rtol=0, atol=5e-6 * scale)
    torch.testing.assert_close(case.by_dual_numbers(), derivative, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(derivative.sum(), case.by_backward(), rtol=0, atol=1e-9 * scale)
    channels_last = ForwardMode(name, torch.float64, torch.channels_last)
    torch.testing.assert_close(channels_last.by_jvp(), derivative, rtol=0, atol=1e-9 * scale)
    # In float32 the same ReLUs are not open as in float64, so it is held against its own gradient.
    single = ForwardMode(name, torch.float32, torch.channels_last)
    torch.testing.assert_close(single.by_jvp().sum(), single.by_backward(), rtol=0, atol=1e-3 * scale)


def test_forward_mode_through_the_cosine_head():
    case = ForwardMode("cifar_resnet8", torch.float64, torch.contiguous_format, head="cosine")
    derivative = case.by_jvp()
    torch.testing.assert_close(derivative, case.by_difference(), rtol=0, atol=5e-6 * derivative.abs().max().item())


def test_forward_mode_safe_changes_the_path_and_not_the_result():
    torch.manual_seed(0)
    model = build_model("vit_tiny_patch16_224", num_classes=3, image_size=32).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = model(x)
    assert any(getattr(m, "fused_attn", False) for m in model.modules())
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(model, (x,), (x,))
    assert forward_mode_safe(model) is model
    torch.testing.assert_close(model(x), fused)
    torch.func.jvp(model, (x,), (x,))


@pytest.mark.parametrize("experts", [None, 2])
def test_the_largest_logit_is_told_apart_under_autocast(experts):
    """Of 1,000 logits in bfloat16 several share the largest value, and the first class would always win."""
    model = build_model("cifar_resnet8", num_classes=1000, head="cosine", experts=experts).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        trained = model.train()(torch.rand(64, 3, 32, 32))
    assert logits.dtype == torch.float32
    top = logits.topk(2).values
    assert (top[:, 0] > top[:, 1]).all()
    assert trained.dtype == (torch.bfloat16 if experts is None else torch.float32)
