"""Pretrained weights: those that timm knows for a name, and those of a folder or a repository in timm's form.

Found on this machine, or fetched where the network allows it.
"""

from __future__ import annotations

import json
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
from timm.data import resolve_data_config

ANSWER_S = 6.0  # a host that takes longer is taken for unreachable; the hub itself would try for minutes
LOCAL, HUB = "local-dir:", "hf-hub:"
FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class PublishedModel:
    """A network in timm's form: config.json beside the weights.

    architecture: a name of timm. weights: their file. config: timm's `pretrained_cfg`.
    """

    architecture: str
    weights: Path
    config: dict[str, Any]


def is_published(name: str) -> bool:
    """Whether a name of a network says where it is published: `local-dir:PATH` or `hf-hub:NAME`, as timm writes it."""
    return name.startswith((LOCAL, HUB))


def read_published(name: str) -> PublishedModel:
    """The network behind `local-dir:PATH` or `hf-hub:NAME`; of the hub it is fetched into the cache of Hugging Face.

    ValueError where it is not there, cannot be fetched, or is no network of timm.
    """
    local = name.startswith(LOCAL)
    find = _file_of_folder if local else _file_of_hub
    place = Path(name.removeprefix(LOCAL)).expanduser() if local else name.removeprefix(HUB)
    config_file = find(place, ("config.json",))
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        architecture, pretrained_cfg = str(config["architecture"]), dict(config.get("pretrained_cfg", config))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config_file} is not timm's config.json of a network ({error})") from None
    if not timm.is_model(architecture):
        raise ValueError(f"{config_file} is of {architecture!r}, which is no network of timm")
    arguments = {k: v for k, v in (config.get("model_args") or {}).items() if k not in ("img_size", "num_classes")}
    if arguments:
        raise ValueError(
            f"{config_file} has model_args {arguments}, which no key of a recipe can give to {architecture}"
        )
    return PublishedModel(architecture, find(place, FILES), pretrained_cfg)


def _file_of_folder(folder: Path | str, names: tuple[str, ...]) -> Path:
    for name in names:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ValueError(f"{folder} has no {' or '.join(names)}; give a folder that holds a network in timm's form")


def _file_of_hub(repository: Path | str, names: tuple[str, ...]) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, revision = str(repository).partition("@")
    for name in names:
        cached = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)
    url = f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}"
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise ValueError(
            f"hf-hub:{repository} is not on this machine, and {urlsplit(constants.ENDPOINT).hostname} cannot be "
            f"reached: fetch {url}/config.json and {url}/{FILES[0]} elsewhere into a folder, and give "
            "model.name=local-dir:FOLDER"
        )
    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision or None))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
    raise ValueError(f"{url} gives no {' or '.join(names)} ({reason}); give a repository with a network in timm's form")


def config_of(name: str) -> dict[str, Any]:
    """timm's configuration of a name, with or without a tag; ValueError for a tag that the network does not have."""
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:
        architecture = name.partition(".")[0]
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(
            f"{architecture} has no pretrained weights {name.partition('.')[2]!r}; there are "
            f"{', '.join(tags) or 'none'}"
        ) from None
    return {} if config is None else config.to_dict()


@dataclass(frozen=True)
class InputConfig:
    """How images were prepared for pretrained weights: timm's `resolve_data_config`.

    mean, std: of the pixels in [0, 1]. crop: side of the central square over the shorter side. interpolation: of the
    resampling.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float
    interpolation: str


def input_config(config: dict[str, Any]) -> InputConfig:
    """See `InputConfig`; config: timm's `pretrained_cfg`."""
    found = resolve_data_config(pretrained_cfg=config or {"input_size": (3, 224, 224)})
    red, green, blue = found["mean"]
    of_red, of_green, of_blue = found["std"]
    return InputConfig((red, green, blue), (of_red, of_green, of_blue), found["crop_pct"], found["interpolation"])


def check_reachable(name: str) -> dict[str, Any]:
    """What `timm.create_model(pretrained=True)` is to be told of the weights of `name`: {} where it fetches them.

    ValueError, within seconds, when they are neither on this machine nor within reach.
    """
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None, name
    if cfg.hf_hub_id:
        return _of_hub(name, cfg)
    if isinstance(cfg.url, str) and cfg.url:
        there = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(cfg.url).path).name
        if not there.is_file() and not reachable(cfg.url):
            raise _absent(name, cfg.url)
    return {}


def _of_hub(name: str, cfg: Any) -> dict[str, Any]:
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, revision = cfg.hf_hub_id.partition("@")
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else FILES
    for file in names:
        path = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(path, str):
            # Without this, the hub is asked for a newer version first.
            return {} if cfg.custom_load else {"pretrained_cfg_overlay": {"file": path}}
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise _absent(name, f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{names[0]}")
    return {}


def reachable(url: str) -> bool:
    """Whether the host of an address answers in `ANSWER_S` seconds; True where a proxy has to be asked instead."""
    parts = urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    answers = []

    def ask() -> None:
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), ANSWER_S).close()
            answers.append(True)
        except OSError:
            pass

    # In a thread, because looking up a name has no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return bool(answers)


def _absent(name: str, url: str) -> ValueError:
    return ValueError(
        f"model.pretrained is true, but the weights of {name} are not on this machine, and {urlsplit(url).hostname} "
        f"cannot be reached: fetch {url} elsewhere, and give the file with model.pretrained=false model.checkpoint=FILE"
    )
