"""Trained networks that others are distilled from: ours, or any of timm's with a file of weights.

A teacher sees the very batch that its student sees, so it is asked in the student's terms: images normalised as `data` does, brought to
the teacher's own normalisation and, where it takes one size only, to that size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowsearch.arch import Arch
from lowsearch.errors import CheckpointError
from lowsearch.model.lowformer import build_model
from lowsearch.model.pretrained import read_checkpoint
from lowsearch.model.zoo import check_name


class Teacher(nn.Module):
    """`network`, frozen, in evaluation mode. Maps images (n, 3, px, px), normalised by `mean` and `std`, to logits (n, num_classes)."""

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        own_mean: tuple[float, ...],
        own_std: tuple[float, ...],
        own_px: int | None,
    ) -> None:
        """`own_mean`, `own_std`, `own_px`: what `network` takes; `own_px` None where it takes any size."""
        super().__init__()
        self.network, self.own_px = network.eval().requires_grad_(False), own_px
        ours, theirs = (torch.tensor(values) for values in ((mean, std), (own_mean, own_std)))
        self.register_buffer("scale", (ours[1] / theirs[1]).view(1, 3, 1, 1))
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1]).view(1, 3, 1, 1))

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x * self.get_buffer("scale") + self.get_buffer("shift")
        if self.own_px is not None and x.shape[-1] != self.own_px:
            x = F.interpolate(x, size=(self.own_px, self.own_px), mode="bilinear", align_corners=False, antialias=True)
        return self.network(x)


def own_teacher(arch_file: Path, weights: Path, *, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Teacher:
    """The teacher that `lowsearch train` left. Raises CheckpointError where its weights do not fit or it knows other classes."""
    arch = Arch.from_json(arch_file.read_text(encoding="utf-8"))
    _check_classes(str(weights), arch.num_classes, num_classes)
    network = build_model(arch, pretrained=weights)
    return Teacher(network, mean=mean, std=std, own_mean=mean, own_std=std, own_px=arch.resolution_px)


def timm_teacher(name: str, weights: Path, *, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Teacher:
    """timm's network `name` with the weights in a file. Raises CheckpointError as `own_teacher`, and UsageError on an unknown name."""
    import timm

    check_name(name)
    state = read_checkpoint(weights)
    network = timm.create_model(name, pretrained=False, num_classes=num_classes)
    config: Any = network.pretrained_cfg
    first = config.get("classifier")
    head = first[0] if isinstance(first, tuple | list) else first
    if f"{head}.weight" in state:
        _check_classes(str(weights), len(state[f"{head}.weight"]), num_classes)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{weights} does not hold the weights of timm's {name}: {reason}") from error
    own_px = config["input_size"][-1] if config.get("fixed_input_size") else None
    return Teacher(network, mean=mean, std=std, own_mean=tuple(config["mean"]), own_std=tuple(config["std"]), own_px=own_px)


def _check_classes(what: str, taught: int, wanted: int) -> None:
    if taught != wanted:
        raise CheckpointError(
            f"the teacher {what} knows {taught} classes, the data have {wanted}", hint="train a teacher on the same data: lowsearch train"
        )
