"""timm's networks by name, as they would be deployed: classifier included, re-parameterised where the network allows it."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowsearch.cost import Cost
from lowsearch.errors import UsageError


def check_name(name: str) -> None:
    """Raise UsageError, with the nearest names, where timm has no network called `name`."""
    import timm

    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        raise UsageError(
            f"unknown network {name!r}: neither a preset nor one of timm's", hint=f"did you mean {', '.join(close)}?" if close else ""
        )


def build_timm(name: str, resolution_px: int, num_classes: int | None = None) -> nn.Module:
    """timm's network `name` for square images of `resolution_px`, with random weights, in eval mode.

    `num_classes`: None for as many as timm gives it. Raises UsageError where the network does not take that resolution.
    """
    import timm
    from timm.utils.model import reparameterize_model

    check_name(name)
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size and config.input_size[-1] != resolution_px
    changed: dict[str, Any] = {"img_size": resolution_px} if fixed else {}
    if num_classes is not None:
        changed["num_classes"] = num_classes
    try:
        model = timm.create_model(name, pretrained=False, exportable=True, **changed)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(f"{name} cannot be built for {resolution_px} px: {error}", hint="choose another --resolution") from error
    return reparameterize_model(model.eval())


def count_timm(name: str, resolution_px: int, num_classes: int | None = None) -> Cost:
    """MACs by torch's FlopCounterMode and parameters of the network as deployed. Activations are not counted: 0."""
    with torch.device("meta"):
        image = torch.zeros(1, 3, resolution_px, resolution_px)
        model = build_timm(name, resolution_px, num_classes)
    with FlopCounterMode(display=False) as counter:
        model(image)
    return Cost(macs=counter.get_total_flops() // 2, params=sum(p.numel() for p in model.parameters()))
