"""Train all networks of a space at once, as one supernet, and take single ones out with their weights.

A step trains several networks on the same images (sandwich rule, BigNAS, arXiv 2003.11142): the largest on the labels, the smallest and
some random ones on what the largest just said (in-place distillation). The largest of a space can cost ten times what anybody wants of it,
and nearly all of the time; within a limit on MACs no network is the largest, and the largest of a handful is drawn anew in every step.
What is drawn is keyed by (seed, step). So a training that was killed and resumed ends with the same weights, and under torchrun all
processes train the same networks, each on its share of the images (`distributed`).
`docs/formats.md` describes the folder. Read by `accuracy.supernet`.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowsearch import cost, locations
from lowsearch.arch import Arch
from lowsearch.data import ImageData
from lowsearch.errors import DataError, StudyError, UsageError
from lowsearch.files import write_atomically
from lowsearch.memory import keep_freed_memory
from lowsearch.space import SearchSpace
from lowsearch.train.checkpoint import load_checkpoint, load_tensors, save_tensors
from lowsearch.train.distributed import Ranks, require_shares
from lowsearch.train.engine import learning_rate_factor, portable
from lowsearch.train.feed import as_tensor, augmented, normalised, resized
from lowsearch.train.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lowsearch.model.elastic import Supernet

SCHEMA = 1
PLAN, WEIGHTS, CHECKPOINT = "supernet.json", "model.safetensors", "checkpoint.safetensors"
CHECKPOINTS_PER_SCHEDULE = 50
N_RANDOM = 2
"""Random networks in a step, beside the largest and the smallest."""
N_LARGE = 16
"""Within a limit on MACs: the largest of so many random networks teaches."""
STATISTICS_IMAGES = 2000
"""Training images that BatchNorm's statistics are estimated from."""
_STATISTICS_BATCH = 250
_TIMED_STEPS, _LEAST_STEPS = 4, 20
_ORDER, _AUGMENTATION, _NETWORKS = 1, 2, 4  # what a random stream is for

Progress = Callable[[int, int, str], None]


def supernet_recipe() -> Recipe:
    """What a supernet is trained by: of a Recipe the fields that `SupernetPlan.recipe` names."""
    return Recipe(name="supernet", epochs=1, batch_size=64, learning_rate=2e-3)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupernetPlan:
    """Everything that determines the weights of a supernet."""

    space: str
    """The YAML of the space."""
    num_classes: int
    data: str
    data_hash: str
    steps: int
    seed: int = 0
    n_random: int = N_RANDOM
    max_macs: float | None = None
    """Networks of more are not trained; None: all are."""
    processes: int = 1
    """That share every batch: BatchNorm sees the images of one."""
    recipe: Recipe = dataclasses.field(default_factory=supernet_recipe)
    """Of it count `train_images`, `batch_size`, `learning_rate`, `warmup_fraction`, `weight_decay`, `beta2`, `grad_clip`,
    `label_smoothing`, `flip` and `shift`. Whatever else it says (mixup, crops, an average of weights, a teacher, ...) has no effect;
    `steps` stands for `epochs`."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.n_random < 0 or self.processes < 1:
            raise UsageError(f"a supernet needs at least one step and one process, not {self.steps} and {self.processes}")
        require_shares(self.recipe.batch_size, self.processes)

    @property
    def supernet_hash(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of all that influences the weights."""
        values = {**self.to_dict(), "recipe": self.recipe.recipe_hash}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    def search_space(self) -> SearchSpace:
        """The space, for the classes of the data."""
        return SearchSpace.from_yaml(self.space, origin="the supernet's space").with_num_classes(self.num_classes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; `from_dict` inverts it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA, **fields, "recipe": self.recipe.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SupernetPlan:
        """Inverse of `to_dict`. Raises KeyError, TypeError or ValueError on anything else."""
        fields = dict(values)
        if (schema := fields.pop("schema")) != SCHEMA:
            raise ValueError(f"schema {schema!r}, this version reads {SCHEMA}")
        recipe: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.pop("recipe").items()}
        return cls(**fields, recipe=Recipe(**recipe))


def read_plan(folder: Path) -> SupernetPlan | None:
    """The plan of the supernet in `folder`, None where there is none. Raises StudyError on a damaged one."""
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        return SupernetPlan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise StudyError(f"{path} is damaged: {error}", hint="remove its folder to train the supernet again") from error


def find_supernet(name: str) -> tuple[Path, SupernetPlan]:
    """The folder and the plan of a supernet by its name or folder. Raises StudyError where there is none."""
    found = Path(name) if (Path(name) / PLAN).is_file() else locations.find("supernets", name)
    plan = read_plan(found) if found is not None else None
    if found is None or plan is None:
        known = sorted({p.parent.name for folder in locations.folders("supernets") for p in folder.glob(f"*/{PLAN}")})
        raise StudyError(f"no supernet {name!r}", hint=f"known: {', '.join(known)}" if known else "lowsearch supernet train")
    return found, plan


def train_supernet(
    plan: SupernetPlan, data: ImageData, folder: Path, *, device: str = "cpu", ranks: Ranks | None = None, progress: Progress | None = None
) -> Supernet:
    """Train by `plan`, going on from the checkpoint in `folder`, and leave the weights there; a finished training is read.

    Raises StudyError where `folder` holds another supernet, or where the loss stopped being a number.
    """
    import torch

    ranks = ranks or Ranks()
    if plan.data_hash != data.data_hash:
        raise DataError(f"the supernet was made for other images than {data.name} holds now", hint="give another --name")
    stored = ranks.agreed(read_plan(folder) if ranks.rank == 0 else None)
    if stored is not None and stored != plan:
        field = next(f.name for f in dataclasses.fields(plan) if getattr(stored, f.name) != getattr(plan, f.name))
        raise StudyError(f"supernet {folder.name!r} was made with another {field}", hint="give another --name")
    if ranks.rank == 0:
        write_atomically(folder / PLAN, json.dumps(plan.to_dict(), indent=1) + "\n")
    if ranks.agreed((folder / WEIGHTS).exists()):
        return load_supernet(folder, device=device, ranks=ranks)
    if device == "cpu":
        keep_freed_memory()
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        training = _Training(plan, data, folder, device=device, ranks=ranks)
        training.run(progress)
    return training.supernet


def load_supernet(folder: Path, *, device: str = "cpu", ranks: Ranks | None = None) -> Supernet:
    """The finished supernet in `folder`, which the first of `ranks` reads. Raises StudyError where there is none."""
    from lowsearch.model.elastic import Supernet

    ranks = ranks or Ranks()
    plan, weights = ranks.agreed(_finished(folder) if ranks.rank == 0 else None)
    supernet = Supernet(plan.search_space(), device=device)
    supernet.load(weights)
    return supernet


def _finished(folder: Path) -> tuple[SupernetPlan, dict[str, Tensor]]:
    plan = read_plan(folder)
    if plan is None or not (folder / WEIGHTS).exists():
        what = "no supernet" if plan is None else "a supernet whose training is not finished"
        raise StudyError(f"{folder} holds {what}", hint=f"lowsearch supernet train --name {folder.name}")
    weights, note = load_tensors(folder / WEIGHTS)
    if note.get("supernet_hash") != plan.supernet_hash:
        raise StudyError(f"{folder / WEIGHTS} is not of the plan beside it", hint="remove it to train the supernet again")
    return plan, weights


def require_trained(plan: SupernetPlan, arch: Arch, name: str) -> None:
    """Raise StudyError where `arch` is larger than any network that the supernet called `name` was trained for."""
    macs = cost.count(arch).macs
    if plan.max_macs is not None and macs > plan.max_macs:
        raise StudyError(
            f"network {arch.arch_id} has {macs:.4g} MACs, {name!r} was trained up to {plan.max_macs:.4g}",
            hint="train one without --max-macs, under another --name",
        )


def steps_within(
    seconds: float,
    plan: SupernetPlan,
    data: ImageData,
    *,
    device: str = "cpu",
    ranks: Ranks | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """How many steps `seconds` are enough for, by the time of a few whose result is thrown away; the same in every process."""
    ranks = ranks or Ranks()
    training = _Training(dataclasses.replace(plan, steps=_TIMED_STEPS + 1), data, None, device=device, ranks=ranks)
    training.train_step()  # libraries choose their kernels
    began = clock()
    for _ in range(_TIMED_STEPS):
        training.train_step()
        training.step += 1
    return ranks.agreed(max(_LEAST_STEPS, int(seconds * _TIMED_STEPS / max(clock() - began, 1e-9))))


def inherit(supernet: Supernet, arch: Arch, data: ImageData, *, n_images: int = STATISTICS_IMAGES, device: str = "cpu") -> nn.Module:
    """The network `arch` with the supernet's weights and statistics of its own from `n_images` training images, in evaluation mode.

    Raises NotInSpaceError where the supernet does not hold it.
    """
    model = supernet.subnet(arch).to(device)
    estimate_statistics(model, resized(data.train.images[:n_images], arch.resolution_px, device))
    return model


def estimate_statistics(model: nn.Module, images_BHWC: Tensor) -> None:
    """Set BatchNorm's running statistics to their mean over batches of uint8 images; leaves `model` in evaluation mode."""
    import torch
    from torch import nn

    model.eval()
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # pyright: ignore[reportAttributeAccessIssue]  a plain mean over batches
        norm.train()
    batches = max(1, len(images_BHWC) // _STATISTICS_BATCH)
    with torch.no_grad():
        for i in range(batches):
            model(normalised(images_BHWC[i * _STATISTICS_BATCH : (i + 1) * _STATISTICS_BATCH]))
    for norm in norms:
        norm.momentum = nn.BatchNorm2d(1).momentum
    model.eval()


def validate(model: nn.Module, data: ImageData, resolution_px: int, *, device: str = "cpu") -> tuple[float, float, float]:
    """(accuracy, mean cross-entropy, its standard error over images) of `model` on the validation images, in evaluation mode."""
    import torch
    import torch.nn.functional as F

    images_BHWC, labels = resized(data.val.images, resolution_px, device), as_tensor(data.val.labels).to(device)
    model.eval()
    correct, losses = 0, []
    with torch.inference_mode():
        for x_BHWC, targets in zip(images_BHWC.split(_STATISTICS_BATCH), labels.split(_STATISTICS_BATCH), strict=True):
            logits = model(normalised(x_BHWC))
            correct += int((logits.argmax(1) == targets).sum())
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
    loss = torch.cat(losses).double()
    return correct / len(labels), float(loss.mean()), float(loss.std(unbiased=False)) / math.sqrt(len(labels))


def extremes(space: SearchSpace) -> tuple[Arch, Arch]:
    """The networks of most and of fewest MACs, as found gene by gene; of equal ones that with more (fewer) parameters."""

    def climb(sign: int) -> Arch:
        genome, value = np.zeros(space.n_genes, dtype=np.int8), (-math.inf, -math.inf)
        improved = True
        while improved:
            improved = False
            for gene, n_choices in enumerate(space.cardinalities):
                for choice in range(n_choices):
                    changed = genome.copy()
                    changed[gene] = choice
                    counted = cost.count(space.decode(space.canonical(changed[None])[0]))
                    candidate = (sign * counted.macs, sign * counted.params)
                    if candidate > value:
                        genome, value, improved = changed, candidate, True
        return space.decode(space.canonical(genome[None])[0])

    return climb(1), climb(-1)


def sample_within(space: SearchSpace, n: int, max_macs: float, *, rng: np.random.Generator) -> np.ndarray:
    """`n` random genomes (n, n_genes) of at most `max_macs`. Raises UsageError where hardly any network is so small."""
    found = np.empty((0, space.n_genes), dtype=np.int8)
    for _ in range(100):
        drawn = space.sample(4 * n, rng=rng)
        small = [cost.count(space.decode(genome)).macs <= max_macs for genome in drawn]
        found = np.concatenate([found, drawn[np.array(small)]])
        if len(found) >= n:
            return found[:n]
    smallest = cost.count(extremes(space)[1]).macs
    raise UsageError(
        f"hardly any network of {space.name!r} has at most {max_macs:.4g} MACs", hint=f"the smallest has {smallest:.4g}; raise --max-macs"
    )


class _Training:
    """A training under way: the shared weights, their optimizer, and where it stands."""

    def __init__(self, plan: SupernetPlan, data: ImageData, folder: Path | None, *, device: str, ranks: Ranks) -> None:
        import torch

        from lowsearch.model.elastic import Supernet

        self.plan, self.folder, self.device, self.ranks = plan, folder, device, ranks
        recipe = plan.recipe
        self.space = plan.search_space()
        self.supernet = Supernet(self.space, seed=plan.seed, device=device)
        self.largest, self.smallest = extremes(self.space)
        n_images = recipe.n_images(len(data.train))
        self.batch_size = min(recipe.batch_size, n_images)
        self.steps_per_epoch = recipe.steps_per_epoch(n_images)
        self.labels = as_tensor(data.train.labels[:n_images]).to(device)
        self.images_of = cache(lambda px: resized(data.train.images[:n_images], px, device))
        weights = self.supernet.weights
        groups = [
            {"params": [w for key, w in weights.items() if _decays(key)], "weight_decay": recipe.weight_decay},
            {"params": [w for key, w in weights.items() if not _decays(key)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)
        self.step = 0
        if folder is not None:
            self._resume(folder / CHECKPOINT)

    def run(self, progress: Progress | None) -> None:
        """To the end of the schedule, and write the weights."""
        saved = {max(1, round(i * self.plan.steps / CHECKPOINTS_PER_SCHEDULE)) for i in range(1, CHECKPOINTS_PER_SCHEDULE)}
        while self.step < self.plan.steps:
            self.train_step()
            self.step += 1
            if self.step in saved:
                self._save()
            if progress is not None:
                progress(self.step, self.plan.steps, "supernet")
        assert self.folder is not None
        if self.ranks.rank == 0:
            note = {"supernet_hash": self.plan.supernet_hash, "steps": self.step}
            save_tensors(self.folder / WEIGHTS, portable(self.supernet.weights), note)
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        self.ranks.wait()

    def networks(self) -> list[Arch]:
        """Those that the next step trains, the teacher first; the same in every process."""
        rng = np.random.default_rng([self.plan.seed, _NETWORKS, self.step])
        limit = self.plan.max_macs
        if limit is None:
            drawn = self.space.sample(self.plan.n_random, rng=rng)
            return [self.largest, self.smallest, *map(self.space.decode, drawn)]
        drawn = sample_within(self.space, N_LARGE + self.plan.n_random, limit, rng=rng)
        large = max(map(self.space.decode, drawn[:N_LARGE]), key=lambda arch: cost.count(arch).macs)
        return [large, self.smallest, *map(self.space.decode, drawn[N_LARGE:])]

    def train_step(self) -> None:
        import torch

        recipe = self.plan.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(self.step, self.plan.steps, recipe.warmup_fraction)
        self.compute_gradients()
        touched = [w for w in self.supernet.weights.values() if w.grad is not None]
        self.ranks.sum([w.grad for w in touched if w.grad is not None])
        norm = float(torch.nn.utils.clip_grad_norm_(touched, recipe.grad_clip))
        if not math.isfinite(norm):
            raise StudyError(f"the supernet diverged at step {self.step} of {self.plan.steps}", hint="train with another --seed")
        self.optimizer.step()

    def compute_gradients(self) -> None:
        """Leave this process's share of the gradients of the mean loss over images and networks in the weights."""
        import torch.nn.functional as F

        recipe, seed = self.plan.recipe, self.plan.seed
        epoch, position = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng([seed, _ORDER, epoch]).permutation(len(self.labels))
        batch = order[position * self.batch_size : (position + 1) * self.batch_size]
        mine = as_tensor(batch[self.ranks.share(len(batch))]).to(self.device)
        networks = self.networks()
        self.optimizer.zero_grad(set_to_none=True)
        taught: Tensor | None = None
        for arch in networks:
            # The same draws for every network: all look at an image mirrored, or none; shifts differ by how many pixels there are.
            rng = np.random.default_rng([seed, _AUGMENTATION, self.step, self.ranks.rank])
            x_BCHW = normalised(augmented(self.images_of(arch.resolution_px), mine, recipe, rng))
            logits = self.supernet.logits(arch, x_BCHW)
            if taught is None:
                loss = F.cross_entropy(logits, self.labels[mine], label_smoothing=recipe.label_smoothing, reduction="sum")
                taught = logits.detach().softmax(dim=1)
            else:
                loss = F.cross_entropy(logits, taught, reduction="sum")
            (loss / (len(batch) * len(networks))).backward()

    def _save(self) -> None:
        if self.folder is None or self.ranks.rank != 0:
            return
        tensors = {f"weights.{key}": weight for key, weight in self.supernet.weights.items()}
        for key, weight in self.supernet.weights.items():
            for name, value in self.optimizer.state[weight].items():
                tensors[f"optimizer.{name}.{key}"] = value
        note = {"supernet_hash": self.plan.supernet_hash, "step": self.step}
        save_tensors(self.folder / CHECKPOINT, portable(tensors), note)

    def _resume(self, path: Path) -> None:
        import torch

        loaded = self.ranks.agreed(load_checkpoint(path, {"supernet_hash": self.plan.supernet_hash}) if self.ranks.rank == 0 else None)
        if loaded is None:
            return
        tensors, note = loaded
        self.supernet.load({key: tensors[f"weights.{key}"] for key in self.supernet.weights})
        for key, weight in self.supernet.weights.items():
            names = ("step", "exp_avg", "exp_avg_sq")
            saved = {name: tensors[f"optimizer.{name}.{key}"] for name in names if f"optimizer.{name}.{key}" in tensors}
            if saved:  # Nothing is kept of a weight that no step has used yet.
                self.optimizer.state[weight] = {
                    name: value.to(weight.device) if name == "step" else torch.empty_like(weight, requires_grad=False).copy_(value)
                    for name, value in saved.items()
                }
        self.step = note["step"]


def _decays(key: str) -> bool:
    """Weights of convolutions and linear layers; no biases, no norms."""
    *_, part, kind = key.split(".")
    return kind == "weight" and "norm" not in part
