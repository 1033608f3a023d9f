"""fastlt trains image classifiers on long-tailed data.

`fastlt.__all__` lists the public names; each is imported when it is first used. So `import fastlt` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastlt.version import __version__ as __version__

if TYPE_CHECKING:
    from fastlt.augment import build_augment
    from fastlt.batches import Batches, build_loader
    from fastlt.inference import Prediction, Predictions, Predictor, load
    from fastlt.losses import build_loss
    from fastlt.models import build_model
    from fastlt.recipe import load_recipe
    from fastlt.run.fit import FinishedRun, fit
    from fastlt.state import Batch, ClassCounts, StepOutput
    from fastlt.steps.standalone import TrainingStep, build_step
    from loaders.order.sampler import build_sampler

# Each public name and the module that it is defined in or handed on by; the type checker's imports above say the same.
_HOMES = {
    "Batch": "fastlt.state",
    "Batches": "fastlt.batches",
    "ClassCounts": "fastlt.state",
    "FinishedRun": "fastlt.run.fit",
    "Prediction": "fastlt.inference",
    "Predictions": "fastlt.inference",
    "Predictor": "fastlt.inference",
    "StepOutput": "fastlt.state",
    "TrainingStep": "fastlt.steps.standalone",
    "build_augment": "fastlt.augment",
    "build_loader": "fastlt.batches",
    "build_loss": "fastlt.losses",
    "build_model": "fastlt.models",
    "build_sampler": "loaders.order.sampler",
    "build_step": "fastlt.steps.standalone",
    "fit": "fastlt.run.fit",
    "load": "fastlt.inference",
    "load_recipe": "fastlt.recipe",
}

__all__ = [
    "Batch",
    "Batches",
    "ClassCounts",
    "FinishedRun",
    "Prediction",
    "Predictions",
    "Predictor",
    "StepOutput",
    "TrainingStep",
    "build_augment",
    "build_loader",
    "build_loss",
    "build_model",
    "build_sampler",
    "build_step",
    "fit",
    "load",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    """A public name, from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
