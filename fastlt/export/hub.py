"""A trained model on the Hugging Face hub, by timm's own function."""

from __future__ import annotations

import os

from timm.models import push_to_hf_hub

from fastlt.models.pretrained import reachable
from fastlt.models.timm_network import timm_network
from fastlt.run.model_card import model_card, usage
from fastlt.run.model_folder import data_config, own_keys
from fastlt.run.trained import TrainedRun


def check_push(repository: str) -> None:
    """ValueError unless there is a name, a token and a way to the hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {' '.join(str(error).split())}; give NAME or OWNER/NAME") from None
    if get_token() is None:
        raise ValueError(
            f"--push {repository}: there is no token for {constants.ENDPOINT}; run `hf auth login`, or set HF_TOKEN to "
            "one that may write"
        )
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
        raise ValueError(f"--push {repository}: {constants.ENDPOINT} cannot be reached, {why}; export without --push")


def push(trained: TrainedRun, repository: str, *, private: bool) -> str:
    """Upload a model that timm can compute; returns the address. ValueError when the hub refuses it."""
    from huggingface_hub.errors import HfHubHTTPError

    name = trained.recipe.model.name
    network = timm_network(trained.model, name, trained.image_size)
    about = usage(trained, None, of_timm=True).replace("local-dir:PATH/TO/THIS/FOLDER", f"hf-hub:{repository}")
    try:
        commit = push_to_hf_hub(
            network,
            repository,
            commit_message=f"{trained.recipe.name}, trained by fastlt",
            private=private,
            model_config=own_keys(trained, "timm"),
            model_card={**model_card(trained), "usage": about},
            safe_serialization=True,
            data_config=data_config(trained),
        )
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"--push {repository}: the hub refused it ({' '.join(str(error).split())[:300]})") from None
    return str(getattr(commit, "commit_url", None) or os.fspath(repository))
