"""Training recipes as values: everything that, with an architecture, a data set and a seed, determines trained weights.

A recipe is a Python function that returns a Recipe; RECIPES lists them by name. Accuracies are compared only between networks that
share a recipe, so the hash of its values is stored with every record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lowsearch.errors import UsageError

ENGINE_VERSION = 1
"""Raised when the engine gives other weights for the same recipe, so that old and new records are not mixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One full training schedule. A rung of a ladder is a fraction of it: the learning rate follows the full schedule."""

    name: str
    epochs: int
    """Passes over the training images."""
    train_images: int | None = None
    """Use the first so many training images, which hold the classes in their proportions; None or more than there are: all."""
    batch_size: int = 128
    learning_rate: float = 3e-3
    """Peak of the cosine, reached after the warm-up; it ends at zero."""
    warmup_fraction: float = 0.1
    """Part of the schedule in which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """On convolution and linear weights; norms and biases have none."""
    beta2: float = 0.99
    """AdamW's memory of squared gradients; torch's default 0.999 remembers longer than a short schedule lasts."""
    grad_clip: float = 1.0
    """Largest norm of a step's gradient."""
    label_smoothing: float = 0.1
    flip: bool = True
    """Mirror every second image, at random."""
    shift: float = 0.0625
    """Move every image by up to this part of its side in both directions, at random; the border is repeated."""
    ema_decay: float | None = None
    """Evaluate and keep an exponential moving average of the weights with this decay a step; None: the weights themselves."""
    drop_path: float = 0.0
    mlp_dropout: float = 0.0
    evaluate_at: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Fractions of the schedule at which the validation accuracy is taken."""

    def __post_init__(self) -> None:
        _check("name", self.name, bool(self.name), "a name")
        _check("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _check("train_images", self.train_images, self.train_images is None or self.train_images >= 1, "at least 1, or None for all")
        _check("batch_size", self.batch_size, self.batch_size >= 2, "at least 2: BatchNorm needs a batch")
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "positive")
        _check("warmup_fraction", self.warmup_fraction, 0 <= self.warmup_fraction < 1, "in [0, 1)")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more")
        _check("beta2", self.beta2, 0 <= self.beta2 < 1, "in [0, 1)")
        _check("grad_clip", self.grad_clip, self.grad_clip > 0, "positive")
        _check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "in [0, 1)")
        _check("shift", self.shift, 0 <= self.shift < 0.5, "in [0, 0.5)")
        _check("ema_decay", self.ema_decay, self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1), or None")
        _check("drop_path", self.drop_path, 0 <= self.drop_path < 1, "in [0, 1)")
        _check("mlp_dropout", self.mlp_dropout, 0 <= self.mlp_dropout < 1, "in [0, 1)")
        points = self.evaluate_at
        good = bool(points) and all(0 < p <= 1 for p in points) and list(points) == sorted(set(points)) and points[-1] == 1
        _check("evaluate_at", points, good, "rising fractions in (0, 1] that end at 1")

    @property
    def recipe_hash(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of all that influences the weights: every value but the name and `evaluate_at`."""
        values = {**dataclasses.asdict(self), "engine": ENGINE_VERSION}
        del values["name"], values["evaluate_at"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**dataclasses.asdict(self), "evaluate_at": list(self.evaluate_at)}

    def n_images(self, available: int) -> int:
        """Training images used where `available` are there."""
        return available if self.train_images is None else min(self.train_images, available)

    def steps_per_epoch(self, available: int) -> int:
        """Full batches in one pass; the images of an incomplete last batch sit out that epoch."""
        return max(1, self.n_images(available) // self.batch_size)

    def total_steps(self, available: int) -> int:
        """Optimizer steps of the full schedule."""
        return self.epochs * self.steps_per_epoch(available)


def micro() -> Recipe:
    """The full schedule of micro networks on small images: tens of CPU seconds a network.

    No augmentation: in so few passes nothing is memorised yet, and in a pilot mirroring and shifting cost accuracy.
    """
    return Recipe(name="micro", epochs=4, ema_decay=0.95, flip=False, shift=0.0)


RECIPES: dict[str, Callable[[], Recipe]] = {"micro": micro}


def recipe(name: str) -> Recipe:
    """The recipe called `name`. Raises UsageError with the known names."""
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        raise UsageError(f"unknown recipe {name!r}", hint=f"did you mean {close[0]!r}?" if close else f"known: {', '.join(RECIPES)}")
    return RECIPES[name]()


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise UsageError(f"recipe: {name} is {value!r}, expected {expected}")
