"""Which keys of a recipe the checks of a method read; the recipe's own classes satisfy these protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class StageSettings(Protocol):
    """The stage that a method trains, or an earlier one; see `fastlt.recipe.StageRecipe`."""

    @property
    def method(self) -> str: ...
    @property
    def loss(self) -> str: ...
    @property
    def loss_options(self) -> Mapping[str, Any]: ...
    @property
    def classes(self) -> str: ...
    @property
    def sampling(self) -> str: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def nesterov(self) -> bool: ...
    @property
    def iterations(self) -> int | None: ...
    @property
    def evaluate_every(self) -> int: ...
    @property
    def select(self) -> str: ...


class DataSettings(Protocol):
    """The data of a run; see `fastlt.recipe.DataRecipe`."""

    @property
    def image_size(self) -> int: ...


class ModelSettings(Protocol):
    """The network of a run; see `fastlt.recipe.ModelRecipe`."""

    @property
    def name(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def experts(self) -> int | None: ...


class RecipeSettings(Protocol):
    """The run that a stage belongs to; see `fastlt.recipe.Recipe`."""

    @property
    def data(self) -> DataSettings: ...
    @property
    def model(self) -> ModelSettings: ...
    @property
    def stages(self) -> Mapping[str, StageSettings]: ...
    @property
    def precision(self) -> str: ...
    @property
    def compile(self) -> str: ...

    def lineage(self, stage: StageSettings) -> Sequence[StageSettings]:
        """The stages that the model of `stage` goes through, up to `stage` itself."""
        ...
