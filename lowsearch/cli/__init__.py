"""The command line: thin verbs over the library.

Results go to stdout (a table for people, `--json` for scripts), progress and logs to stderr. A mistake of the user's is one line that
says what, why and the command that mends it, with exit code 2; Ctrl-C is exit code 130 with the command that resumes.
Heavy imports happen inside the verbs, so `lowsearch --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lowsearch.cli import latency, search, spaces, studies, training
from lowsearch.cli.output import complain, tell
from lowsearch.errors import LowsearchError

app = typer.Typer(
    name="lowsearch",
    help="Latency-aware neural architecture search over the LowFormer space, measured on your own device.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


for _verb in (
    latency.devices, spaces.space, spaces.cost, latency.profile, latency.compare, latency.insights,
    search.run, search.worker, studies.report, studies.explain, studies.refine,
    training.train, training.recipes, training.proxies, training.trust,
):  # fmt: skip
    app.command()(_verb)
app.add_typer(latency.tables, name="table")
app.add_typer(studies.studies, name="study")
app.add_typer(training.supernets, name="supernet")


def main() -> None:
    """Entry point of the `lowsearch` command."""
    code = invoke(sys.argv[1:])
    distributed = sys.modules.get("lowsearch.train.distributed")
    if distributed is not None and distributed.broken():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Python's way out can abort while threads of gloo hold what it takes down.
    sys.exit(code)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Only bugs raise."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        result = app(list(arguments) or ["--help"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except LowsearchError as error:
        return complain(error.message, error.hint)
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        tell(f"interrupted; the same command resumes: lowsearch {shlex.join(arguments)}")
        return 130
    except BrokenPipeError:  # The reader of stdout went away, as in `lowsearch devices | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.TyperException as error:
        help_for = [word for word in arguments[:1] if word in _verbs()]
        return complain(error.format_message(), f"lowsearch {' '.join([*help_for, '--help'])}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror or error}", "check the path, its permissions and the free space")


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


def _verbs() -> set[str]:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return commands | {str(group.name) for group in app.registered_groups}
