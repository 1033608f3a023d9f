"""Weights from a local file into a `Classifier`."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Wrappers whose names precede every parameter's, and the entries under which training scripts keep their weights.
PREFIXES = ("module.", "_orig_mod.")
CONTAINERS = ("state_dict", "model", "model_state_dict")
Tensors = dict[str, Tensor]


def read_weights(path: str | Path) -> Tensors:
    """The tensors by name in a .safetensors file or a file of torch.save, without wrapper prefixes, on the CPU.

    torch files are read with weights_only=True: nothing in them is executed. Raises ValueError when the file is not
    there or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give the path of a .safetensors or torch.save file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"checkpoint {path} cannot be read as weights: {error}") from error
    for name in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"checkpoint {path} holds no weights: expected tensors by name, or those under {CONTAINERS}")
    return {_strip(name): tensor for name, tensor in state.items()}


def load_weights(classifier: nn.Module, path: str | Path) -> bool:
    """Load a file into a `Classifier`: one of ours (backbone.*, head.*) or a plain backbone's (timm, torchvision).

    auxiliary.* of ours is passed over. A head that does not fit (another number of classes, another kind) is left out
    and a warning says so; the head then stays as initialised. Everything else has to match: raises ValueError with the
    names that are missing, unexpected or of another shape, and leaves `classifier` as it was. Returns whether the head
    was loaded too.
    """
    # What a method trained beside the network (`Classifier.auxiliary`) is of no use to another run.
    state = {name: t for name, t in read_weights(path).items() if not name.startswith("auxiliary.")}
    if not any(name.startswith("backbone.") for name in state):
        state = _from_backbone(state, classifier.get_submodule("backbone"))
    own = classifier.state_dict()
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
    _check_match(state, own, path)
    classifier.load_state_dict(state, strict=False)
    return fits


def _strip(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
    return name


def _from_backbone(state: Tensors, backbone: nn.Module) -> Tensors:
    """Rename a plain backbone's weights to ours: its classifier becomes head.*, the rest backbone.*."""
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    renamed = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        renamed[f"head.{leaf}" if layer in names else f"backbone.{name}"] = tensor
    return renamed


def _shapes(state: Tensors, own: Tensors) -> str:
    def one(tensors: Tensors) -> str:
        return ", ".join(f"{n} {tuple(t.shape)}" for n, t in sorted(tensors.items()) if n.startswith("head."))

    return f"in the file {one(state)}; here {one(own)}"


def _check_match(state: Tensors, own: Tensors, path: str | Path) -> None:
    # Files older than BatchNorm's batch counter lack it, and nothing here reads it.
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    reshaped = [
        f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
        for n in state
        if n in own and state[n].shape != own[n].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if any(problems.values()):
        lines = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        raise ValueError(f"checkpoint {path} is not of this model; " + "; ".join(lines))
