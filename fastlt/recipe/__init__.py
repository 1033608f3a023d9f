"""The recipe: all settings of a run, typed, composed and checked before any data is touched."""

from fastlt.recipe.checks import check
from fastlt.recipe.compose import load_recipe, read_resolved
from fastlt.recipe.from_model import unlike_model
from fastlt.recipe.portable import without_paths
from fastlt.recipe.resuming import Change, Standing, changes
from fastlt.recipe.schema import (
    CHOICE_KEYS,
    FILE_KEYS,
    AccuracyRecipe,
    DataRecipe,
    ModelRecipe,
    Recipe,
    StageRecipe,
    StorageRecipe,
    is_harmless,
    recipe_from_tree,
)
from fastlt.typed_yaml import RecipeError

__all__ = [
    "CHOICE_KEYS",
    "FILE_KEYS",
    "AccuracyRecipe",
    "Change",
    "DataRecipe",
    "ModelRecipe",
    "Recipe",
    "RecipeError",
    "StageRecipe",
    "Standing",
    "StorageRecipe",
    "changes",
    "check",
    "is_harmless",
    "load_recipe",
    "read_resolved",
    "recipe_from_tree",
    "unlike_model",
    "without_paths",
]
