"""Train one network on one data set by one recipe, resumably and reproducibly.

The same (arch, data, recipe, seed, torch version, one thread) gives the same weights bit for bit, whether the training ran through or
was killed and resumed any number of times, and whatever was asked of it in between (`until`): what a step draws at random is keyed by
(seed, step), and a checkpoint holds everything else. On a GPU it draws the same, but sums in an order that is not fixed, so weights differ
by rounding from one run to the next; so do they where several processes share the batches (`distributed`). Read by `accuracy.ladder` and by
whoever trains finalists.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowsearch.arch import Arch
from lowsearch.data import IMAGE_MEAN, IMAGE_STD, ImageData, Split
from lowsearch.errors import DataError, UsageError
from lowsearch.memory import keep_freed_memory
from lowsearch.train.augment import Augmentation, drawing_from
from lowsearch.train.checkpoint import load_checkpoint, save_tensors
from lowsearch.train.distributed import Ranks, require_shares
from lowsearch.train.feed import Feed, Images, as_tensor, normalised
from lowsearch.train.recipe import Recipe, teacher_files
from lowsearch.train.recorded import Recorded
from lowsearch.train.rung import Rung

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINTS_PER_SCHEDULE = 20
"""A killed training loses at most this part of its schedule."""
_EVALUATION_BATCH = 250
_MODEL = 3  # What a stream of random numbers is for; the others are the feed's.

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The state of a training at one moment."""

    fraction: float
    """Part of the full schedule done; of a training on a rung apart, what it has taken of the full training's computation."""
    step: int
    train_loss: float
    """Mean over the steps since the point before."""
    val_accuracy: float
    val_loss: float
    """Mean cross-entropy of the validation images, without label smoothing."""
    cpu_seconds: float
    """Process CPU time since the start, resumed parts added up."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OtherNetwork:
    """A network from elsewhere, to be trained as ours are: what a training asks of an `Arch`, and how to build it."""

    arch_id: str
    """Names the network in checkpoints; the same name is taken for the same network."""
    resolution_px: int
    num_classes: int
    total_stride: int
    """`resolution_px` divides by it; a recipe of several resolutions draws multiples of it."""
    build: Callable[[int, float], nn.Module]
    """Called with a seed, which determines the initial weights, and the recipe's drop path."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainResult:
    """A training up to a fraction of its schedule."""

    arch: Arch | OtherNetwork
    recipe: Recipe
    seed: int
    fraction: float
    curve: tuple[CurvePoint, ...]
    diverged: bool
    """The loss stopped being a number; from there on every accuracy is that of guessing."""
    weights: dict[str, Tensor] = field(repr=False)
    """State dict of `build_model(arch)`: the evaluated weights (the moving average where the recipe has one)."""

    @property
    def val_accuracy(self) -> float:
        return self.curve[-1].val_accuracy

    @property
    def cpu_seconds(self) -> float:
        return self.curve[-1].cpu_seconds

    def save_weights(self, path: Path) -> None:
        """Write the weights as safetensors; `build_model(arch, pretrained=path)` reads them."""
        save_tensors(path, self.weights, {"arch_id": self.arch.arch_id, "recipe": self.recipe.name, "seed": self.seed})

    def model(self) -> nn.Module:
        """The trained network, in evaluation mode."""
        model = _built(self.arch, seed=self.seed)
        model.load_state_dict(self.weights)
        return model.eval()


def train(
    arch: Arch | OtherNetwork,
    data: ImageData,
    recipe: Recipe,
    *,
    seed: int,
    until: float = 1.0,
    rung: Rung | None = None,
    checkpoint: Path | None = None,
    init: Mapping[str, Tensor] | None = None,
    progress: Callable[[float], None] | None = None,
    device: str = "cpu",
    ranks: Ranks | None = None,
    loaders: int | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> TrainResult:
    """Train `arch` up to `until` of the full schedule, going on from `checkpoint` where it exists, and writing it on the way.

    `rung`: a rung apart, whose shorter schedule, images and resolution take the place of the recipe's.
    `init`: the state dict to start from, instead of random weights. `progress` hears the fraction of the schedule done after every step.
    `ranks`: the processes that train it together; all call this with the same arguments, and all get the result. `loaders`: processes
    that prepare batches ahead, by default none on a CPU and up to eight where a GPU would wait for crops or images on disk; they change
    nothing but the time, and theirs is in no `cpu_seconds`.
    Raises DataError when the data has other classes than `arch`, StudyError when the checkpoint belongs to another training,
    CheckpointError when the recipe's teacher does not fit the data, and UsageError when a batch is too small for all `ranks` or the
    recipe asks of an `OtherNetwork` what only ours have. On the CPU the process keeps from then on what memory it frees
    (`memory.keep_freed_memory`).
    """
    if arch.num_classes != len(data.classes):
        raise DataError(
            f"the network has {arch.num_classes} classes, {data.name} has {len(data.classes)}",
            hint="load the search space with_num_classes of the data",
        )
    if not 0 < until <= 1:
        raise UsageError(f"until is {until!r}, expected a fraction of the schedule in (0, 1]")
    import torch

    if device == "cpu":
        keep_freed_memory()
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        run = _Run(
            arch, data, recipe, seed=seed, checkpoint=checkpoint, device=device, cpu_clock=cpu_clock, rung=rung, init=init, ranks=ranks,
            loaders=loaders,
        )  # fmt: skip
        return run.to(until, progress)


def can_train(device: str) -> bool:
    """Whether this torch can train on `device`: `cpu`, or `cuda` where it sees a GPU."""
    import torch

    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def require_trainable(device: str) -> None:
    """Raise UsageError where `can_train` says no."""
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} cannot train", hint="cpu or cuda")
    if not can_train(device):
        raise UsageError("no CUDA device that this torch can use is attached", hint="train on the cpu")


def check_recipe(recipe: Recipe, *, num_classes: int) -> None:
    """Raise UsageError or CheckpointError where timm refuses the recipe's strings, or its teacher does not fit `num_classes`."""
    if Augmentation.wanted(recipe):
        Augmentation(recipe, resolution_px=32, total_stride=32, num_classes=num_classes)
    if recipe.teacher is not None:
        _teacher(recipe.teacher, num_classes)


def evaluate(model: nn.Module, split: Split, resolution_px: int, *, device: str = "cpu", ranks: Ranks | None = None) -> float:
    """Accuracy of `model` on the images of `split`, resized to `resolution_px`, computed on `device`, where `model` is moved.

    `ranks`: the processes that share the images; each has the same `model`.
    """
    return _score(model.to(device), Images(split.images, resolution_px, device), as_tensor(split.labels).to(device), ranks)[0]


def hash_of_init(init: Mapping[str, Tensor] | None) -> str | None:
    """Ten hexadecimal digits of the SHA-256 of the weights that a training starts from; None for random ones."""
    if init is None:
        return None
    digest = hashlib.sha256()
    for name, value in sorted(init.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:10]


class _Run:
    """A training under way: the network, its optimizer, and where it stands."""

    def __init__(
        self,
        arch: Arch | OtherNetwork,
        data: ImageData,
        recipe: Recipe,
        *,
        seed: int,
        checkpoint: Path | None,
        device: str,
        cpu_clock: Callable[[], float],
        rung: Rung | None = None,
        init: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
        loaders: int | None = None,
    ) -> None:
        import torch

        self.arch, self.recipe, self.seed, self.checkpoint, self.device, self.cpu_clock = arch, recipe, seed, checkpoint, device, cpu_clock
        self.ranks = ranks or Ranks()
        assert rung is None or rung.apart, "a plain rung is a part of the whole schedule: `until`"
        rung = rung or Rung(1.0)
        n_images = rung.n_images(recipe.n_images(len(data.train)), len(data.classes))
        self.steps_per_epoch = recipe.steps_per_epoch(n_images)
        self.total_steps = _step_of(rung.fraction, recipe.total_steps(n_images))
        self.part = float(rung)
        resolution_px = rung.resolution_px(arch.resolution_px, arch.total_stride)
        self.batch_size = min(recipe.batch_size, n_images)
        self.batch_size -= self.batch_size % 2 if recipe.mixes else 0  # Mixing takes pairs.
        require_shares(self.batch_size, self.ranks.size)
        # A crop is taken from the stored image and resampled once; everything else works on images of the network's resolution.
        train_px = data.image_px if recipe.random_crop else resolution_px
        self.train_labels = as_tensor(data.train.labels[:n_images]).to(device)
        self.val_images = Images(data.val.images, resolution_px, device)
        self.val_labels = as_tensor(data.val.labels).to(device)
        self.identity = {
            "arch_id": arch.arch_id, "recipe": recipe.name, "recipe_hash": recipe.recipe_hash, "data_hash": data.data_hash, "seed": seed,
            "init": hash_of_init(init), "rung": str(rung) if rung.apart else None,
        }  # fmt: skip
        self.augmentation = None
        if Augmentation.wanted(recipe):
            self.augmentation = Augmentation(
                recipe, resolution_px=resolution_px, total_stride=arch.total_stride, num_classes=arch.num_classes
            )
        self.feed = Feed(
            data.train.images[:n_images], train_px, recipe, self.augmentation, seed=seed, batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch, ranks=self.ranks, device=device, loaders=loaders,
        )  # fmt: skip
        self.teacher = None if recipe.teacher is None else _teacher(recipe.teacher, arch.num_classes).to(device)

        model = _built(arch, seed=seed, drop_path=recipe.drop_path, mlp_dropout=recipe.mlp_dropout)
        if init is not None:
            model.load_state_dict(init)
        model = self.ranks.share_norms(model)
        # Channels last suits a CPU's convolutions. In fp32: tried by hand, bfloat16 was no faster, as these layers are too small.
        self.model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)
        # Dropout draws anew in every step, which a recording would have to be told; the recipes of small networks have none. Batches
        # of several resolutions would need a recording each. Augmentation and mixing are done before a step, and a teacher is recorded.
        # What processes say to each other is in no recording.
        recorded = device != "cpu" and self.ranks.size == 1 and recipe.drop_path == recipe.mlp_dropout == 0 and not recipe.resolutions
        self._gradients = Recorded(self._compute_gradients, torch.cuda) if recorded else self._compute_gradients
        self.average = None if recipe.ema_decay is None else {k: v.detach().clone() for k, v in self._state().items()}

        self.step = 0
        self.curve: list[CurvePoint] = []
        self.diverged = False
        self.loss_sum, self.loss_steps = 0.0, 0
        self.cpu_seconds_before = 0.0
        self.cpu_started = cpu_clock()
        if checkpoint is not None:
            self._resume(checkpoint)

    def to(self, until: float, progress: Callable[[float], None] | None) -> TrainResult:
        """Go on to `until` of the schedule. A training that is already further is returned as far as it is."""
        stop = _step_of(until, self.total_steps)
        evaluated = {_step_of(fraction, self.total_steps) for fraction in self.recipe.evaluate_at if self.part == 1} | {stop}
        saved = {_step_of(i / CHECKPOINTS_PER_SCHEDULE, self.total_steps) for i in range(1, CHECKPOINTS_PER_SCHEDULE + 1)}
        batches = self.feed.steps(self.step, stop)
        while self.step < stop:
            if not self.diverged:
                self._train_step(next(batches))
            self.step += 1
            if self.step in evaluated:
                self._evaluate()
            if self.step in saved or self.step in evaluated:
                self._save()
            if progress is not None:
                progress(self._fraction)
        if not any(point.step == self.step for point in self.curve):  # resumed beyond `stop`, between two evaluations
            self._evaluate()
        return TrainResult(
            arch=self.arch, recipe=self.recipe, seed=self.seed, fraction=self._fraction,
            curve=tuple(self.curve), diverged=self.diverged, weights=portable(self._evaluated_state()),
        )  # fmt: skip

    @property
    def _fraction(self) -> float:
        return self.part * (self.step / self.total_steps)

    def _train_step(self, images_BHWC: Tensor) -> None:
        import torch

        recipe = self.recipe
        targets = self.train_labels[as_tensor(self.feed.places(self.step)).to(self.device)]
        x_BCHW = normalised(images_BHWC)
        if self.augmentation is not None:
            with drawing_from(self.feed.draws(self.step)):
                x_BCHW, targets = self.augmentation.mixed(x_BCHW, targets, self.feed.keys(self.step)[1].tolist())
        # Of dropout and stochastic depth, which every process draws for its own images.
        key = [self.seed, _MODEL, self.step] + [self.ranks.rank] * bool(self.ranks.rank)
        torch.manual_seed(int(np.random.default_rng(key).integers(2**63)))

        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(self.step, self.total_steps, recipe.warmup_fraction)
        loss, norm = self._gradients(x_BCHW, targets)
        loss_value, norm_value = torch.stack([loss, norm]).tolist()  # A GPU is waited for once.
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            if self.ranks.rank == 0:
                where = (self.arch.arch_id, self.step, self.total_steps, recipe.name, self.seed)
                _log.warning("%s diverged at step %d of %d (recipe %s, seed %d)", *where)
            self.diverged = True
            return
        self.optimizer.step()
        self._update_average()
        self.loss_sum += loss_value
        self.loss_steps += 1

    def _compute_gradients(self, x_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the batch's clipped gradients in the parameters; its loss, and the gradients' norm before it was clipped."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(x_BCHW)
        loss = _loss(logits, targets, self.recipe)
        if self.teacher is not None:
            weight = self.recipe.teacher_weight
            loss = (1 - weight) * loss + weight * _distillation(logits, self.teacher(x_BCHW), self.recipe.teacher_temperature)
        loss = loss * (len(x_BCHW) / self.batch_size)
        loss.backward()
        loss = loss.detach()
        self.ranks.sum([loss, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        return loss, torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)

    def _update_average(self) -> None:
        import torch
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        if self.average is None or self.recipe.ema_decay is None:
            return
        # The decay warms up, or the first weights, which know nothing, would weigh on a short training.
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        state = self._state()
        floating = [name for name, value in self.average.items() if value.is_floating_point()]
        with torch.no_grad():
            # All at once: a GPU has a launch, not one for every tensor.
            get_ema_multi_avg_fn(decay)([self.average[name] for name in floating], [state[name] for name in floating], None)
            for name in self.average.keys() - set(floating):
                self.average[name].copy_(state[name])

    def _evaluate(self) -> None:
        if self.diverged:
            accuracy, loss = 1 / self.arch.num_classes, math.log(self.arch.num_classes)
        else:
            accuracy, loss = self._score_evaluated_state()
        self.curve.append(
            CurvePoint(
                fraction=self._fraction,
                step=self.step,
                val_accuracy=accuracy,
                val_loss=loss,
                train_loss=self.loss_sum / self.loss_steps if self.loss_steps else math.log(self.arch.num_classes),
                cpu_seconds=self._cpu_seconds(),
            )  # fmt: skip
        )
        self.loss_sum, self.loss_steps = 0.0, 0

    def _score_evaluated_state(self) -> tuple[float, float]:
        with self._averaged_weights():
            return _score(self.model, self.val_images, self.val_labels, self.ranks)

    def _averaged_weights(self) -> Any:
        return nullcontext() if self.average is None else _Swapped(self.model, self.average)

    def _state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def _evaluated_state(self) -> dict[str, Tensor]:
        return self._state() if self.average is None else self.average

    def _cpu_seconds(self) -> float:
        """Of all processes, which all have to ask."""
        return self.cpu_seconds_before + self.ranks.total(self.cpu_clock() - self.cpu_started)[0]

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        cpu_seconds = self._cpu_seconds()
        if self.ranks.rank != 0:
            return
        tensors = {f"model.{name}": value for name, value in self._state().items()}
        for index, parameter in enumerate(self.model.parameters()):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{name}"] = value
        if self.average is not None:
            tensors |= {f"average.{name}": value for name, value in self.average.items()}
        standing = {
            "step": self.step, "total_steps": self.total_steps, "diverged": self.diverged, "loss_sum": self.loss_sum,
            "loss_steps": self.loss_steps, "cpu_seconds": cpu_seconds, "curve": [_point_to_list(p) for p in self.curve],
        }  # fmt: skip
        save_tensors(self.checkpoint, portable(tensors), {**self.identity, **standing})

    def _resume(self, path: Path) -> None:
        import torch

        loaded = self.ranks.agreed(load_checkpoint(path, self.identity) if self.ranks.rank == 0 else None)
        if loaded is None:
            return
        tensors, standing = loaded
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for index, parameter in enumerate(self.model.parameters()):
            prefix = f"optimizer.{index}."
            saved = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            # Into memory laid out like the parameter, as the optimizer would have made it.
            self.optimizer.state[parameter] = {
                name: value.to(parameter.device) if name == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value)
                for name, value in saved.items()
            }
        for name, value in (self.average or {}).items():
            value.copy_(tensors[f"average.{name}"])
        self.step, self.diverged = standing["step"], standing["diverged"]
        self.loss_sum, self.loss_steps = standing["loss_sum"], standing["loss_steps"]
        self.cpu_seconds_before = standing["cpu_seconds"]
        self.curve = [_point_from_list(values) for values in standing["curve"]]


class _Swapped:
    """While entered, `model` holds the weights of `state`."""

    def __init__(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        self.model, self.state = model, state

    def __enter__(self) -> None:
        self.own = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.state)

    def __exit__(self, *_: object) -> None:
        self.model.load_state_dict(self.own)


def _built(arch: Arch | OtherNetwork, *, seed: int, drop_path: float = 0.0, mlp_dropout: float = 0.0) -> nn.Module:
    if isinstance(arch, OtherNetwork):
        if mlp_dropout:
            hint = "--recipe-set mlp_dropout=0"
            raise UsageError(f"the recipe has mlp_dropout {mlp_dropout}, which {arch.arch_id} does not know", hint=hint)
        return arch.build(seed, drop_path)
    from lowsearch.model.lowformer import build_model

    return build_model(arch, seed=seed, drop_path=drop_path, mlp_dropout=mlp_dropout)


def _step_of(fraction: float, total_steps: int) -> int:
    return max(1, round(fraction * total_steps))


def learning_rate_factor(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0; `step` counts from 0 and is taken at its middle."""
    done = (step + 0.5) / total_steps
    if done < warmup_fraction:
        return done / warmup_fraction
    return 0.5 * (1 + math.cos(math.pi * (done - warmup_fraction) / (1 - warmup_fraction)))


def _loss(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Mean loss of `logits` (B, classes) for `targets`: class indices (B,), or shares (B, classes)."""
    import torch.nn.functional as F

    if recipe.loss == "cross-entropy":
        return F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing)
    classes = logits.shape[1]
    shares = F.one_hot(targets, classes).to(logits.dtype) if targets.ndim == 1 else targets
    return F.binary_cross_entropy_with_logits(logits, shares * (1 - recipe.label_smoothing) + recipe.label_smoothing / classes)


def _distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Divergence of the teacher's probabilities from the network's (arXiv 1503.02531), in nats times the temperature's square."""
    import torch.nn.functional as F

    ours, theirs = (F.log_softmax(values / temperature, dim=1) for values in (logits, taught))
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def _teacher(teacher: str, num_classes: int) -> nn.Module:
    from lowsearch.model.teacher import own_teacher, timm_teacher

    name, files = teacher_files(teacher)
    if name:
        return timm_teacher(name, files[0], num_classes=num_classes, mean=IMAGE_MEAN, std=IMAGE_STD)
    return own_teacher(files[0], files[1], num_classes=num_classes, mean=IMAGE_MEAN, std=IMAGE_STD)


def _score(model: nn.Module, images: Images, labels: Tensor, ranks: Ranks | None = None) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) of `model` on images of its own resolution, whose batches `ranks` deal out."""
    import torch
    import torch.nn.functional as F

    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    correct, loss = 0, 0.0
    with torch.inference_mode():
        for start in range(ranks.rank * _EVALUATION_BATCH, len(labels), ranks.size * _EVALUATION_BATCH):
            batch = slice(start, start + _EVALUATION_BATCH)
            logits = model(normalised(images.at(batch)))
            correct += int((logits.argmax(1) == labels[batch]).sum())
            loss += float(F.cross_entropy(logits, labels[batch], reduction="sum"))
    model.train(was_training)
    correct, loss = ranks.total(correct, loss)
    return correct / len(labels), loss / len(labels)


def portable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU in plain memory order, as safetensors wants them."""
    import torch

    return {
        name: value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True).contiguous() for name, value in tensors.items()
    }


def _point_to_list(point: CurvePoint) -> list[float]:
    return [point.fraction, point.step, point.train_loss, point.val_accuracy, point.val_loss, point.cpu_seconds]


def _point_from_list(values: list[Any]) -> CurvePoint:
    fraction, step, train_loss, val_accuracy, val_loss, cpu_seconds = values
    return CurvePoint(
        fraction=fraction, step=step, train_loss=train_loss, val_accuracy=val_accuracy, val_loss=val_loss, cpu_seconds=cpu_seconds
    )
