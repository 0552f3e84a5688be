"""Training one network: recipes, and a resumable, reproducible engine."""

from lowsearch.train.engine import CurvePoint, OtherNetwork, TrainResult, can_train, check_recipe, evaluate, require_trainable, train
from lowsearch.train.order import Order
from lowsearch.train.recipe import RECIPES, Recipe, recipe
from lowsearch.train.rung import Rung, rungs_of

__all__ = [
    "RECIPES", "CurvePoint", "Order", "OtherNetwork", "Recipe", "Rung", "TrainResult", "can_train", "check_recipe", "evaluate", "recipe",
    "require_trainable", "rungs_of", "train",
]  # fmt: skip
