"""The command line: thin verbs over the library.

Results go to stdout (a table for people, `--json` for scripts), progress and logs to stderr. A mistake of the user's is one line that
says what, why and the command that mends it, with exit code 2; Ctrl-C is exit code 130 with the command that resumes.
Heavy imports happen inside the verbs, so `lowsearch --help` answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lowsearch.errors import LowsearchError, StudyError, UsageError

app = typer.Typer(
    name="lowsearch",
    help="Latency-aware neural architecture search over the LowFormer space, measured on your own device.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu, cuda, or a device's name such as rtx3090; `lowsearch devices` lists them.")
]
RuntimeOption = Annotated[str, typer.Option("--runtime", help="onnxruntime or eager.")]
SpaceOption = Annotated[str, typer.Option("--space", help="A shipped space (lowformer, lowformer-micro) or a YAML file.")]
PrecisionOption = Annotated[str, typer.Option("--precision", help="fp32, or fp16 on a GPU.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Images in one forward pass.")]
ThreadsOption = Annotated[int, typer.Option("--threads", min=1, help="CPU threads of the runtime.")]
Progress = Callable[[int, int, str], None]


def main() -> None:
    """Entry point of the `lowsearch` command."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Only bugs raise."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = app(list(arguments) or ["--help"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LowsearchError as error:
        return _complain(error.message, error.hint)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _tell(f"interrupted; the same command resumes: lowsearch {shlex.join(arguments)}")
        return 130
    except BrokenPipeError:  # The reader of stdout went away, as in `lowsearch devices | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.TyperException as error:
        help_for = [
            word for word in arguments[:1] if word in {command.name or command.callback.__name__ for command in app.registered_commands}
        ]
        return _complain(error.format_message(), f"lowsearch {' '.join([*help_for, '--help'])}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", "check the path, its permissions and the free space")


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, on stderr.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from lowsearch import __version__

        typer.echo(f"lowsearch {__version__}")
        raise typer.Exit
    if verbose:
        logging.getLogger("lowsearch").setLevel(logging.INFO)


@app.command()
def devices(as_json: JsonFlag = False) -> None:
    """What this machine can measure, and which latency tables exist."""
    from lowsearch.latency.table import list_tables
    from lowsearch.latency.target import attached_devices

    attached = attached_devices()
    tables = list_tables()
    if as_json:
        _print_json({
            "devices": [{"device": d.slug, "kind": d.kind, "name": d.name, "detail": d.detail, "driver": d.driver} for d in attached],
            "tables": tables,
        })  # fmt: skip
        return
    _print_table("Attached", ["device", "kind", "name", "detail"], [[d.slug, d.kind, d.name, d.detail] for d in attached])
    if tables:
        columns = list(tables[0])
        _print_table("Latency tables", columns, [[row[c] for c in columns] for row in tables])
    else:
        _tell("no latency table yet; measure one: lowsearch profile --device cpu --runtime onnxruntime")


@app.command()
def space(name: Annotated[str, typer.Argument(help="A space's name or YAML file.")], as_json: JsonFlag = False) -> None:
    """Check a search space and print its genes, its size and its hand-made family."""
    from lowsearch import cost
    from lowsearch.space import SearchSpace

    loaded = SearchSpace.load(name)
    family = [{"name": n, "arch_id": arch.arch_id, **_costs(cost.count(arch))} for n, arch in loaded.family.items()]
    if as_json:
        _print_json({
            "name": loaded.name, "networks": loaded.size(), "blocks": len(loaded.blocks), "num_classes": loaded.num_classes,
            "genes": {gene.name: gene.choices for gene in loaded.genes}, "family": family,
        })  # fmt: skip
        return
    _print_table(
        f"{loaded.name}: {loaded.size():.3g} networks, {len(loaded.blocks):,} distinct blocks",
        ["gene", "choices"],
        [[gene.name, ", ".join(_plain(c) for c in gene.choices)] for gene in loaded.genes],
    )
    if family:
        _print_table("Hand-made family", list(family[0]), [list(row.values()) for row in family])


@app.command()
def cost(network: Annotated[str, typer.Argument(help="A preset, or a network's arch.json.")], as_json: JsonFlag = False) -> None:
    """MACs, params and activations of a network, block by block."""
    from lowsearch import cost as costs

    arch = _network(network)
    counted = costs.count(arch)
    rows = [{"place": place, "kind": block.kind, **_costs(block_cost)} for place, block, block_cost in counted.per_block]
    total = {"place": "total", "kind": f"{arch.resolution_px} px", **_costs(counted)}
    if as_json:
        _print_json({"arch_id": arch.arch_id, "arch": arch.to_dict(), **_costs(counted), "blocks": rows})
        return
    _print_table(f"{network} ({arch.arch_id})", list(total), [list(row.values()) for row in [*rows, total]])


@app.command()
def profile(
    device: DeviceOption = "cpu",
    runtime: RuntimeOption = "onnxruntime",
    space: SpaceOption = "lowformer-micro",
    precision: PrecisionOption = "fp32",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Measure a device: the latency table of a space's blocks and its calibration networks. Resumes where it stopped."""
    from lowsearch.latency.profile import profile as measure
    from lowsearch.latency.target import resolve_target
    from lowsearch.space import SearchSpace

    loaded = SearchSpace.load(space)
    target = resolve_target(device, runtime, precision=precision, batch=batch, threads=threads)
    with _progress() as progress:
        result = measure(loaded, target, seed=seed, progress=progress)
    summary = result.summary()
    if as_json:
        _print_json(summary)
    else:
        _print_table(f"Latency table of {target}", ["what", "value"], [[k, _plain(v)] for k, v in summary.items()])


def _network(name: str) -> Any:
    from lowsearch.arch import Arch
    from lowsearch.presets import preset

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no such file: {name}", hint="give a preset's name or the arch.json of a network")
        return Arch.from_json(path.read_text(encoding="utf-8"))
    return preset(name)


def _costs(counted: Any) -> dict[str, int]:
    return {"macs": counted.macs, "params": counted.params, "activations": counted.activations}


_BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_budget(text: str) -> float:
    """Seconds of a duration such as `8m`, `90s` or `1h30m`. Raises UsageError."""
    match = _BUDGET.fullmatch(text.strip())
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0.0
    if seconds <= 0:
        raise UsageError(f"budget {text!r} is not a duration", hint="write it as 8m, 90s or 1h30m")
    return seconds


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return " x ".join(_plain(v) for v in value)
    return "" if value is None else str(value)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    numeric = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(columns))]
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(value) for value in row))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on stderr; plain lines every few seconds where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_progress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, label: bar.update(task, completed=done, total=total, description=label)


def _line_progress(every_s: float = 10.0) -> Progress:
    from time import monotonic

    last: dict[str, float] = {}

    def show(done: int, total: int, label: str) -> None:
        now = monotonic()
        if done >= total or now - last.get("time", -every_s) >= every_s:
            last["time"] = now
            _tell(f"{label} {done}/{total}")

    return show


def _tell(message: str) -> None:
    typer.echo(message, err=True)


def _complain(message: str, hint: str | None) -> int:
    one_line = " ".join(message.split())
    typer.echo(f"error: {one_line}" + (f"; hint: {' '.join(hint.split())}" if hint else ""), err=True)
    return 2
