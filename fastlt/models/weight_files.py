"""Tensors by name out of a file of weights that somebody else wrote. Nothing in the file is executed.

`torch.load(weights_only=True)` refuses a file for any object beside the tensors: the arguments of the training script,
a NumPy number. Here each such object is replaced by an inert `Stranger`, and the tensors are read.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
# The entries under which training scripts keep the weights of the network that they trained.
CONTAINERS = ("state_dict", "model", "model_state_dict")
PICKLE = b"\x80"  # how files of torch.save began before they were zip archives
MOST_STRANGERS = 300
AS_WEIGHTS = "give a .safetensors file, or the state_dict() of the network in a file of torch.save"
# How the files begin that are taken for weights most often, what they are, and what to do.
FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`"),
    (b"<", "is a web page or XML, not the file itself; download it again, signed in if the site asks for that"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"\x89HDF", f"is an HDF5 file, as Keras writes them; {AS_WEIGHTS}"),
    (b"\x93NUMPY", f"is an array of NumPy; {AS_WEIGHTS}"),
    (b"GGUF", f"is a GGUF file, whose weights are quantised; {AS_WEIGHTS}"),
    (b"\x08", f"is an ONNX or TensorFlow file; {AS_WEIGHTS}"),
)


class Stranger:
    """Stands for an object that a file holds beside its tensors; takes whatever the file gives it, and does nothing."""

    name = ""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Let go of the arguments."""

    def __setstate__(self, state: Any) -> None:
        """Let go of the state."""


def read_weights(path: str | Path) -> Tensors:
    """The tensors by name in a .safetensors file or a file of torch.save, on the CPU.

    ValueError, one sentence, when the file is not there, is damaged, is of another kind, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist: give the path of a .safetensors or torch.save file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if not head:
        raise ValueError(f"checkpoint {path} is empty; copy or download it again")
    if head[8:9] == b"{":  # behind the length of its header
        return _read_safetensors(path)
    for begins, what in FOREIGN:
        if head.lstrip().startswith(begins):
            raise ValueError(f"checkpoint {path} {what}")
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint {path} is cut short; copy or download it again")
    if not head.startswith((b"PK", PICKLE)):
        raise ValueError(f"checkpoint {path} is no file of weights; {AS_WEIGHTS}")
    return _tensors_of(_read_torch(path), path)


def read_saved(path: str | Path) -> Any:
    """All that a file of torch.save holds, with a `Stranger` for what is no tensor and no container; None of others."""
    return _read_torch(Path(path)) if zipfile.is_zipfile(path) else None


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first names of many, and how many there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")


def _read_safetensors(path: Path) -> Tensors:
    try:
        state = load_file(path)
    except Exception as error:
        raise ValueError(
            f"checkpoint {path} is a damaged safetensors file ({_first_line(error)}); copy or download it again"
        ) from None
    if not state:
        raise ValueError(f"checkpoint {path} holds no tensors; {AS_WEIGHTS}")
    return state


def _read_torch(path: Path) -> Any:
    """What torch.save wrote, with a `Stranger` for each object that is neither a tensor nor a plain container."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    strangers: dict[str, type[Stranger]] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in strangers.items()]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            unknown = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
            name = "" if unknown is None else unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
            if not name or name in strangers or len(strangers) >= MOST_STRANGERS:
                raise _unreadable(path, error) from None
            strangers[name] = type(name.rpartition(".")[2], (Stranger,), {"name": name})
        except Exception as error:
            raise _unreadable(path, error) from None


def _check_archive(path: Path) -> None:
    """ValueError for an archive that is not torch's, and a warning for one whose content is not what was written."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise ValueError(f"checkpoint {path} is a zip archive of {first_few(names)}; unpack it first")
        if any(name.endswith("constants.pkl") for name in names):
            raise ValueError(f"checkpoint {path} is a TorchScript program, which would have to be run; {AS_WEIGHTS}")
        damaged = archive.testzip()
    if damaged is not None:
        log.warning("%s: may be damaged, the checksum of %s in it is wrong; copy or download it again", path, damaged)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"checkpoint {path} cannot be read as weights: it is damaged or of another kind ({_first_line(error)}); "
        f"copy it again, or {AS_WEIGHTS}"
    )


def _first_line(error: Exception) -> str:
    text = str(error)
    reason = re.search(r"WeightsUnpickler error: (.*)", text)
    return (reason[1] if reason else text.strip().split("\n")[0] or type(error).__name__)[:150]


def _tensors_of(tree: Any, path: Path) -> Tensors:
    """The tensors in what a file held: its own entries, or those of the one entry that has tensors."""
    if isinstance(tree, Mapping) and not any(isinstance(value, Tensor) for value in tree.values()):
        held = [key for key, value in tree.items() if _has_tensors(value) or _is_module(value)]
        known = [key for key in CONTAINERS if key in held] or held
        if len(known) > 1 and known[0] not in CONTAINERS:
            raise ValueError(
                f"checkpoint {path} holds several sets of weights, {first_few(map(str, held), 9)}; write the one that "
                "is meant into a file of its own with torch.save"
            )
        tree = tree[known[0]] if known else tree
    if isinstance(tree, Stranger):
        raise ValueError(
            f"checkpoint {path} holds a whole {tree.name}, code and weights together, and code of a file is not run; "
            "where it was made, save its weights alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    if not _has_tensors(tree):
        entries = [f"{key} ({_kind(value)})" for key, value in tree.items()] if isinstance(tree, Mapping) else []
        what = f"but {first_few(entries, 5)}" if entries else f"but {_kind(tree)}"
        raise ValueError(f"checkpoint {path} holds no weights, {what}; {AS_WEIGHTS}")
    others = [f"{key} ({_kind(value)})" for key, value in tree.items() if not isinstance(value, Tensor)]
    if others:
        log.warning("%s: passing over what is no tensor: %s", path, first_few(others))
    return {str(key): value for key, value in tree.items() if isinstance(value, Tensor)}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, Tensor) for one in value.values())


def _is_module(value: Any) -> bool:
    return isinstance(value, Stranger) and not value.name.startswith(("numpy.", "argparse."))


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Stranger) else type(value).__name__
