"""`build_model`: any timm backbone with one of our heads, optionally from pretrained weights."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, cast

import timm
import torch
from torch import Tensor, nn
from typing_extensions import Self, TypeVar

from fastlt.losses.base import at_least_float32
from fastlt.models.adapters import merge_adapters, read_adapter
from fastlt.models.checkpoints import load_weights
from fastlt.models.experts import ExpertBackbone, ExpertHead, ExpertRouter, expert_family, width_of
from fastlt.models.frozen_part import FrozenPart, content_hash
from fastlt.models.heads import HEADS, Head
from fastlt.models.pretrained import check_reachable, config_of, is_published
from fastlt.models.trained_part import frozen_norms, trained_parameters
from fastlt.models.weight_files import read_weights
from fastlt.names import pick, shortened

OURS = ("cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "resnet10")


# A classifier of experts is a classifier: covariant.
BackboneT = TypeVar("BackboneT", bound=nn.Module, default=nn.Module, covariant=True)
HeadT = TypeVar("HeadT", bound=Head, default=Head, covariant=True)


class Classifier(nn.Module, Generic[BackboneT, HeadT]):
    """A backbone that ends in pooled features, dropout, and a head.

    `forward` takes images (N, 3, H, W) to logits (N, C), `features` to pooled features (N, D) before the dropout.
    `head_is_trained` says whether the head's weights came from a file. `auxiliary` is what a method trains beside the
    two and evaluation does without (a projection, say); it is there only where a method has put it.

    frozen: names of the backbone's parameters that no method trains. frozen_norms: names of its BatchNorm layers that
    stay in eval mode when the model is put into train mode. Both begin with "backbone."; see
    `fastlt.models.trained_part`. frozen_part: frozen weights of a pretrained backbone, which checkpoints go without.
    takes_features: see `drop_backbone`.
    """

    backbone: BackboneT
    head: HeadT
    auxiliary: nn.Module
    head_is_trained = False
    frozen: frozenset[str] = frozenset()
    frozen_norms: frozenset[str] = frozenset()
    frozen_part: FrozenPart | None = None
    takes_features = False

    def __init__(self, backbone: BackboneT, head: HeadT, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        # A module and not the backbone's own: timm's is often a bare function call, which nothing can see from outside.
        self.dropout = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, D) of images (N, 3, H, W)."""
        return images.flatten(1) if self.takes_features else self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits_of(self.head, self.features(images))

    def logits_of(self, head: nn.Module, features: Tensor) -> Tensor:
        """A head's logits for features before the dropout; in eval mode autocast leaves them in float32.

        In a half type several classes often share the largest logit, and the first of them, where classes are sorted
        the one with the most images, would be the prediction.
        """
        device = features.device.type
        if self.training or device == "meta" or not torch.is_autocast_enabled(device):
            return head(self.dropout(features))
        with torch.autocast(device, enabled=False):
            return head(self.dropout(at_least_float32(features)))

    def drop_backbone(self) -> None:
        """From now on "images" are the features of the frozen backbone, float (N, D, 1, 1), and the model goes without.

        What it trains, and what a checkpoint keeps, is as before.
        """
        self.takes_features = True
        self.backbone = cast("BackboneT", nn.Identity())
        self.frozen = self.frozen_norms = frozenset()

    def unfreeze(self) -> None:
        """Let every parameter require a gradient but those that are `frozen`."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in self.frozen)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen_norms:
            self.get_submodule(name).training = False
        return self

    def merged(self) -> Self:
        """A copy with the adapters merged into the weights where that can be, see `merge_adapters`; none is frozen."""
        copied = copy.deepcopy(self)
        merge_adapters(copied)
        copied.frozen, copied.frozen_norms, copied.frozen_part = frozenset(), frozenset(), None
        return copied

    def moving_buffers(self) -> dict[str, Tensor]:
        """All buffers but the statistics of `frozen_norms`, by name."""
        return {
            name: buffer for name, buffer in self.named_buffers() if name.rpartition(".")[0] not in self.frozen_norms
        }

    def counters(self) -> dict[str, Tensor]:
        """What the model counts of its own while it is evaluated: by name, an int64 (2,) of a sum and of images."""
        return {}


class ExpertClassifier(Classifier[ExpertBackbone, ExpertHead]):
    """Experts on a shared stem, RIDE's network: logits are the mean of the experts' logits.

    features: (E, N, D), head: to (E, N, C). Once it has a `router`, an image in eval mode is shown to one expert after
    another until the router asks for no further one, and its logits are the mean over those that were asked.
    """

    router: ExpertRouter | None

    def __init__(self, backbone: ExpertBackbone, head: ExpertHead, drop_rate: float = 0.0) -> None:
        super().__init__(backbone, head, drop_rate)
        self.register_module("router", None)

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (E, N, C) of every expert for images (N, 3, H, W)."""
        return self.logits_of(self.head, self.features(images))

    def forward(self, images: Tensor) -> Tensor:
        if self.router is not None and not self.training:
            return self._routed(images, self.router)
        # Half types have too few digits for a mean that is to be compared with its terms.
        return at_least_float32(self.expert_logits(images)).mean(0)

    def _routed(self, images: Tensor, router: ExpertRouter) -> Tensor:
        """Logits (N, C); no expert computes images that are not shown to it. Waits for the device between experts."""
        maps = self.backbone.shared(images)
        waiting = torch.arange(len(images), device=images.device)
        asked = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device)
        total = torch.empty(0)
        for i, (expert, head) in enumerate(zip(self.backbone.experts, self.head.heads, strict=True)):
            features = expert(maps)
            logits = at_least_float32(self.logits_of(head, features))
            total = torch.zeros_like(logits) if i == 0 else total
            total[waiting] += logits
            asked[waiting] += 1
            if i == len(self.head.heads) - 1:
                break
            further = router(i, features, total[waiting] / (i + 1)) > 0
            maps, waiting = maps[further], waiting[further]
            if len(waiting) == 0:
                break
        router.asked += torch.stack([asked.sum(), torch.ones_like(asked).sum()])
        return total / asked

    def counters(self) -> dict[str, Tensor]:
        return {} if self.router is None else {"experts_asked": self.router.asked}

    def add_router(self, top: int, seed: int) -> None:
        """Give the model a new router with weights drawn from `seed`; the default generator stays where it is."""
        like = next(self.head.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = ExpertRouter(len(self.head.heads), self.head.in_features, self.head.out_features, top)
        self.router = router.to(device=like.device, dtype=like.dtype)

    def teacher(self, path: str | Path) -> ExpertClassifier:
        """The model of the same backbone, width and head in a file of weights, with as many experts as the file has.

        In eval mode and frozen. Raises ValueError when the file holds no experts or does not match.
        """
        numbers = [n.split(".")[2] for n in read_weights(path) if n.startswith("backbone.experts.")]
        if not numbers:
            raise ValueError(f"{path} holds no model with experts; give a checkpoint of a run with model.experts set")
        count = 1 + max(map(int, numbers))
        other = copy.deepcopy(self)
        other.router = None
        other.backbone.experts = nn.ModuleList(copy.deepcopy(self.backbone.experts[0]) for _ in range(count))
        other.head.heads = nn.ModuleList(copy.deepcopy(self.head.heads[0]) for _ in range(count))
        other.head_is_trained = load_weights(other, path)
        if not other.head_is_trained:
            raise ValueError(f"{path}: its heads do not fit this model's number of classes and kind of head")
        return other.eval().requires_grad_(False)


KindT = TypeVar("KindT", bound=nn.Module)


def head_of(model: Classifier, kind: type[KindT]) -> KindT:
    """The head of `model`, which a method or an earlier stage has made one of `kind`."""
    assert isinstance(model.head, kind), type(model.head)
    return model.head


def build_model(
    name: str,
    *,
    num_classes: int,
    head: str = "linear",
    head_scale: float | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    image_size: int | None = None,
    experts: int | None = None,
    expert_width: float = 0.75,
    train: str | Sequence[str] = "all",
    norm: str | None = None,
    adapt: str | Mapping[str, Any] | None = None,
) -> Classifier:
    """A classifier of `num_classes` classes on the timm backbone `name` (ours are registered with timm too).

    It takes normalised images, float (N, 3, H, W), to logits (N, C).
    head: "linear", or "cosine" with the scale `head_scale` (30 unless given).
    pretrained: the weights timm knows for this name, over the network; the head is new.
    checkpoint: a local file instead, see `load_weights`.
    drop_rate: dropout before the head. drop_path_rate: stochastic depth, for backbones that have it.
    image_size: for backbones that are built for one input size (ViT, Swin, ...); others take any size and ignore it.
    experts: an `ExpertClassifier` of so many, each of `expert_width` times the backbone's width, for ResNets.
    train, norm: what of the backbone is trained, see `fastlt.models.trained_part`.
    adapt: adapters in a frozen backbone, which are trained beside what `train` names; see `fastlt.models.adapters`.
    Raises ValueError for an unknown name, a name without pretrained weights or with such as cannot be fetched, or an
    option the backbone does not take.
    """
    check_model(name, pretrained, experts)
    if pretrained and checkpoint is not None:
        raise ValueError("give either pretrained=True or a checkpoint, not both: the second would overwrite the first")
    options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
    if image_size is not None and fixed_input_size(name):
        options["img_size"] = image_size
    head_type = pick("head", head, HEADS)
    if head_scale is not None and head != "cosine":
        raise ValueError(f"head_scale belongs to head: cosine; the {head} head has no scale")
    head_options = {} if head_scale is None else {"scale": head_scale}
    if pretrained:
        options |= check_reachable(name)
    create = partial(_create_backbone, name, drop_path_rate, options)
    if experts is None:
        backbone = create()
        classifier: Classifier = Classifier(
            backbone, head_type(width_of(backbone), num_classes, **head_options), drop_rate
        )
    else:
        backbone = ExpertBackbone(create, expert_family(name), experts, expert_width)
        create_head = partial(head_type, backbone.num_features, num_classes, **head_options)
        classifier = ExpertClassifier(backbone, ExpertHead(create_head, experts), drop_rate)
    if checkpoint is not None:
        classifier.head_is_trained = load_weights(classifier, checkpoint)
    source = f"{name}'s pretrained weights" if pretrained else None if checkpoint is None else str(checkpoint)
    _freeze(classifier, train, norm, adapt, name, source)
    return classifier


def _freeze(
    model: Classifier,
    train: str | Sequence[str],
    norm: str | None,
    adapt: str | Mapping[str, Any] | None,
    name: str,
    source: str | None,
) -> None:
    """Put adapters in, freeze what of the backbone is not trained, and note it in `model`; see `build_model`.

    source: of the backbone's weights, if they are pretrained.
    """
    backbone = model.backbone
    adapter = None if adapt is None else read_adapter(adapt)
    # Adapters give parameters other names: what is trained is asked for by the names that they have in timm.
    before = {id(parameter): own for own, parameter in backbone.named_parameters()}
    asked = trained_parameters(backbone, "head" if adapter is not None and train == "all" else train)
    if adapter is not None:
        asked |= adapter.trains(backbone)
        adapter.insert(backbone, model.head.out_features)
    after = dict(backbone.named_parameters())
    trained = {own for own, parameter in after.items() if before.get(id(parameter)) in {None, *asked}}
    model.frozen = frozenset(f"backbone.{own}" for own in after if own not in trained)
    model.frozen_norms = frozenset(f"backbone.{own}" for own in frozen_norms(backbone, norm, trained))
    model.unfreeze()
    if source is not None and model.frozen:
        kept = {before[id(parameter)]: parameter for own, parameter in after.items() if own not in trained}
        model.frozen_part = FrozenPart(name, source, content_hash(kept))


def forward_mode_safe(model: nn.Module) -> nn.Module:
    """Make every attention layer of `model` take the path that has forward-mode derivatives; returns `model`.

    Fused scaled-dot-product kernels have a backward but no forward-mode formula; timm's attention layers carry a switch
    to the plain matrix products. Changes `model` in place; numerics stay the same up to rounding.
    """
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False  # pyright: ignore[reportArgumentType]  # torch's stub: tensors and modules alone
    return model


def _create_backbone(name: str, drop_path_rate: float, options: dict[str, Any], **more: Any) -> nn.Module:
    options = {**options, **more}
    # The rate is given even when it is 0: some networks of timm (Swin) have another default.
    try:
        return timm.create_model(name, drop_path_rate=drop_path_rate, **options)
    except (AssertionError, RuntimeError, ValueError) as error:
        of_size = f" for images of {options['img_size']}" if "img_size" in options else ""
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{name} cannot be built{of_size}: {reason}; set data.image_size or model.name") from error
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        if drop_path_rate:
            raise ValueError(f"{name} has no stochastic depth: leave drop_path_rate at 0") from error
    return timm.create_model(name, **options)


def fixed_input_size(name: str) -> bool:
    """Whether the timm network `name` is built for images of one size."""
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def check_model(name: str, pretrained: bool = False, experts: int | None = None) -> None:
    """Refuse a name that no backbone has, pretrained weights that timm does not know, and experts of what cannot be
    split, by a ValueError.
    """
    if is_published(name):
        raise ValueError(f"{name} says where a network is, and not which; only a recipe's model.name may")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(
            f"unknown model {shortened(name)}{hint} Ours are {', '.join(OURS)}; all of timm.list_models() can be used"
        )
    config_of(name)
    cfg = timm.get_pretrained_cfg(name)
    if pretrained and not (cfg and cfg.has_weights):
        raise ValueError(
            f"{name} has no pretrained weights: set pretrained: false, give a local file as checkpoint, or choose a "
            "name of timm.list_pretrained()"
        )
    if experts is not None:
        expert_family(name)
        if pretrained:
            raise ValueError(
                "experts are narrower than the backbone, so its pretrained weights do not fit: set pretrained: false"
            )
