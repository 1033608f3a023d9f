"""The forms in which a network is written, one row each: how it is written, and how its logits are read back."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.export.options import ExportOptions

Program = Callable[[Tensor], Tensor]
# Bytes; protobuf, in which an ONNX file is written, has no larger messages: more weights are put into a file beside it.
LARGEST_ONNX = 2_000_000_000
META = "fastlt.json"  # what torch's files hold beside the network


@dataclass(frozen=True)
class Form:
    """A kind of file.

    suffix: of the file.
    packages: what has to be installed for it, with the extra of fastlt that brings them.
    write: network, images that it takes (N, 3, S, S), path, what the file says of the model, and options. It may write
        a second file, which the first refers to by its name, into the same folder.
    read: the path to a function of images (N, 3, H, W), any N, to logits (N, C).
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Path, Mapping[str, Any], ExportOptions], None]
    read: Callable[[Path], Program]


def check_installed(form: Form) -> None:
    """ValueError where a package that the form needs is not installed."""
    absent = [package for package in form.packages if importlib.util.find_spec(package) is None]
    if absent:
        raise ValueError(f"{' and '.join(absent)} is not installed: pip install 'fastlt[export]'")


def check_opset(opset: int) -> None:
    """ValueError for a version of ONNX's operators that the installed onnx does not know."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(f"opset is {opset}: onnx {onnx.__version__}, which is installed, knows those up to {newest}")


def _write_onnx(
    network: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], options: ExportOptions
) -> None:
    import onnx

    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if options.dynamic_size:
        axes |= {2: "height", 3: "width"}
    with _quiet():
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            opset_version=options.opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(axes,),
            verbose=False,
        )
    assert program is not None
    written = program.model.opset_imports[""]
    if options.opset not in (None, written):
        raise ValueError(
            f"opset is {options.opset}, and this network cannot be put into it: torch {torch.__version__} writes opset "
            f"{written}; give that or a later one, or a runtime that takes it"
        )
    for key, value in about.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    program.save(path, external_data=size > LARGEST_ONNX)
    onnx.checker.check_model(path)


def _read_onnx(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torch(
    network: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], options: ExportOptions
) -> None:
    axes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if options.dynamic_size:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with _quiet():
        program = torch.export.export(network, (images,), dynamic_shapes=(axes,))
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={META: json.dumps(about, ensure_ascii=False)})


def _read_torch(path: Path) -> Program:
    with path.open("rb") as file:  # by a path, only names that end in .pt2 are read
        return torch.export.load(file).module()


def _write_torchscript(
    network: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], options: ExportOptions
) -> None:
    with _quiet():
        script = torch.jit.trace(network, (images,), check_trace=False)
        torch.jit.save(script, str(path), _extra_files={META: json.dumps(about, ensure_ascii=False).encode()})


def _read_torchscript(path: Path) -> Program:
    with _quiet():
        return torch.jit.load(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of their own inside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMS = {
    "onnx": Form(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx),
    "torch": Form(".pt2", (), _write_torch, _read_torch),
    "torchscript": Form(".torchscript", (), _write_torchscript, _read_torchscript),
}
