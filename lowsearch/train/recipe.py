"""Training recipes as values: everything that, with an architecture, a data set and a seed, determines trained weights.

A recipe is a Python function that returns a Recipe; RECIPES lists them by name. A user makes others from a name or a YAML file and
changed fields (`recipe`). Accuracies are compared only between networks that share a recipe, so the hash of its values is stored with
every record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lowsearch.errors import UsageError

ENGINE_VERSION = 1
"""Raised when the engine gives other weights for the same recipe, so that old and new records are not mixed."""
DEFAULT_RECIPE = "micro"
Loss = Literal["cross-entropy", "bce"]
_AUTO_AUGMENT = re.compile(r"(rand|augmix|originalr?|v0r?|3aa?)(-[a-z]+[0-9.]+)*")
_TIMM_TEACHER = "timm:"


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

    # Fields that came later: at their default they are not in the hash, so that earlier records stay valid. Everything random in them
    # is timm's, keyed by (seed, step).
    loss: Loss = "cross-entropy"
    """`bce`: binary cross-entropy of every class, averaged over classes."""
    random_crop: float | None = None
    """Crop a random rectangle of at least this part of the image's area and of aspect 3/4 to 4/3, resampled to the network's resolution."""
    auto_augment: str | None = None
    """timm's string for RandAugment (`rand-m9-n2-mstd0.5-inc1`), AutoAugment (`original`, `v0`), AugMix (`augmix-m3-w3`) or 3-Augment."""
    erasing: float = 0.0
    """Probability that a rectangle of an image is replaced by noise (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Alpha of mixup (arXiv 1710.09412), one lambda a batch; with cutmix too, every batch draws one of the two. 0: off."""
    cutmix: float = 0.0
    """Alpha of cutmix (arXiv 1905.04899). 0: off."""
    resolutions: tuple[float, ...] = ()
    """Every batch is trained at one of these parts of the network's resolution, rounded to its total stride; empty: at its own."""
    teacher: str | None = None
    """Distil from this network (arXiv 1503.02531): a folder of `lowsearch train`, or `timm:NAME:FILE`, timm's with a file of weights."""
    teacher_weight: float = 0.5
    """Part of the loss that is the teacher's; the rest is the labels'."""
    teacher_temperature: float = 1.0
    """Both outputs are divided by it; the teacher's loss is multiplied by its square."""
    teacher_hash: str = ""
    """Ten hexadecimal digits of the SHA-256 of the teacher and its weights; computed here, and in the hash instead of its place."""

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
        _check("loss", self.loss, self.loss in get_args(Loss), f"one of {', '.join(get_args(Loss))}")
        _check("random_crop", self.random_crop, self.random_crop is None or 0 < self.random_crop <= 1, "in (0, 1], or None")
        known = self.auto_augment is None or _AUTO_AUGMENT.fullmatch(self.auto_augment) is not None
        _check("auto_augment", self.auto_augment, known, "a string of timm's, such as rand-m9-n2-mstd0.5-inc1, original or augmix-m3-w3")
        _check("erasing", self.erasing, 0 <= self.erasing <= 1, "in [0, 1]")
        _check("mixup", self.mixup, self.mixup >= 0, "0 or more")
        _check("cutmix", self.cutmix, self.cutmix >= 0, "0 or more")
        _check("batch_size", self.batch_size, not self.mixes or self.batch_size % 2 == 0, "even: mixup pairs the images of a batch")
        _check("resolutions", self.resolutions, all(0 < part <= 1 for part in self.resolutions), "parts in (0, 1] of the resolution")
        _check("teacher_weight", self.teacher_weight, 0 < self.teacher_weight <= 1, "in (0, 1]")
        _check("teacher_temperature", self.teacher_temperature, self.teacher_temperature > 0, "positive")
        if self.teacher is None:  # Fields without effect hold their default: equal recipes are equal values.
            for name in ("teacher_weight", "teacher_temperature", "teacher_hash"):
                object.__setattr__(self, name, _LATER[name])
        else:
            name, files = teacher_files(self.teacher)
            # Absolute, or a study that is resumed from another folder would lose it.
            place = f"{_TIMM_TEACHER}{name}:{files[0].resolve()}" if name else str(Path(self.teacher).resolve())
            object.__setattr__(self, "teacher", place)
            object.__setattr__(self, "teacher_hash", _hash_of_files(name, files))

    @property
    def recipe_hash(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of all that influences the weights: every value but the name and `evaluate_at`."""
        values = {**dataclasses.asdict(self), "engine": ENGINE_VERSION}
        del values["name"], values["evaluate_at"], values["teacher"]
        values = {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}
        if self.random_crop or self.auto_augment or self.erasing:
            values["drawn"] = "image by image"  # Before, one draw followed another through the batch.
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def mixes(self) -> bool:
        """Whether a batch's images, and with them their labels, are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` inverts it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`; fields left out hold their default. Raises UsageError on unknown fields and wrong values."""
        missing = [name for name in ("name", "epochs") if name not in values]
        if missing:
            raise UsageError(f"recipe: {missing[0]!r} is missing", hint=f"give it, or build on a recipe: base: {next(iter(RECIPES))}")
        return cls(**{name: _typed(name, value) for name, value in values.items()})

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with `values` for some fields; under a name of its own where that changes the weights and `values` has none."""
        changed = dataclasses.replace(self, **{name: _typed(name, value) for name, value in values.items()})
        if changed.recipe_hash == self.recipe_hash or "name" in values:
            return changed
        return dataclasses.replace(changed, name=f"{self.name}-{changed.recipe_hash[:6]}")

    def n_images(self, available: int) -> int:
        """Training images used where `available` are there."""
        return available if self.train_images is None else min(self.train_images, available)

    def steps_per_epoch(self, available: int) -> int:
        """Full batches in one pass; the images of an incomplete last batch sit out that epoch."""
        return max(1, self.n_images(available) // self.batch_size)

    def total_steps(self, available: int) -> int:
        """Optimizer steps of the full schedule."""
        return self.epochs * self.steps_per_epoch(available)


_FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
_LATER = {name: _FIELDS[name].default for name in tuple(_FIELDS)[tuple(_FIELDS).index("loss") :]}


def micro() -> Recipe:
    """The full schedule of micro networks on small images: tens of CPU seconds a network.

    No augmentation: tried by hand, mirroring and shifting cost accuracy in so few passes; no numbers were kept.
    """
    return Recipe(name="micro", epochs=4, ema_decay=0.95, flip=False, shift=0.0)


def small_images() -> Recipe:
    """A long schedule for images of 32 to 64 px, as CIFAR-10 or Tiny-ImageNet: customary values, not tuned."""
    return Recipe(
        name="small-images", epochs=100, learning_rate=2e-3, warmup_fraction=0.05, beta2=0.999, ema_decay=0.999, drop_path=0.05,
        flip=True, shift=0.125, auto_augment="rand-m9-n2-mstd0.5-inc1", erasing=0.25, mixup=0.2, cutmix=1.0,
    )  # fmt: skip


def fine_tune() -> Recipe:
    """For networks that start from published weights: a short schedule at a tenth of the learning rate. Customary values, not tuned."""
    return Recipe(
        name="fine-tune", epochs=20, batch_size=64, learning_rate=3e-4, beta2=0.999, ema_decay=0.99, drop_path=0.05, shift=0.0,
        random_crop=0.35, auto_augment="rand-m5-n2-mstd0.5-inc1", erasing=0.1,
    )  # fmt: skip


def lowformer_imagenet() -> Recipe:
    """The ImageNet recipe of LowFormer-B0 and B1 (arXiv 2409.03460), as its authors' released configurations have it.

    AdamW, weight decay 0.1, gradients clipped to norm 2, 1e-3 at 512 images, 20 epochs of warm-up, then 300 of a cosine to zero; binary
    cross-entropy on labels smoothed by 0.1; mixup and cutmix in turn (alpha 0.1); crops of 8 to 100 % of the area, mirroring,
    RandAugment with one operation of magnitude 3; batches at 128, 160, 192 or 224 px; drop path 0.05; an average of weights, 0.9998.
    The larger networks differ: mixup and cutmix 0.2 to 0.3, drop path 0.1, RandAugment of two operations of magnitude 5 or 6, erasing 0.2.

    Left open there, and chosen here: the noise of RandAugment's magnitude (none) and that its operations grow with it (`inc1`). Done
    otherwise: crops are taken from centre squares that were reduced to at most 224 px when the images were read, not from the originals, so
    that they show less of an image and enlarge what they show; there is no mixed precision; drop path does not rise with the schedule,
    the average warms up by steps, one-dimensional weights alone are not decayed, and nothing starts again when accuracy falls. Missing: the
    re-estimation of BatchNorm before an evaluation (the average holds its statistics) and, of B3, E2 and E3, the distillation from the
    average.
    """
    return Recipe(
        name="lowformer-imagenet", epochs=320, batch_size=512, learning_rate=1e-3, warmup_fraction=20 / 320, weight_decay=0.1, beta2=0.999,
        grad_clip=2.0, label_smoothing=0.1, flip=True, shift=0.0, ema_decay=0.9998, drop_path=0.05, loss="bce", random_crop=0.08,
        auto_augment="rand-m3-n1-inc1", mixup=0.1, cutmix=0.1, resolutions=(128 / 224, 160 / 224, 192 / 224, 1.0),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {
    "micro": micro,
    "small-images": small_images,
    "fine-tune": fine_tune,
    "lowformer-imagenet": lowformer_imagenet,
}


def recipe(spec: str) -> Recipe:
    """The recipe that `spec` means: a name of RECIPES or a YAML file, and after it changed fields, as `micro,epochs=12,mixup=0.2`.

    A YAML file holds the fields by name, and may have `base`, the name of the recipe that it changes; its own name is that of the file
    where it states none. Raises UsageError with the known names.
    """
    start, *changes = re.split(r",(?=\w+=)", spec)
    found = _from_file(Path(start)) if Path(start).suffix in (".yaml", ".yml") else _named(start)
    return found.changed(assignments(changes))


def recipe_spec(start: str, changes: Sequence[str]) -> str:
    """`start` and `changes`, each `field=value`, as one string for `recipe`."""
    assignments(changes)
    return ",".join([start, *changes])


def assignments(changes: Sequence[str]) -> dict[str, Any]:
    """Field -> value of texts `field=value`, the value read as YAML. Raises UsageError on a text of another form."""
    return dict(_assignment(text) for text in changes)


def _named(name: str) -> Recipe:
    if name not in RECIPES:
        close = get_close_matches(name, RECIPES, n=1)
        guess = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(RECIPES)}; or a file such as recipe.yaml"
        raise UsageError(f"unknown recipe {name!r}", hint=guess)
    return RECIPES[name]()


def _from_file(path: Path) -> Recipe:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no recipe at {path}", hint=f"give a YAML file, or one of: {', '.join(RECIPES)}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"recipe {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"recipe {path} holds {type(values).__name__}, expected fields by name", hint="lowsearch recipes lists them")
    try:
        named = {"name": path.stem, **values}
        base = named.pop("base", None)
        return Recipe.from_dict(named) if base is None else _named(str(base)).changed(named)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from error


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"recipe: {text!r} sets nothing", hint="--recipe-set epochs=12")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe: {name} is {value!r}, which cannot be read", hint="--recipe-set epochs=12") from error


_EXPECTED: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
    "Loss": ((str,), "text"),
    "tuple[float, ...]": ((list, tuple), "a list of numbers"),
}


def _typed(name: str, value: Any) -> Any:
    """`value` as the type of field `name`, so that equal values have one hash. Raises UsageError."""
    if name not in _FIELDS:
        close = get_close_matches(name, _FIELDS, n=1)
        raise UsageError(f"recipe: unknown field {name!r}", hint=f"did you mean {close[0]!r}?" if close else "lowsearch recipes lists them")
    kind, _, optional = str(_FIELDS[name].type).partition(" | ")
    if optional and value is None:
        return None
    if kind == "float" and isinstance(value, str):  # YAML takes 3e-3 for text.
        with_point = re.fullmatch(r"[-+]?[0-9.]+[eE][-+]?[0-9]+", value)
        value = float(value) if with_point else value
    types, expected = _EXPECTED[kind]
    parts: Any = value if kind.startswith("tuple") and isinstance(value, list | tuple) else []
    good = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    good = good and all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts)
    _check(name, value, good, expected + (", or null" if optional else ""))
    if kind.startswith("tuple"):
        return tuple(map(float, parts))
    return float(cast(float, value)) if kind == "float" else value


def teacher_files(teacher: str) -> tuple[str, list[Path]]:
    """(timm's name, or empty for a network of ours; the files that make `teacher`). Raises UsageError where there are none."""
    name = ""
    if teacher.startswith(_TIMM_TEACHER):
        name, _, file = teacher.removeprefix(_TIMM_TEACHER).partition(":")
        files = [Path(file)] if file else []
    else:
        files = [Path(teacher) / "arch.json", Path(teacher) / "model.safetensors"]
    absent = next((file for file in files if not file.is_file()), None)
    if absent is not None or not files:
        hint = "a folder that `lowsearch train` wrote, or timm:NAME:FILE with a file of weights"
        why = f", but {absent} is no file" if absent else ", which names no file"
        raise UsageError(f"recipe: teacher is {teacher!r}{why}", hint=hint)
    return name, files


def _hash_of_files(name: str, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(name.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise UsageError(f"recipe: {name} is {value!r}, expected {expected}")
