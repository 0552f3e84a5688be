"""Training one network: recipes, and a resumable, reproducible engine."""

from lowsearch.train.engine import CurvePoint, TrainResult, evaluate, train
from lowsearch.train.recipe import RECIPES, Recipe, recipe

__all__ = ["RECIPES", "CurvePoint", "Recipe", "TrainResult", "evaluate", "recipe", "train"]
