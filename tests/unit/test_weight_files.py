"""Files of weights that others wrote: read where they can be, else refused in one sentence, and never executed."""

from __future__ import annotations

import argparse
import logging
import pickle
import socket
import subprocess
import time
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastlt.models import build_model, pretrained

PLAIN = timm.create_model("cifar_resnet8", num_classes=3)
STATE = PLAIN.state_dict()
NETWORK = {name: tensor for name, tensor in STATE.items() if not name.startswith("fc.")}


class Harmful:
    """Unpickled by Python, it would run a command."""

    def __reduce__(self):
        return subprocess.check_call, (["touch", "/tmp/fastlt-was-executed"],)


def under(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


READ = {
    "namespace": {"model": STATE, "args": argparse.Namespace(lr=0.1, layers=[1, 2])},
    "numpy": {"state_dict": STATE, "best_acc1": np.float64(3.5), "history": np.arange(3)},
    "lightning": {"state_dict": under("model."), "callbacks": {}, "pytorch-lightning_version": "2.0"},
    "moco": {"state_dict": under("module.encoder_q.", STATE) | {"module.queue": torch.zeros(2, 2)}},
    "backbone alone": under("backbone.", NETWORK) | {"projector.0.weight": torch.zeros(2, 2)},
    "compiled": {"state_dict": under("module._orig_mod.")},
    "another container": {"ema_weights": STATE, "epoch": 3},
    "beside no tensors": STATE | {"epoch": 3},
    "half": {name: t.half() if t.is_floating_point() else t for name, t in STATE.items()},
    "harmful": {"state_dict": STATE, "hook": Harmful()},
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("old_format", [False, True])
def test_the_weights_in_files_of_others_are_read(kind, old_format, tmp_path, caplog):
    torch.save(READ[kind], tmp_path / "w.pth", _use_new_zipfile_serialization=not old_format)
    with caplog.at_level(logging.WARNING, "fastlt"):
        model = build_model("cifar_resnet8", num_classes=3, checkpoint=tmp_path / "w.pth")
    for name, tensor in NETWORK.items():
        torch.testing.assert_close(model.backbone.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
    prefix = {"lightning": "'model.'", "moco": "'module.encoder_q.'", "compiled": "'module._orig_mod.'"}
    assert prefix.get(kind, "") in caplog.text
    assert model.head_is_trained == (kind != "backbone alone")
    assert subprocess.run(["test", "-e", "/tmp/fastlt-was-executed"]).returncode == 1


def saved(value):
    return lambda path: torch.save(value, path)


def written(content):
    return lambda path: path.write_bytes(content)


def cut_short(path):
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-1000])


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights/model.pth", "x")


def script(path):
    torch.jit.script(nn.Linear(2, 2)).save(path)


def quantised(path):
    weight = torch.quantize_per_tensor(STATE["conv1.weight"], 0.1, 0, torch.qint8)
    torch.save(STATE | {"conv1.weight": weight}, path)


def no_tensors(path):
    save_file({}, path)


def cut_safetensors(path):
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-10])


REFUSED = {
    "two encoders": (
        saved(under("encoder_q.") | under("encoder_k.")),
        "2 times, under 'encoder_k.', 'enc",
    ),
    "two sets": (saved({"student": STATE, "teacher": STATE}), "several sets of weights, student, teacher; write"),
    "whole network": (saved(PLAIN), r"a whole fastlt\.models\.cifar_resnet\.CifarResNet, .* torch\.save\(model\.state"),
    "network in an entry": (saved({"net": PLAIN, "epoch": 1}), "a whole fastlt.models.cifar_resnet"),
    "script": (script, "TorchScript"),
    "another network": (saved(timm.create_model("resnet18").state_dict()), "not of this model, which has .* weights; "),
    "no weights": (saved({"epoch": 3, "args": argparse.Namespace()}), r"epoch \(int\), args \(argparse\.Namespace\)"),
    "list": (saved([1, 2]), "holds no weights, but list"),
    "int8": (saved({n: t.to(torch.int8) for n, t in STATE.items()}), r"as torch\.int8, .* before they were quantised"),
    "quantised": (quantised, r"conv1\.weight as torch\.qint8"),
    "nan": (saved(STATE | {"bn1.bias": torch.full_like(STATE["bn1.bias"], torch.nan)}), "bn1.bias that are not finite"),
    "empty": (written(b""), "is empty"),
    "pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
    "page": (written(b"\n<!DOCTYPE html><html>"), "is a web page"),
    "onnx": (written(b"\x08\x07\x12\x07pytorch"), "is an ONNX or TensorFlow file"),
    "keras": (written(b"\x89HDF\r\n\x1a\n"), "is an HDF5 file"),
    "text": (written(b"conv1.weight: 3\n" * 100), "is no file of weights"),
    "pickle": (written(pickle.dumps(Harmful(), 2)), "cannot be read as weights"),
    "cut short": (cut_short, "is cut short"),
    "archive": (archive, r"is a zip archive of weights/model\.pth; unpack"),
    "no tensors": (no_tensors, "holds no tensors"),
    "cut safetensors": (cut_safetensors, "is a damaged safetensors file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_are_no_weights_of_this_network_is_refused_in_one_sentence(kind, tmp_path):
    make, expected = REFUSED[kind]
    path = tmp_path / "w.pth"
    make(path)
    model = build_model("cifar_resnet8", num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=expected) as error:
        build_model("cifar_resnet8", num_classes=3, checkpoint=path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600 + len(str(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_flipped_bit_is_said(tmp_path, caplog):
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    data = bytearray(path.read_bytes())
    data[data.index(STATE["conv1.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "fastlt"):
        build_model("cifar_resnet8", num_classes=3, checkpoint=path)
    assert "may be damaged, the checksum of" in caplog.text


def never_answers(*_):
    time.sleep(3)
    raise OSError("timed out")


@pytest.mark.parametrize("offline", [True, False])
def test_pretrained_weights_out_of_reach_are_named_with_what_to_fetch(offline, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "ANSWER_S", 1.0)
    monkeypatch.setattr(socket, "create_connection", never_answers)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"fetch .*/timm/resnet18\.a1_in1k/resolve/main/model\.safetensors elsewhere"):
        build_model("resnet18", num_classes=3, pretrained=True)
    assert time.monotonic() - started < 2.5


def test_pretrained_weights_on_this_machine_ask_no_network(monkeypatch, tmp_path):
    state = timm.create_model("resnet18").state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(tmp_path / "model.safetensors"))
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("the network was asked"))
    model = build_model("resnet18", num_classes=3, pretrained=True)
    assert torch.equal(model.backbone.state_dict()["conv1.weight"], state["conv1.weight"])
