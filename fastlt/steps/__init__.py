"""One iteration of each method: one file a method, all in one table."""

from __future__ import annotations

from typing import Any

from fastlt.steps.balms import BalmsStep
from fastlt.steps.base import StageModel, Step, StepOptions, StepParts
from fastlt.steps.cb_da import CbDaStep
from fastlt.steps.cdb import CdbStep
from fastlt.steps.decoupled import CrtStep, LasStep, LwsStep, TauNormStep
from fastlt.steps.difficulty import DifficultyStep
from fastlt.steps.dro_lt import DroLtStep
from fastlt.steps.lfme import ExpertStep, LfmeStep
from fastlt.steps.mixup import CutmixStep, MixupStep
from fastlt.steps.oltr import OltrStep
from fastlt.steps.paco import PacoStep
from fastlt.steps.plain import PlainStep
from fastlt.steps.ride import RideRouterStep, RideStep
from fastlt.steps.sample_weights import MetaWeightNetStep, SampleDifficultyStep

# Each row has options of its own class, which no one type of a table can say.
STEPS: dict[str, type[Step[Any]]] = {
    "plain": PlainStep,
    "difficulty": DifficultyStep,
    "cdb": CdbStep,
    "mwn": MetaWeightNetStep,
    "sample_difficulty": SampleDifficultyStep,
    "cb_da": CbDaStep,
    "paco": PacoStep,
    "dro_lt": DroLtStep,
    "crt": CrtStep,
    "lws": LwsStep,
    "las": LasStep,
    "tau_norm": TauNormStep,
    "ride": RideStep,
    "ride_router": RideRouterStep,
    "balms": BalmsStep,
    "mixup": MixupStep,
    "cutmix": CutmixStep,
    "oltr": OltrStep,
    "expert": ExpertStep,
    "lfme": LfmeStep,
}

__all__ = ["STEPS", "StageModel", "Step", "StepOptions", "StepParts"]
