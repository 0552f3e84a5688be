"""Train one network on the whole schedule and keep what came out: weights, architecture, metrics. `lowsearch train` is this.

Resumable: a killed training goes on from its checkpoint, a finished one is returned as it is. Of several
processes the first reads and writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowsearch.arch import Arch
from lowsearch.data import ImageData
from lowsearch.errors import StudyError
from lowsearch.files import write_atomically
from lowsearch.train.distributed import Ranks
from lowsearch.train.engine import evaluate, hash_of_init, train
from lowsearch.train.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.json"


def train_fully(
    arch: Arch,
    data: ImageData,
    recipe: Recipe,
    *,
    seed: int,
    folder: Path,
    init: Mapping[str, Tensor] | None = None,
    origin: Mapping[str, Any] | None = None,
    device: str = "cpu",
    ranks: Ranks | None = None,
    loaders: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Train `arch`, write arch.json, model.safetensors and metrics.json to `folder`, and return the metrics.

    Accuracies are fractions, each with the standard error of its finite number of images. `init`: the state dict to start from, instead of
    random weights; `origin`: where it is from, for the metrics; `ranks` and `loaders` are those of `train`. Raises
    StudyError where `folder` holds another training.
    """
    identity = {
        "arch_id": arch.arch_id, "recipe": recipe.name, "recipe_hash": recipe.recipe_hash, "data": data.name,
        "data_hash": data.data_hash, "seed": seed, "init": hash_of_init(init),
    }  # fmt: skip
    ranks = ranks or Ranks()
    finished = ranks.agreed(_finished(folder, identity) if ranks.rank == 0 else None)
    if finished is not None:
        return finished
    checkpoint = folder / "checkpoint.safetensors"
    result = train(
        arch, data, recipe, seed=seed, checkpoint=checkpoint, init=init, progress=progress, device=device, ranks=ranks, loaders=loaders
    )
    test_accuracy = evaluate(result.model(), data.test, arch.resolution_px, device=device, ranks=ranks)
    metrics = {
        **identity,
        **({"origin": dict(origin)} if origin is not None else {}),
        "val_accuracy": result.val_accuracy, "val_accuracy_std": _binomial_std(result.val_accuracy, len(data.val)),
        "test_accuracy": test_accuracy, "test_accuracy_std": _binomial_std(test_accuracy, len(data.test)),
        "diverged": result.diverged, "cpu_seconds": round(result.cpu_seconds, 2), "recipe_values": recipe.to_dict(),
        "curve": [{"fraction": p.fraction, "train_loss": p.train_loss, "val_accuracy": p.val_accuracy} for p in result.curve],
    }  # fmt: skip
    if ranks.rank == 0:
        result.save_weights(folder / "model.safetensors")
        write_atomically(folder / "arch.json", arch.to_json() + "\n")
        write_atomically(folder / METRICS, json.dumps(metrics, indent=1) + "\n")  # Last: with it the training is finished.
        checkpoint.unlink(missing_ok=True)
    ranks.wait()
    return metrics


def _finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    stored = _stored(folder / METRICS)
    differs = None if stored is None else next((key for key, value in identity.items() if stored.get(key) != value), None)
    if stored is not None and differs is not None:
        raise StudyError(
            f"{folder} holds a training with {differs} {stored.get(differs)!r}, not {identity[differs]!r}", hint="give another --out"
        )
    return stored


def _stored(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{path} is damaged: {error}", hint="remove it to train again") from error
    if not isinstance(values, dict):
        raise StudyError(f"{path} is damaged: no mapping", hint="remove it to train again")
    return values


def _binomial_std(accuracy: float, n_images: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / n_images)
