"""Training one network: recipes, and a resumable, reproducible engine."""

from lowsearch.train.engine import CurvePoint, OtherNetwork, TrainResult, can_train, check_recipe, evaluate, require_trainable, train
from lowsearch.train.order import Order
from lowsearch.train.recipe import RECIPES, Recipe, recipe

__all__ = [
    "RECIPES", "CurvePoint", "Order", "OtherNetwork", "Recipe", "TrainResult", "can_train", "check_recipe", "evaluate", "recipe",
    "require_trainable", "train",
]  # fmt: skip
