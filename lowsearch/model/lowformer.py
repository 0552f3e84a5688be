"""The torch network of an Arch.

The names of its parts are the places of `Arch.named_blocks()`: `model.block("stage3.1.attention")` is the module of that block, and
the keys of the state dict start with the place.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowsearch.arch import N_STAGES, Arch
from lowsearch.model.blocks import DropPath, build_block, init_weights
from lowsearch.model.pretrained import load_pretrained


class LowFormer(nn.Module):
    """Classifier with the features of its four stages. Image (n, 3, height, width), normalised, to logits (n, num_classes)."""

    def __init__(self, arch: Arch, *, drop_path: float = 0.0, mlp_dropout: float = 0.0) -> None:
        super().__init__()
        self.arch = arch
        tree: dict[str, Any] = {}
        for place, block in arch.named_blocks():
            *parents, name = place.split(".")
            level = tree
            for parent in parents:
                level = level.setdefault(parent, {})
            level[name] = build_block(block, mlp_dropout=mlp_dropout)
        for name, part in tree.items():
            self.add_module(name, _chain(part))
        self.set_drop_path(drop_path)

    def block(self, place: str) -> nn.Module:
        """The module of the block at `place`, such as `stage3.1.attention`."""
        return self.get_submodule(place)

    def features(self, x: Tensor) -> list[Tensor]:
        """Outputs of the four stages; stage i has `arch.stages[i - 1].width` channels at 1 / (stem stride x 2^i) of the input size."""
        x = self.get_submodule("stem")(x)
        outputs = []
        for number in range(1, N_STAGES + 1):
            x = self.get_submodule(f"stage{number}")(x)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("head")(self.features(x)[-1])

    def set_drop_path(self, rate: float) -> None:
        """Set stochastic depth to rise linearly from 0 at the first residual branch to `rate` at the last."""
        branches = [part for part in self.modules() if isinstance(part, DropPath)]
        for i, branch in enumerate(branches):
            branch.rate = rate * i / max(1, len(branches) - 1)


def build_model(
    arch: Arch,
    *,
    num_classes: int | None = None,
    pretrained: str | Path | None = None,
    seed: int | None = None,
    drop_path: float = 0.0,
    mlp_dropout: float = 0.0,
) -> LowFormer:
    """Network of `arch` on the CPU, initialised for training: every residual branch starts as the identity.

    `num_classes` replaces that of `arch`. `pretrained`: "timm" for the published weights of a preset, or a checkpoint (ours, timm's or
    the authors'); it must fit exactly, but for the classifier where `num_classes` asks for another number of classes. `seed` makes the
    initial weights reproducible; None draws them from torch's global generator. `mlp_dropout` is 0.1 in CPUBone's recipe.
    """
    if num_classes is not None:
        arch = dataclasses.replace(arch, num_classes=num_classes)
    with torch.device("meta"):  # torch's default initialisation would be drawn only to be overwritten
        model = LowFormer(arch, drop_path=drop_path, mlp_dropout=mlp_dropout)
    model.to_empty(device="cpu")
    init_weights(model, generator=None if seed is None else torch.Generator().manual_seed(seed))
    if pretrained is not None:
        load_pretrained(model, pretrained, replace_classifier=num_classes is not None)
    return model


def _chain(part: nn.Module | dict[str, Any]) -> nn.Module:
    if isinstance(part, nn.Module):
        return part
    return nn.Sequential(OrderedDict((name, _chain(child)) for name, child in part.items()))
