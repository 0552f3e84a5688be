"""What the LowFormer papers say about execution time, one claim at a time, in a form that a device can answer.

Sources: LowFormer (arXiv 2409.03460), Beyond MACs (arXiv 2603.26551) and the configurations released with them; CPUBone for the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement about execution time."""

    number: int
    title: str
    statement: str
    source: str


_LOWFORMER, _BEYOND, _CPUBONE = "LowFormer", "Beyond MACs", "CPUBone"

CLAIMS: dict[int, Claim] = {
    number: Claim(number=number, title=title, statement=statement, source=source)
    for number, (title, statement, source) in enumerate(
        (
            ("MACs and time", "MACs do not rank networks by their execution time.", _LOWFORMER),
            (
                "Depthwise and grouped convolution",
                "At equal MACs a depthwise or a grouped convolution takes longer than a dense one.",
                _LOWFORMER,
            ),
            (
                "Fused or unfused",
                "A fused MBConv is faster than an unfused one at few channels in spite of its MACs; with more channels this turns round.",
                _LOWFORMER,
            ),
            (
                "A network without fusing",
                "LowFormer-B1 with all convolutions unfused has half the MACs, and does not take half the time.",
                _LOWFORMER,
            ),
            (
                "Early and late stages",
                "The same MACs take longer at high resolution and few channels (early stages) than at low resolution and many.",
                _LOWFORMER,
            ),
            ("Lowtention is cheap", "Lowtention takes much less time than attention at full resolution and width.", _LOWFORMER),
            (
                "Resolution and the stride of attention",
                "Removing Lowtention's stride hardly costs MACs at 224 px, and much time at 1024 px.",
                _LOWFORMER,
            ),
            (
                "Softmax at low resolution or linear attention",
                "Lowtention is faster than ReLU-linear attention at full resolution.",
                _LOWFORMER,
            ),
            (
                "Fused output projection",
                "One dense transposed convolution is faster than a 1x1 convolution and a depthwise transposed one, in spite of more MACs.",
                _LOWFORMER,
            ),
            (
                "Attention and MLP",
                "Leaving out attention and MLP saves more time than MACs: LowFormer-E1 against B1.5, E2 and E3 against B3.",
                _BEYOND,
            ),
            (
                "Pure convolution at equal accuracy",
                "LowFormer-E2, without attention, is not faster than LowFormer-B2 of the same published accuracy (81.6 %).",
                _BEYOND,
            ),
            ("Batch size", "Batch 1 and a large batch rank networks differently.", _LOWFORMER),
            (
                "Two groups and 2x2 kernels",
                "Two groups in the expansion and 2x2 kernels save about as much time as MACs.",
                _CPUBONE,
            ),
            ("The head", "The head's share of the time is larger than its share of the MACs.", _LOWFORMER),
            (
                "A higher resolution",
                "A higher resolution at test time buys accuracy without training; what it costs in time grows with the MACs.",
                _BEYOND,
            ),
        ),
        start=1,
    )
}
