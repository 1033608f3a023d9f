"""Weights from a local file into a `Classifier`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from fastlt.models.known_networks import left_out_of, network_like, network_of_run
from fastlt.models.weight_files import Tensors, first_few, read_weights

log = logging.getLogger(__name__)

OURS = "backbone."
COUNTER = "num_batches_tracked"  # of BatchNorm; older files lack it, and nothing here reads it


def load_weights(classifier: nn.Module, path: str | Path) -> bool:
    """Load a file into a `Classifier`: one of ours (backbone.*, head.*) or a plain backbone's (timm, torchvision).

    One prefix before all names of the network, as wrappers and training frameworks put there, is taken off, and a
    warning says so. auxiliary.* of ours is passed over. Weights for another input size are `resampled`. A head that
    does not fit (another number of classes, another kind) is left out and a warning says so; the head then stays as
    initialised. Everything else has to match: raises ValueError with the first names that are missing, unexpected, of
    another shape or type, or not finite, and leaves `classifier` as it was. Returns whether the head was loaded too.
    """
    own = classifier.state_dict()
    state = named_as_ours(read_weights(path), classifier, path)
    _refuse_part(state, own, path)
    given_head = {name for name in state if name.startswith("head.")}
    own_head = {name for name in own if name.startswith("head.")}
    fits = given_head == own_head and all(state[name].shape == own[name].shape for name in own_head)
    if not fits:
        if given_head:
            log.warning(
                "%s: its head does not fit and is left out; the head starts anew (%s)", path, _shapes(state, own)
            )
        else:
            log.warning("%s: has no head; the head starts anew", path)
        state = {name: t for name, t in state.items() if name not in given_head}
        state.update({name: own[name] for name in own_head})
    state = resampled(state, classifier, path)
    _check_match(state, own, path)
    _check_values(state, own, path)
    classifier.load_state_dict(state, strict=False)
    return fits


def resampled(state: Tensors, classifier: nn.Module, path: str | Path) -> Tensors:
    """The weights of a file, with those that follow the input size (position embeddings, relative position biases)
    brought to the size of the network by timm's function for its family; a warning names them.

    Other weights stay as they are, and so do all where the family has no such function.
    """
    backbone = classifier.get_submodule("backbone")
    own = backbone.state_dict()
    inside = {name.removeprefix(OURS): t for name, t in state.items() if name.startswith(OURS)}
    other = [name for name, t in inside.items() if name in own and own[name].shape != t.shape]
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if not other or convert is None:
        return state
    try:
        converted = convert(dict(inside), backbone)
    except Exception:  # of another network, which is said with names and shapes where they are compared
        return state
    fits = [name for name in other if name in converted and converted[name].shape == own[name].shape]
    if len(fits) < len(other):
        return state
    shapes = [f"{name} {tuple(inside[name].shape)} to {tuple(own[name].shape)}" for name in fits]
    log.warning("%s: resampled for the input size of the network: %s", path, first_few(shapes))
    outside = {name: t for name, t in state.items() if not name.startswith(OURS)}
    return {**outside, **{f"{OURS}{name}": t for name, t in converted.items()}}


def named_as_ours(state: Tensors, classifier: nn.Module, path: str | Path) -> Tensors:
    """The weights of a file under our names: backbone.*, and head.* for a plain backbone's classifier.

    ValueError when the weights of the network stand in the file more than once.
    """
    backbone = classifier.get_submodule("backbone")
    names = [name for name in backbone.state_dict() if not name.endswith(COUNTER)]
    prefixes = prefixes_of(names, state)
    if not prefixes:
        return state if _counted(state, OURS) else _renamed(state, backbone)
    if "" not in prefixes and len(prefixes) > 1:
        raise ValueError(
            f"checkpoint {path} holds the weights of this network {len(prefixes)} times, under "
            f"{first_few(map(repr, prefixes))}; write those of one prefix into a file of their own with torch.save"
        )
    prefix = "" if "" in prefixes else prefixes[0]
    if prefix.endswith(OURS):
        outer = prefix.removesuffix(OURS)
        ours = {name.removeprefix(outer): t for name, t in state.items() if name.startswith((prefix, f"{outer}head."))}
        rest = [n for n in state if n.removeprefix(outer) not in ours and not n.startswith(f"{outer}auxiliary.")]
    else:
        outer = prefix
        ours = _renamed({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}, backbone)
        rest = [n for n in state if not n.startswith(prefix)]
    if outer:
        log.warning("%s: the weights are those whose names begin with %r", path, outer)
    if rest:
        log.warning("%s: passing over what is not of this network: %s", path, first_few(rest))
    return ours


def prefixes_of(names: list[str], state: Iterable[str]) -> list[str]:
    """What stands before `names` in a file of weights: each prefix under which all of them are."""
    there = set(state)
    found = [name.removesuffix(names[0]) for name in there if name == names[0] or name.endswith(f".{names[0]}")]
    return sorted(prefix for prefix in found if all(prefix + name in there for name in names))


def _counted(state: Tensors, prefix: str) -> int:
    return sum(name.startswith(prefix) for name in state)


def _renamed(state: Tensors, backbone: nn.Module) -> Tensors:
    """Rename a plain backbone's weights to ours: its classifier becomes head.*, the rest backbone.*."""
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    renamed = {}
    for name, tensor in state.items():
        layer = next((layer for layer in names if name.startswith(f"{layer}.")), None)
        renamed[f"{OURS}{name}" if layer is None else f"head.{name.removeprefix(f'{layer}.')}"] = tensor
    return renamed


def _shapes(state: Tensors, own: Tensors) -> str:
    def one(tensors: Tensors) -> str:
        return ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(tensors.items()) if n.startswith("head."))

    return f"in the file {one(state)}; here {one(own)}"


def _told(path: str | Path, state: Tensors) -> str:
    """Of which network a file is, as far as can be told: a part of a sentence, or ""."""
    what = network_of_run(path) or network_like(state)
    return "" if what is None else f"; the file is of {what}"


def _refuse_part(state: Tensors, own: Tensors, path: str | Path) -> None:
    """ValueError for a checkpoint of fastlt that keeps the trained part of a network alone."""
    missing = [n for n in own if n.startswith(OURS) and n not in state and not n.endswith(COUNTER)]
    rest = left_out_of(path) if missing else None
    if rest is not None:
        raise ValueError(
            f"checkpoint {path} keeps the trained part of its network alone, and the rest was {rest}; give "
            "model/model.safetensors of the same run, which holds all weights"
        )


def _check_match(state: Tensors, own: Tensors, path: str | Path) -> None:
    """ValueError, a line of a few names, unless names and shapes are those of the network."""
    problems = {
        "missing": [n for n in own if n not in state and not n.endswith(COUNTER)],
        "unexpected": [n for n in state if n not in own],
        "of another shape": [
            f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
            for n in state
            if n in own and state[n].shape != own[n].shape
        ],
    }
    found = [f"{len(names)} {kind}: {first_few(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"checkpoint {path} is not of this model, which has {len(own)} weights{_told(path, state)}; "
            f"{'; '.join(found)}. Set model.name and its options to those of the file, or give another file"
        )


def _check_values(state: Tensors, own: Tensors, path: str | Path) -> None:
    """ValueError for numbers that the network cannot take as they are: quantised or not finite."""
    for name, tensor in state.items():
        if own[name].is_floating_point() and (not tensor.is_floating_point() or tensor.element_size() == 1):
            raise ValueError(
                f"checkpoint {path} holds {name} as {tensor.dtype}, where the network has {own[name].dtype}; "
                "give the weights from before they were quantised"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"checkpoint {path} holds numbers in {name} that are not finite; give an earlier one")
