"""What the verbs print: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lowsearch.data import ImageData

Progress = Callable[[int, int, str], None]


def cost_columns(counted: Any) -> dict[str, int]:
    return {"macs": counted.macs, "params": counted.params, "activations": counted.activations}


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, default=str))


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    print_table(title, list(rows[0]), [list(row.values()) for row in rows])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    numeric = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(columns))]
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(plain(value) for value in row))
    console = Console() if sys.stdout.isatty() else Console(width=200)  # A pipe has no width to fit.
    console.print(table)


def plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return " x ".join(plain(v) for v in value)
    return "" if value is None else str(value)


def percent(row: Mapping[str, Any], key: str) -> float | None:
    return round(100 * row[key], 2) if isinstance(row.get(key), float) else None


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def interval_text(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


@contextmanager
def progress_bar() -> Iterator[Progress]:
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


def load_images(name: str) -> ImageData:
    """The data set called `name`; a progress bar where its files have to be decoded first."""
    from lowsearch.data import load_data

    with ExitStack() as stack:
        bars: list[Progress] = []

        def show(done: int, total: int, label: str) -> None:
            if not bars:
                bars.append(stack.enter_context(progress_bar()))
            bars[0](done, total, label)

        return load_data(name, progress=show)


def _line_progress(every_s: float = 10.0) -> Progress:
    from time import monotonic

    last: dict[str, float] = {}

    def show(done: int, total: int, label: str) -> None:
        now = monotonic()
        if done >= total or now - last.get("time", -every_s) >= every_s:
            last["time"] = now
            tell(f"{label} {done}/{total}")

    return show


def tell(message: str) -> None:
    typer.echo(message, err=True)


def complain(message: str, hint: str | None) -> int:
    one_line = " ".join(message.split())
    typer.echo(f"error: {one_line}" + (f"; hint: {' '.join(hint.split())}" if hint else ""), err=True)
    return 2
