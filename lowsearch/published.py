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
