"""The weights that timm knows for a name: found on this machine, or fetched where the network allows it."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch

ANSWER_S = 6.0  # a host that takes longer is taken for unreachable; the hub itself would try for minutes
FILES = ("model.safetensors", "pytorch_model.bin")


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
        import socket

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
