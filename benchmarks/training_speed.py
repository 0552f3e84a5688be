"""How fast does lowsearch train a micro network, beside the same network in the training loop of timm's script?

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py            # about 2 minutes; benchmarks/results/training_speed.json

Both train one epoch of the recipe `micro` on the same images and then evaluate the moving average on the validation images: the same
module (channels last on both sides), AdamW, clipping, label smoothing, cosine with warm-up, no augmentation. timm's side is made of what
its train.py is made of: `create_loader` with its prefetcher, `create_optimizer_v2`, `create_scheduler_v2`, `ModelEmaV3`, its loss and
metrics. Its loader works in a process of its own beside the training (`--workers`), and is warm before it is timed; ours has none, and
its time is that of the whole call of `train`. Pairs alternate in order; the ratio is of images a second in wall time, with a 95 %
bootstrap interval over pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, dispatch_clip_grad

from lowsearch.arch import Arch
from lowsearch.data import IMAGE_MEAN, IMAGE_STD, ImageData, Split, load_data
from lowsearch.model.lowformer import build_model
from lowsearch.space import SearchSpace
from lowsearch.train import Recipe, recipe, train

RESULTS = Path(__file__).parent / "results" / "training_speed.json"


class Images(torch.utils.data.Dataset):
    """A split as timm's loader takes data sets: PIL images, changed by the transform that the loader sets."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self.transform: Callable[[Image.Image], Any] | None = None
        self.target_transform = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.split.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.split.labels[index])


class TimmTraining:
    """One epoch after the other, as timm's train.py goes through it."""

    def __init__(self, arch: Arch, data: ImageData, how: Recipe, *, workers: int) -> None:
        self.arch, self.how = arch, how
        shared: dict[str, Any] = {
            "input_size": (3, arch.resolution_px, arch.resolution_px), "mean": IMAGE_MEAN, "std": IMAGE_STD, "num_workers": workers,
            "device": torch.device("cpu"), "persistent_workers": workers > 0,
        }  # fmt: skip
        self.loader = create_loader(Images(data.train), batch_size=how.batch_size, is_training=True, no_aug=True, **shared)
        self.validation = create_loader(Images(data.val), batch_size=250, is_training=False, crop_pct=1.0, **shared)

    def run(self) -> float:
        """Train a new network for the recipe's epochs; the accuracy of its moving average on the validation images."""
        how = self.how
        model: torch.nn.Module = build_model(self.arch, seed=0).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optimizer = create_optimizer_v2(model, "adamw", lr=how.learning_rate, weight_decay=how.weight_decay, betas=(0.9, how.beta2))
        assert how.ema_decay is not None
        average = ModelEmaV3(model, decay=how.ema_decay, use_warmup=True)
        updates = len(self.loader)
        scheduler, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=how.epochs, warmup_epochs=how.warmup_fraction * how.epochs, warmup_lr=0.0,  # pyright: ignore[reportArgumentType]
            step_on_epochs=False, updates_per_epoch=updates,
        )  # fmt: skip
        loss_of, losses, update = LabelSmoothingCrossEntropy(how.label_smoothing), AverageMeter(), 0
        for _ in range(how.epochs):
            model.train()
            for x, labels in self.loader:
                x = x.contiguous(memory_format=torch.channels_last)
                loss = loss_of(model(x), labels)
                loss.backward()
                dispatch_clip_grad(model.parameters(), how.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
                update += 1
                average.update(model, step=update)
                losses.update(loss.item(), len(x))
                scheduler.step_update(num_updates=update)
        top1 = AverageMeter()
        average.eval()
        with torch.inference_mode():
            for x, labels in self.validation:
                top1.update(accuracy(average(x.contiguous(memory_format=torch.channels_last)), labels)[0].item(), len(x))
        return top1.avg / 100


def compare(arch: Arch, data: ImageData, how: Recipe, *, pairs: int, workers: int) -> dict[str, Any]:
    """Seconds and accuracy of both sides, `pairs` times."""
    theirs = TimmTraining(arch, data, how, workers=workers)
    brief = dataclasses.replace(data, train=data.train.take(np.arange(4 * how.batch_size)))
    train(arch, brief, how, seed=0)  # warms torch; timm's loaders are warmed by an epoch of their own
    theirs.run()
    sides: dict[str, Callable[[], float]] = {
        "lowsearch": lambda: train(arch, data, how, seed=0).val_accuracy,
        "timm": theirs.run,
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, float] = {}
    for number in range(pairs):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            found[name] = sides[name]()
            seconds[name].append(time.perf_counter() - began)
        ratio = seconds["timm"][-1] / seconds["lowsearch"][-1]
        print(f"pair {number + 1}: lowsearch {seconds['lowsearch'][-1]:.2f} s, timm {seconds['timm'][-1]:.2f} s, {ratio:.2f} x", flush=True)
    return {"seconds": seconds, "val_accuracy": found}


def statistics(seconds: dict[str, list[float]], n_images: int, *, n_bootstrap: int = 2000) -> dict[str, Any]:
    """Images a second, and how many times as many lowsearch trains (above 1: it is faster)."""
    ratios = np.array(seconds["timm"]) / np.array(seconds["lowsearch"])
    picks = np.random.default_rng(0).integers(len(ratios), size=(n_bootstrap, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return {
        "ratio": float(np.median(ratios)), "low": float(low), "high": float(high),
        "images_per_s": {name: n_images / float(np.median(values)) for name, values in seconds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="micro-b-s", help="of the family of the micro space")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=1, help="processes of timm's loader")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("fashion-mnist-mini")
    data = dataclasses.replace(data, train=data.train.take(np.arange(min(args.images, len(data.train)))))
    space = SearchSpace.load("lowformer-micro").with_num_classes(len(data.classes))
    how = dataclasses.replace(recipe("micro"), epochs=1, evaluate_at=(1.0,))
    measured = compare(space.family[args.network], data, how, pairs=args.pairs, workers=args.workers)
    n_images = how.total_steps(len(data.train)) * how.batch_size
    result = {
        "command": "python benchmarks/training_speed.py", "date": time.strftime("%Y-%m-%d"), "machine": platform.machine(),
        "cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "torch": torch.__version__, "timm": timm.__version__,
        "network": args.network, "images": n_images, "loader_processes": args.workers,
        **statistics(measured["seconds"], n_images), **measured,
    }  # fmt: skip
    print(f"lowsearch trains {result['ratio']:.2f} x as many images a second as timm's loop ({result['low']:.2f} to {result['high']:.2f})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
