"""Published ImageNet-1K top-1 accuracies, for the plots that measured latencies stand in. Facts from papers and model cards, measured by
their authors with recipes of their own: longer training or distillation is part of some of them.

Sources: timm's evaluation of its own weights (LowFormer at 224 px, others at 224 or 256 px as their cards say); the LowFormer and CPUBone
releases for the networks that timm has no weights of.
"""

from __future__ import annotations

TOP1_PERCENT: dict[str, float] = {
    "lowformer_b0": 78.4, "lowformer_b1": 79.8, "lowformer_b15": 81.1, "lowformer_b2": 81.6, "lowformer_b3": 83.7, "lowformer_e1": 78.8,
    "lowformer_e2": 81.6, "lowformer_e3": 83.0, "cpubone_b0": 77.6, "cpubone_b1": 78.7, "cpubone_b2": 80.3, "cpubone_b3": 83.1,
    "efficientformerv2_s1": 79.7, "efficientvit_b0": 71.4, "efficientvit_b1": 79.7, "efficientvit_b2": 82.7, "fastvit_sa12": 81.8,
    "fastvit_t8": 77.2, "ghostnetv2_100": 75.2, "mobilenetv4_conv_medium": 79.9, "mobilenetv4_conv_small": 74.6,
    "mobilenetv4_hybrid_medium": 82.4, "mobileone_s1": 75.8, "mobileone_s4": 79.4, "repvit_m0_9": 79.1, "repvit_m1_1": 81.3,
    "repvit_m1_5": 82.5, "resnet18": 73.3, "resnet50": 81.1,
}  # fmt: skip
"""By preset or timm name. Other networks have no entry, and are shown without an accuracy."""

TOP1_PERCENT_AT: dict[str, dict[int, float]] = {
    "lowformer_b0": {224: 78.388, 256: 79.194, 288: 79.306}, "lowformer_b1": {224: 79.806, 256: 80.260, 288: 80.406},
    "lowformer_b15": {224: 81.102, 256: 81.558, 288: 81.708}, "lowformer_b3": {224: 83.656, 256: 83.988, 288: 84.066},
    "lowformer_e1": {224: 78.772, 256: 79.366, 288: 79.624}, "lowformer_e2": {224: 81.612, 256: 81.982, 288: 82.156},
    "lowformer_e3": {224: 83.044, 256: 83.166, 288: 83.402}, "lowformer_b2": {224: 81.6}, "cpubone_b0": {224: 77.6},
    "cpubone_b1": {224: 78.7}, "cpubone_b2": {224: 80.3}, "cpubone_b3": {224: 83.1},
}  # fmt: skip
"""The presets by resolution_px, without training again: timm's evaluation of the released weights; the releases where there are none.
B2 was read off a figure."""
