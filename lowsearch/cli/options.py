"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, or a device's name such as rtx3090; `lowsearch devices` lists them.")
]
RuntimeOption = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        help="As onnxruntime (a CPU's default), cudagraphs (a GPU's), openvino, eager or compile; docs/measurement.md lists all.",
    ),
]
SpaceOption = Annotated[str, typer.Option("--space", help="A shipped space (lowformer, lowformer-micro) or a YAML file.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16 or int8, where the runtime and device have it.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Images in one forward pass.")]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, help="CPU threads of the runtime; more than 1 is timed in wall time, on a quiet machine.")
]
RecipeSetOption = Annotated[
    list[str] | None, typer.Option("--recipe-set", metavar="FIELD=VALUE", help="Change a field of the recipe, as epochs=12; repeatable.")
]
StudyName = Annotated[str, typer.Argument(help="Name or folder of a study.")]
