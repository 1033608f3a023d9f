"""Adapters: a few trained parameters in a backbone that is frozen otherwise; all kinds in the table `ADAPTERS`.

LoRA and its relatives are those of Hugging Face's `peft`, put into the timm network in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from fastlt.models.adaptformer import ParallelMlp, adaptable_blocks, bottleneck_for, insert_bottleneck
from fastlt.names import pick, shortened, unknown
from fastlt.ranges import above, at_least, check_ranges, within

# The projections of attention as timm names them; a network has one of these sets.
ATTENTION = ("qkv", "q_proj", "k_proj", "v_proj", "q", "k", "v", "kv")
FEED_FORWARD = ("fc2",)
WITHOUT_PEFT = "model.adapt: {} needs the package peft, which is not installed: pip install 'fastlt[adapt]'"


@dataclass(frozen=True)
class Adapter:
    """A kind of adapter with its options; ValueError for an option that is out of its range."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def insert(self, backbone: nn.Module, num_classes: int) -> None:
        """Put the adapters into `backbone`, in place. ValueError for targets that it does not have."""
        raise NotImplementedError

    def trains(self, backbone: nn.Module) -> set[str]:
        """The names of parameters that were in the backbone before and are trained too."""
        return set()


@dataclass(frozen=True)
class PeftAdapter(Adapter):
    """Adapters of `peft` on linear and convolutional layers.

    targets: names of modules, such as [qkv, fc1] or ["blocks.1?.attn.qkv"]; a name may be the end of a longer one, and
        * stands for any characters. null is the projections of attention.
    """

    targets: list[str] | None = None

    def config(self, targets: list[str]) -> Any:
        """The configuration by which `peft` puts adapters into modules of these names."""
        raise NotImplementedError

    def insert(self, backbone: nn.Module, num_classes: int) -> None:
        try:
            from peft import inject_adapter_in_model  # imported late: it takes seconds, and only adapters need it
        except ImportError:
            raise ValueError(WITHOUT_PEFT.format(name_of(self))) from None
        inject_adapter_in_model(self.config(self.targets_in(backbone)), backbone)

    def targets_in(self, backbone: nn.Module) -> list[str]:
        """The full names of the modules that get an adapter; ValueError for a target without one."""
        return find_layers(f"model.adapt.{name_of(self)}.targets", backbone, self.targets, ATTENTION)


@dataclass(frozen=True)
class Lora(PeftAdapter):
    """LoRA (Hu et al. 2022): W x + alpha / rank * B A x.

    rank: of the product.
    alpha: over rank, the factor of the product; null is rank, a factor of 1.
    dropout: of x in the product.
    rslora: divide alpha by the root of rank instead.
    """

    rank: int = field(default=8, metadata=at_least(1))
    alpha: float | None = field(default=None, metadata=above(0))
    dropout: float = field(default=0.0, metadata=within(0, 1, below=True))
    rslora: bool = False

    def config(self, targets: list[str]) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # pyright: ignore[reportArgumentType]  # any number
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=isinstance(self, Dora),
            target_modules=targets,
        )


@dataclass(frozen=True)
class Dora(Lora):
    """DoRA (Liu et al. 2024): the length of each row of LoRA's weight is a parameter of its own; options as of lora."""


@dataclass(frozen=True)
class Lokr(PeftAdapter):
    """LoKr (Yeh et al. 2024): the change of a weight is a Kronecker product.

    rank: of the larger factor.
    alpha: over rank, the factor of the product; null is rank, a factor of 1.
    """

    rank: int = field(default=8, metadata=at_least(1))
    alpha: float | None = field(default=None, metadata=above(0))

    def config(self, targets: list[str]) -> Any:
        from peft import LoKrConfig

        alpha = self.rank if self.alpha is None else self.alpha
        return LoKrConfig(r=self.rank, alpha=alpha, target_modules=targets)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Ia3(PeftAdapter):
    """IA3 (Liu et al. 2022): a learned factor for every output of a layer, or for every input of one in `inputs`.

    inputs: names among the targets whose inputs are scaled; null is fc2, which is a target by default.
    """

    inputs: list[str] | None = None

    def config(self, targets: list[str]) -> Any:
        from peft import IA3Config

        inputs = FEED_FORWARD if self.inputs is None else self.inputs
        scaled = [name for name in targets if any(is_named(name, one) for one in inputs)]
        return IA3Config(target_modules=targets, feedforward_modules=scaled)

    def targets_in(self, backbone: nn.Module) -> list[str]:
        targets = find_layers("model.adapt.ia3.targets", backbone, self.targets, (*ATTENTION, *FEED_FORWARD))
        stray = [one for one in self.inputs or () if not any(is_named(name, one) for name in targets)]
        if stray:
            raise ValueError(f"model.adapt.ia3.inputs: {stray[0]!r} is none of the targets; name modules of these")
        return targets


@dataclass(frozen=True)
class AdaptFormer(Adapter):
    """AdaptFormer (Chen et al. 2022) as LIFT has it: a bottleneck beside the MLP of every transformer block.

    bottleneck: its width; null is LIFT's 2^floor(log2(C / (2 * blocks))) for C classes, and at least
        one.
    dropout: in the bottleneck.
    """

    bottleneck: int | None = field(default=None, metadata=at_least(1))
    dropout: float = field(default=0.0, metadata=within(0, 1, below=True))

    def insert(self, backbone: nn.Module, num_classes: int) -> None:
        blocks = adaptable_blocks(backbone)
        if not blocks:
            kinds = sorted({type(m).__name__ for m in backbone.modules() if "Block" in type(m).__name__})
            raise ValueError(
                "model.adapt: adaptformer goes beside the MLP of transformer blocks that normalise first, and "
                f"{type(backbone).__name__} has none (it has {', '.join(kinds) or 'no blocks'}); take lora with "
                "targets, or bitfit"
            )
        width = bottleneck_for(num_classes, len(blocks)) if self.bottleneck is None else self.bottleneck
        for block in blocks.values():
            insert_bottleneck(block, width, self.dropout)


@dataclass(frozen=True)
class BitFit(Adapter):
    """BitFit (Ben Zaken et al. 2022): the biases of the network are trained; nothing is put in."""

    def insert(self, backbone: nn.Module, num_classes: int) -> None:
        if not self.trains(backbone):
            raise ValueError(
                f"model.adapt: bitfit trains biases, and {type(backbone).__name__} has none; take lora with targets"
            )

    def trains(self, backbone: nn.Module) -> set[str]:
        return {name for name, _ in backbone.named_parameters() if name.rpartition(".")[2].endswith("bias")}


ADAPTERS: dict[str, type[Adapter]] = {
    "lora": Lora,
    "dora": Dora,
    "lokr": Lokr,
    "ia3": Ia3,
    "adaptformer": AdaptFormer,
    "bitfit": BitFit,
}


def name_of(adapter: Adapter) -> str:
    """The name of an adapter in `ADAPTERS`."""
    return next(name for name, kind in ADAPTERS.items() if kind is type(adapter))


def read_adapter(spec: str | Mapping[str, Any]) -> Adapter:
    """The adapter that a recipe names: a name, or a mapping of a name to its options.

    ValueError for an unknown name or option, or a value that an option does not take.
    """
    name, options = spec, {}
    if isinstance(spec, Mapping):
        if len(spec) != 1 or not isinstance(next(iter(spec.values())), (Mapping, type(None))):
            raise ValueError(
                f"is {shortened(spec)}; allowed: a name, or a name with its options, such as {{lora: {{rank: 4}}}}"
            )
        ((name, options),) = spec.items()
    kind = pick("adapter", str(name), ADAPTERS)
    known = {one.name: one for one in fields(kind)}
    for key in options or {}:
        if key not in known:
            raise ValueError(unknown(f"option of {name}", key, known) if known else f"{name} has no options")
    hints = get_type_hints(kind)
    for key, value in (options or {}).items():
        _check_type(f"{name}.{key}", value, hints[key])
    return kind(**(options or {}))


def _check_type(key: str, value: Any, kind: Any) -> None:
    """ValueError for a value of another type than the option has: numbers, booleans, lists of names, and null."""
    allowed = get_args(kind) or (kind,)
    words = {int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
    fits = any(
        (one is float and isinstance(value, (int, float)) and not isinstance(value, bool))
        or (one is int and isinstance(value, int) and not isinstance(value, bool))
        or (one in (bool, NoneType) and isinstance(value, one))
        or (get_origin(one) is list and isinstance(value, list) and value and all(isinstance(v, str) for v in value))
        for one in ([kind] if get_origin(kind) is list else allowed)
    )
    if not fits:
        names = " or ".join(words.get(one, "a list of names") for one in allowed)
        raise ValueError(f"{key} is {shortened(value)}; allowed: {names}")


def is_named(name: str, pattern: str) -> bool:
    """Whether a module's full name, or the end of it behind a dot, matches a pattern."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def find_layers(key: str, backbone: nn.Module, asked: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """The full names of the layers of `backbone` that `asked` names, or where it is None, `default`.

    ValueError, which begins with `key`, for a name that no layer has; the names in `default` may be absent, not all.
    """
    layers = {name: module for name, module in backbone.named_modules() if _is_plain(module)}
    found: list[str] = []
    for one in default if asked is None else asked:
        matching = [name for name in layers if is_named(name, one.removeprefix("backbone."))]
        if not matching and asked is not None:
            others = sorted({type(m).__name__ for name, m in backbone.named_modules() if name and is_named(name, one)})
            what = f"is {' and '.join(others)}" if others else "is not there"
            raise ValueError(f"{key}: {one!r} {what} in {type(backbone).__name__}; {_there(layers)}")
        found += matching
    if not found:
        raise ValueError(f"{key}: {type(backbone).__name__} has none of {', '.join(default)}; {_there(layers)}")
    return list(dict.fromkeys(found))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what torch's linear layer or convolution does, in one group."""
    if isinstance(module, nn.Conv2d):
        return type(module).forward is nn.Conv2d.forward and module.groups == 1
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _there(layers: Mapping[str, nn.Module]) -> str:
    """The ends of the names of layers that can be targets; of a number, with the name before it."""
    parts = [name.split(".") for name in layers]
    ends = list(dict.fromkeys(".".join(own[-2:] if own[-1].isdigit() else own[-1:]) for own in parts))
    more = f", … ({len(ends)} in all)" if len(ends) > 12 else ""
    return f"name some of its linear and convolutional layers as targets: {', '.join(ends[:12])}{more}"


def idle_adapters(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """The names of adapted layers that `run`, a forward pass of `model`, does not call.

    Some networks take the weight of a layer by hand: an adapter in it would do nothing.
    """
    called: set[int] = set()
    adapted = adapted_layers(model)
    hooks = [m.register_forward_hook(lambda module, *_: called.add(id(module))) for m in adapted.values()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, module in adapted.items() if id(module) not in called]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that hold an adapter of `peft`, by name."""
    # peft need not be installed where nothing is adapted: its layers are known by what they have.
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "merge")
    }


def merge_adapters(model: nn.Module) -> None:
    """Add adapters that are a change of weights to these, in place, and take them out; up to rounding nothing changes.

    LoRA, DoRA, LoKr and IA3 can be merged. AdaptFormer, which is not linear, stays; see `has_adapters`.
    """
    for name, layer in adapted_layers(model).items():
        layer.merge(safe_merge=True)  # pyright: ignore[reportCallIssue]
        model.set_submodule(name, layer.get_base_layer())  # pyright: ignore[reportCallIssue,reportArgumentType]


def has_adapters(model: nn.Module) -> bool:
    """Whether adapters are in `model`, so that it is no plain network of timm."""
    return bool(adapted_layers(model)) or any(isinstance(module, ParallelMlp) for module in model.modules())
