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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

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
Progress = Callable[[int, int, str], None]


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
        help_for = [word for word in arguments[:1] if word in _verbs()]
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
    from lowsearch.latency.table import SHIPPED, known_tables, shipped_tables
    from lowsearch.latency.target import attached_devices

    attached = [{"device": d.slug, "kind": d.kind, "name": d.name, "detail": d.detail, "driver": d.driver} for d in attached_devices()]
    tables = [
        {
            "device": t.device, "runtime": t.runtime, "precision": t.precision, "batch": t.batch, "threads": t.threads, "origin": origin,
            "file": str(path),
        }
        for origin, found in (("", known_tables()), (SHIPPED, shipped_tables()))
        for t, path in found.items()
    ]  # fmt: skip
    if as_json:
        _print_json({"devices": attached, "tables": tables})
        return
    _print_rows("Attached", attached)
    if tables:
        _print_rows("Latency tables", tables)
    if not known_tables():
        _tell("no latency table was measured here yet; measure one: lowsearch profile --device cpu --runtime onnxruntime")


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
        _print_rows("Hand-made family", family)


@app.command()
def cost(network: Annotated[str, typer.Argument(help="A preset, or a network's arch.json.")], as_json: JsonFlag = False) -> None:
    """MACs, params and activations of a network, block by block; peak memory and file size of the whole, in fp32 at batch 1."""
    from lowsearch import cost as costs
    from lowsearch.footprint import artifact_mb, peak_memory_mb

    arch = _network(network)
    footprint = {"peak_memory_mb": peak_memory_mb(arch), "artifact_mb": artifact_mb(arch)}
    counted = costs.count(arch)
    rows = [{"place": place, "kind": block.kind, **_costs(block_cost)} for place, block, block_cost in counted.per_block]
    total = {"place": "total", "kind": f"{arch.resolution_px} px", **_costs(counted)}
    if as_json:
        _print_json({"arch_id": arch.arch_id, "arch": arch.to_dict(), **_costs(counted), **footprint, "blocks": rows})
        return
    _print_rows(f"{network} ({arch.arch_id})", [*rows, total])
    _tell(f"peak memory {footprint['peak_memory_mb']:.4g} MB, file {footprint['artifact_mb']:.4g} MB (fp32, batch 1)")


@app.command()
def profile(
    device: DeviceOption = "cpu",
    runtime: RuntimeOption = None,
    space: SpaceOption = "lowformer-micro",
    precision: PrecisionOption = "fp32",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
    max_blocks: Annotated[
        int | None, typer.Option("--max-blocks", min=1, help="Blocks to measure at most; the others are predicted. Default: the runtime's.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure fewer blocks and networks; the same command without it adds them.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not lean on this machine's table of another batch: measure all blocks at this one.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", help="Measure nothing here: write this folder, to be run on a machine called --device.")
    ] = None,
    imported: Annotated[Path | None, typer.Option("--import", help="Make the table of a bundle that was measured.")] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="USER@MACHINE", help="Do it all over ssh: bundle, copy, measure, import.")
    ] = None,
    remote_python: Annotated[str, typer.Option("--remote-python", help="Python of --host; it needs numpy and onnxruntime.")] = "python3",
    as_json: JsonFlag = False,
) -> None:
    """Measure a device: the latency table of a space's blocks and its calibration networks. Resumes where it stopped."""
    from lowsearch.latency.profile import profile as measure
    from lowsearch.space import SearchSpace

    if imported is not None:
        if bundle is not None or host is not None:
            raise UsageError("--import stands alone: the folder says what it is of", hint=f"lowsearch profile --import {imported}")
        _import_bundle(imported, as_json)
        return
    loaded = SearchSpace.load(space)
    elsewhere = bundle is not None or host is not None
    if elsewhere and device in ("cpu", "cuda", "gpu"):
        raise UsageError("name the machine that is measured: its table goes by that name", hint="--device raspberry-pi-5")
    if elsewhere and quick:
        raise UsageError("--quick measures this machine; a bundle has no quick form", hint="--max-blocks 400")
    target = _target(device, runtime, precision=precision, batch=batch, threads=threads)
    if elsewhere:
        folder = bundle or Path("bundles") / f"{target.device}-{loaded.name}"
        _profile_elsewhere(loaded, target, folder, host, remote_python, max_blocks, seed, as_json)
        return
    with _progress() as progress:
        result = measure(loaded, target, max_blocks=max_blocks, seed=seed, quick=quick, alone=alone, progress=progress)
    _print_profile(loaded, result, as_json)
    if quick:
        more = "blocks and networks" if result.sibling is None else "networks"
        _tell(f"the same command without --quick adds more {more}: {target.profile_command} --space {space}")
    missing = sum(block not in result.entries for block in loaded.blocks)
    if result.sibling is not None and missing:
        _tell(
            f"{missing:,} of {len(loaded.blocks):,} blocks are predicted from what they take at batch {result.sibling.batch} (table of "
            f"{result.sibling.date_utc}); the same command with --alone measures them: {target.profile_command} --space {space} --alone"
        )


def _profile_elsewhere(
    space: Any, target: Any, folder: Path, host: str | None, python: str, max_blocks: int | None, seed: int, as_json: bool
) -> None:
    """Write the bundle of `space`, and with a `host` measure it there and make the table."""
    from lowsearch.latency.bundle import RESULTS, make_bundle
    from lowsearch.latency.remote import measure_on_host

    with _progress() as progress:
        made = make_bundle(space, target, folder, max_blocks=max_blocks, seed=seed, progress=progress)
    if host is not None:
        with _progress() as progress:
            place = measure_on_host(made, host, python=python, progress=progress)
        _tell(f"measured in {place}, which may be removed")
        _import_bundle(folder, as_json)
        return
    facts = {"bundle": str(folder), "target": str(target), "space": space.name, "items": len(made.items), "megabytes": made.n_bytes / 1e6}
    if as_json:
        _print_json(facts)
        return
    _print_table("Bundle", ["what", "value"], [[k, _plain(v)] for k, v in facts.items()])
    _tell(
        f"copy it to the machine, run `python3 run.py` in it (needs numpy and onnxruntime), bring {RESULTS} back into {folder}, "
        f"and run: lowsearch profile --import {folder}"
    )


def _import_bundle(folder: Path, as_json: bool) -> None:
    from lowsearch.latency.bundle import Bundle, import_results

    loaded = Bundle.load(folder)
    _print_profile(loaded.space, import_results(loaded), as_json)


def _print_profile(space: Any, table: Any, as_json: bool) -> None:
    """What was measured of `space`, and how well it predicts whole networks."""
    from lowsearch import locations
    from lowsearch.latency.predictor import LatencyPredictor

    summary = {
        **table.summary(), "blocks_of_space": len(space.blocks), "network_error_percent": 100 * LatencyPredictor(space, table).relative_std,
        "file": str(locations.new("latency_tables") / table.target.table_path),
    }  # fmt: skip
    if as_json:
        _print_json(summary)
    else:
        _print_table(f"Latency table of {table.target}", ["what", "value"], [[k, _plain(v)] for k, v in summary.items()])
    again = table.context.measured_again
    _tell(f"{_quality(table)}; {again} {'was' if again == 1 else 'were'} measured again" + (f"; {table.advice}" if table.advice else ""))


def _quality(table: Any) -> str:
    """How many rows of a table are worth what, in words."""
    counts = table.verdicts
    return f"{counts['valid']:,} of {sum(counts.values()):,} rows are valid, {counts['noisy']:,} noisy, {counts['invalid']:,} invalid"


tables = typer.Typer(help="Latency tables as files: show, check, merge, diff.", rich_markup_mode=None)
app.add_typer(tables, name="table")
TableName = Annotated[str, typer.Argument(help="A table's file, or its name as rtx3090/eager-fp32-b1-t1.")]


@tables.command("show")
def show_table(name: TableName, as_json: JsonFlag = False) -> None:
    """What a table holds, what it was measured on and with, and how fast memory was."""
    from lowsearch.latency.table_tools import open_table

    table = open_table(name)
    context = table.context
    facts = {
        **table.summary(), "device_detail": context.device_detail, "driver": context.driver, "os": context.os,
        "versions": dict(context.versions), "runtime_options": dict(context.runtime_options), "load_average": context.load_average,
        "governor": context.governor, "clocks": context.clocks, "power_limit": context.power_limit, "git_sha": context.git_sha,
        "memory_gb_per_s": {f"{row.n_bytes / 2**20:g} MiB": round(row.n_bytes / row.latency_ms / 1e6, 1) for row in table.memory},
    }  # fmt: skip
    if as_json:
        _print_json(facts)
    else:
        _print_table(f"Latency table of {table.target}", ["what", "value"], [[k, _plain(v)] for k, v in facts.items()])


@tables.command("check")
def check_table(name: TableName, as_json: JsonFlag = False) -> int:
    """Whether a table is whole, reliable, and may be used on this machine. Exit code 1 where it is not, 2 where it is damaged."""
    from lowsearch.latency.table_tools import open_table, why_unreliable, why_unusable

    table = open_table(name)
    reason = "; ".join(filter(None, (why_unreliable(table), why_unusable(table))))
    if as_json:
        _print_json({**table.summary(), "usable": not reason, "reason": reason})
    else:
        typer.echo(f"{table.target}: {len(table.entries)} blocks, whole; {_quality(table)}; {reason or 'may be used here'}")
    return 1 if reason else 0


@tables.command("merge")
def merge_tables(
    first: TableName,
    second: TableName,
    out: Annotated[Path, typer.Option("--out", help="Folder of tables to write to, as ./merged; the file's place follows its target.")],
) -> None:
    """Put two tables of one target, device and version together; where both have a row, the first's stays."""
    from lowsearch.latency.table_tools import merge, open_table

    merged = merge(open_table(first), open_table(second))
    path = out / merged.target.table_path
    if path.exists():
        raise UsageError(f"{path} exists already", hint="name another folder with --out, or remove the file")
    typer.echo(merged.save(out))


@tables.command("diff")
def diff_tables(first: TableName, second: TableName, as_json: JsonFlag = False) -> None:
    """How many times longer the second table's rows took than the first's, by kind of block, and for whole networks."""
    from lowsearch.latency.table_tools import difference, open_table

    rows = difference(open_table(first), open_table(second))
    if as_json:
        _print_json(rows)
    else:
        _print_rows(f"{second} over {first}", rows)


@app.command()
def compare(
    networks: Annotated[list[str], typer.Argument(help="Presets, networks of timm by name, or an arch.json; as many as you like.")],
    device: DeviceOption = "cpu",
    runtime: RuntimeOption = None,
    resolution: Annotated[int | None, typer.Option("--resolution", min=32, help="Pixels; default: 224, and a file's own.")] = None,
    precision: PrecisionOption = "fp32",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
    out: Annotated[Path | None, typer.Option("--out", help="Also write an interactive page, as compare.html.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure whole networks side by side on one device, with their published accuracies."""
    import dataclasses

    from lowsearch.latency.compare import compare as measure

    target = _target(device, runtime, precision=precision, batch=batch, threads=threads)
    with _progress() as progress:
        rows = measure(networks, target, resolution_px=resolution, progress=progress)
    if out is not None:
        from lowsearch.report.comparison import build_comparison

        build_comparison(rows, str(target), out)
    if as_json:
        _print_json(
            {
                "target": dataclasses.asdict(target),
                "networks": [{**dataclasses.asdict(r), "gmacs_per_s": r.gmacs_per_s, "verdict": r.verdict[0]} for r in rows],
            }
        )
        return
    shown = [
        {
            "network": r.name, "px": r.resolution_px, "latency_ms": r.latency_ms, "±": r.latency_std_ms, "verdict": r.verdict[0],
            **({"energy_mJ": r.energy_mj} if any(row.energy_mj is not None for row in rows) else {}),
            "MMACs": r.macs / 1e6, "GMACs/s": r.gmacs_per_s, "Mparams": r.params / 1e6, "top1 % (published)": r.top1_percent,
        }
        for r in rows
    ]  # fmt: skip
    _print_rows(f"Measured on {target}", shown)
    for advice in dict.fromkeys(r.verdict[1] for r in rows if r.verdict[1]):
        _tell(f"not all are valid: {advice}")
    if out is not None:
        _tell(f"page: {out}")


@app.command()
def insights(
    device: DeviceOption = "cpu",
    runtime: RuntimeOption = None,
    claim: Annotated[list[int] | None, typer.Option("--claim", help="Only this claim, by its number; may be repeated.")] = None,
    precision: PrecisionOption = "fp32",
    threads: ThreadsOption = 1,
    as_json: JsonFlag = False,
) -> None:
    """The Beyond-MACs study on your device: the papers' claims about execution time, measured, each with a verdict and its evidence."""
    from lowsearch.insights.study import insights as measure
    from lowsearch.insights.study import insights_path

    target = _target(device, runtime, precision=precision, threads=threads)
    with _progress() as progress:
        found = measure(target, claims=claim, progress=progress)
    path = insights_path(target)
    if as_json:
        _print_json(found.to_dict())
    else:
        from lowsearch.report.insights import build_insights

        rows = [{"#": f.claim.number, "claim": f.claim.statement, "verdict": f.verdict} for f in found.findings]
        _print_rows(f"On {target}", rows)
        _tell(f"numbers: {path}")
        _tell(f"page: {build_insights(found, path.with_suffix('.html'))}")


@app.command()
def run(
    context: typer.Context,
    objective: Annotated[
        str,
        typer.Option("--objective", help="Joined by '-': acc, latency, throughput, imagetime, memory, size, energy, macs, params."),
    ] = "acc-latency",
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="cpu (default), cuda, or a name as rtx3090; several: one search for all, the first is measured."),
    ] = None,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="As onnxruntime, cudagraphs or openvino: one for all devices, or one for each.")
    ] = None,
    space: SpaceOption = "lowformer-micro",
    data: Annotated[
        str | None,
        typer.Option("--data", help="fashion-mnist-mini (default), or folder:, tiny-imagenet: or npz:PATH, or torchvision:NAME."),
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Time to search, as 8m (default), 90s or 1h30m.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Networks to propose, instead of a time.")] = None,
    study: Annotated[str | None, typer.Option("--study", help="Name of the study's folder; default: the objective.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    maximum: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="NAME=VALUE", help="A limit, as latency_ms=3, latency_ms@rtx3090=3, macs=1e9."),
    ] = None,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", metavar="NAME=VALUE", help="A limit, as accuracy=0.8 or throughput_ips=500.")
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", help="With which a network has to keep a limit on latency or throughput before it is tried.")
    ] = 0.9,
    sampler: Annotated[
        str, typer.Option("--sampler", help="What proposes networks: lowsearch, nsga2, nsga3, tpe, gp, random or exhaustive.")
    ] = "lowsearch",
    workers: Annotated[int, typer.Option("--workers", help="Processes that train side by side.")] = 2,
    train_device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option("--train-device", help="Where networks are trained; default: the GPU if one is searched for, else the CPU."),
    ] = None,
    accuracy: Annotated[
        Literal["trained", "params", "macs", "published"] | None,
        typer.Option("--accuracy", help="trained, or a score without training: published (224 px class), params or macs."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Training recipe: a name (`lowsearch recipes`) or a YAML file; default: micro.")
    ] = None,
    recipe_set: RecipeSetOption = None,
    final_seeds: Annotated[int | None, typer.Option("--final-seeds", help="Fresh trainings of every finalist.")] = None,
    precision: Annotated[list[str] | None, typer.Option("--precision", help="fp32 (default), fp16, bf16 or int8: one for all.")] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Images in one forward pass; default 1.")] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", min=1, help="CPU threads of the runtime; default 1, more are timed in wall time.")
    ] = None,
    allow_stale: Annotated[
        bool, typer.Option("--allow-stale", help="Use a latency table of this machine that other versions or another driver measured.")
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="A database server for the trials, as postgresql+psycopg://user@host/database."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="local, or trainings as tasks of Ray: ray (a cluster of its own), ray:auto or ray://host:port.")
    ] = "local",
    in_flight: Annotated[
        int | None, typer.Option("--in-flight", help="Trials proposed before the first is known; with Ray: twice the workers.")
    ] = None,
    trial_cpus: Annotated[float, typer.Option("--trial-cpus", help="CPUs of a task of Ray, and threads it trains on.")] = 1.0,
    trial_gpus: Annotated[
        float | None, typer.Option("--trial-gpus", help="GPUs of a task of Ray, as 0.25; default: 1 where it trains on GPUs.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Search: profile if needed, propose and train networks, then re-measure and train the front. The same command resumes."""
    import dataclasses

    from lowsearch import locations
    from lowsearch.report.page import build_report
    from lowsearch.report.study_files import read_study
    from lowsearch.search.objectives import parse_limits
    from lowsearch.study.run import run as run_study
    from lowsearch.study.settings import StudySettings, stored_settings

    folder = locations.new("studies") / _study_name(objective if study is None else study)
    asked: dict[str, Any] = {
        "device": ",".join(device or ["cpu"]), "runtime": ",".join(runtime) if runtime else None,
        "precision": _one("precision", precision, "fp32"), "batch": _one("batch", batch, 1), "threads": _one("threads", threads, 1),
        "space": space, "data": data,
        "objective": objective, "limits": parse_limits(maxima=maximum or [], minima=minimum or [], confidence=confidence),
        "budget_s": parse_budget(budget) if budget is not None else None, "trials": trials, "sampler": sampler, "seed": seed,
        "workers": workers, "recipe": _recipe_spec(recipe, recipe_set), "accuracy": accuracy, "final_seeds": final_seeds,
        "allow_stale": allow_stale, "train_device": train_device, "storage": _without_password(storage),
        "engine": engine, "in_flight": in_flight, "trial_cpus": trial_cpus, "trial_gpus": trial_gpus,
    }  # fmt: skip
    stored = stored_settings(folder)
    if stored is None:
        settings = StudySettings(**asked)
    else:  # A study goes on as it was made; only what was typed is asked of it anew.
        flags = {"limits": ("maximum", "minimum", "confidence"), "budget_s": ("budget",), "recipe": ("recipe", "recipe_set")}
        typed = {name for name in asked if any(_was_typed(context, flag) for flag in flags.get(name, (name,)))}
        settings = dataclasses.replace(stored, **{name: asked[name] for name in typed})
    with _progress() as progress:
        result = run_study(settings, folder, progress=progress)
    page = build_report(folder)
    if as_json:
        _print_json({"study": folder.name, "front": result.front, "summary": result.summary, "report": str(page)})
        return
    _print_front(read_study(folder), result.front)
    _print_sharing(result.summary)
    if settings.accuracy == "published":
        from lowsearch.accuracy.prior import RELATIVES_RMSE_POINTS, leave_one_out

        error = leave_one_out()
        _tell(
            f"scores are the trend of published accuracies, no accuracies: it foretells one of {error.n_networks} published networks from "
            f"the others to {error.rmse_points:.2f} points (they spread by {error.std_over_networks_points:.2f}), and networks of other "
            f"families to {RELATIVES_RMSE_POINTS:.1f} points"
        )
    _print_summary(result.summary)
    _tell(f"report: {page}")


@app.command()
def worker(
    study: Annotated[str, typer.Argument(help="Name or folder of a study that `lowsearch run` works on.")],
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that train side by side.")] = 2,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="Where this machine reaches the database, if not where the study says.")
    ] = None,
) -> None:
    """Train for a study that is being run, from another machine that shares its folder. Ends with its search."""
    from lowsearch.study.workers.joining import join

    folder = _study_folder(study)
    with _progress() as progress:
        scored = join(folder, workers=workers, url=_without_password(storage), progress=progress)
    _tell(f"the search is over, or nobody runs study {folder.name} any more; networks scored here: {scored}")


@app.command()
def report(study: Annotated[str, typer.Argument(help="Name or folder of a study.")]) -> None:
    """Write a study's interactive page again, also while it runs."""
    from lowsearch.report.page import build_report

    typer.echo(build_report(_study_folder(study)))


studies = typer.Typer(help="Studies as values: list, show, export, diff, merge.", rich_markup_mode=None)
app.add_typer(studies, name="study")
StudyName = Annotated[str, typer.Argument(help="Name or folder of a study.")]


@studies.command("list")
def list_studies(as_json: JsonFlag = False) -> None:
    """Every study here: when and for what it was made, how many networks it scored, and what it found."""
    from lowsearch.report.study_tools import list_studies as listed

    rows = listed()
    if as_json:
        _print_json(rows)
    elif rows:
        columns = list(dict.fromkeys(name for row in rows for name in row if name != "folder"))
        _print_table("Studies", columns, [[row.get(name) for name in columns] for row in rows])
    else:
        _tell("no study yet; make one: lowsearch run --objective acc-latency")


@studies.command("show")
def show_study(study: StudyName, as_json: JsonFlag = False) -> None:
    """A study's settings, its counts and its front."""
    from lowsearch.report.study_files import read_study
    from lowsearch.report.study_tools import show

    files = read_study(_study_folder(study))
    found = show(files)
    if as_json:
        _print_json(found)
        return
    values = {**found["settings"], "limits": ", ".join(found["settings"]["limits"] or ()) or "none"}
    values |= {name: found[name] for name in ("created", "scored", "finalists", "hypervolume")}
    _print_table(f"Study {found['name']}", ["what", "value"], [[name, _plain(value)] for name, value in values.items()])
    _print_front(files, found["front"])


@studies.command("export")
def export_study(
    study: StudyName, out: Annotated[Path, typer.Option("--out", help="File to write: .csv or .json.")], as_json: JsonFlag = False
) -> None:
    """All candidates and finalists with their architectures, in one file."""
    from lowsearch.report.study_files import read_study
    from lowsearch.report.study_tools import export

    n_rows = export(read_study(_study_folder(study)), out)
    if as_json:
        _print_json({"file": str(out), "rows": n_rows})
    else:
        typer.echo(f"{out}: {n_rows} rows")


@studies.command("diff")
def diff_studies(first: StudyName, second: StudyName, as_json: JsonFlag = False) -> None:
    """Which settings of two studies differ, and how their fronts compare."""
    from lowsearch.report.study_files import read_study
    from lowsearch.report.study_tools import diff

    found = diff(read_study(_study_folder(first)), read_study(_study_folder(second)))
    if as_json:
        _print_json(found)
        return
    if found["settings"]:
        changed = [[name, *map(_plain, pair)] for name, pair in found["settings"].items()]
        _print_table("Settings that differ", ["setting", first, second], changed)
    columns = ("name", "networks", "hypervolume", "dominated", "clearly")
    fronts = [{name: front[name] for name in columns} for front in found["fronts"]]
    _print_rows(f"Fronts, accuracy on {found['accuracy_on']} images, one reference point", fronts)
    for caveat in found["caveats"]:
        _tell(f"not alike: {caveat}")


@studies.command("merge")
def merge_studies(
    first: StudyName,
    second: StudyName,
    study: Annotated[str, typer.Option("--study", help="Name of the new study.")],
    as_json: JsonFlag = False,
) -> None:
    """Two searches of one space, data set, recipe and target as one study that can go on; anything else is refused."""
    from lowsearch import locations
    from lowsearch.study.merging import merge

    into = locations.new("studies") / _study_name(study)
    counts = merge(_study_folder(first), _study_folder(second), into)
    if as_json:
        _print_json({"study": study, **counts})
    else:
        typer.echo(f"{into}: {counts['first']} networks of {first}, {counts['second']} more of {second}, {counts['records']} trainings")
        _tell(f"it goes on with: lowsearch run --study {study} --budget …")


@app.command()
def explain(
    context: typer.Context,
    arch: Annotated[str, typer.Option("--arch", help="A preset, an arch.json, a family member's name, or an arch_id of the study.")],
    study: Annotated[str | None, typer.Option("--study", help="A study, for its networks, table and estimate of accuracy.")] = None,
    device: DeviceOption = "cpu",
    runtime: RuntimeOption = None,
    space: Annotated[str | None, typer.Option("--space", help="The space of the changes; default: the first with the network.")] = None,
    precision: PrecisionOption = "fp32",
    batch: BatchOption = 1,
    threads: ThreadsOption = 1,
    as_json: JsonFlag = False,
) -> None:
    """Where a network's time goes, and what every single change of it would do to latency, MACs, params and accuracy."""
    from lowsearch.space import SearchSpace
    from lowsearch.study import knowledge
    from lowsearch.study.explain import explain as take_apart

    if study is not None:
        typed = [name for name in ("device", "runtime", "space", "precision", "batch", "threads") if _was_typed(context, name)]
        if typed:
            raise UsageError(f"a study has its own {typed[0]}", hint=f"drop --{typed[0]}, or drop --study")
        known = knowledge.of_study(_study_folder(study))
        network = _network_in(known.space, arch, study)
    else:
        chosen = SearchSpace.load(space) if space is not None else None
        network = chosen.family[arch] if chosen is not None and arch in chosen.family else _network(arch)
        chosen = knowledge.space_of(network) if chosen is None else chosen.with_num_classes(network.num_classes)
        chosen.encode(network)
        known = knowledge.on_target(chosen, _target(device, runtime, precision=precision, batch=batch, threads=threads))
    found = take_apart(known, network)
    if as_json:
        _print_json(found.to_dict())
        return
    for title, parts in (("By stage", found.stages), ("By block", found.blocks)):
        _print_rows(
            f"{title}: {arch} ({network.arch_id}) on {found.target}",
            [
                {
                    "place": part.place, "kind": part.kind, "latency_ms": part.latency_ms, "latency %": round(100 * part.latency_share, 1),
                    "source": part.source, "MMACs": part.macs / 1e6, "MACs %": round(100 * part.macs_share, 1),
                    "Kparams": part.params / 1e3,
                }
                for part in parts
            ],
        )  # fmt: skip
    total = f"total {found.latency_ms:.4g} ± {found.latency_std_ms:.2g} ms ({found.latency_source}), {found.macs / 1e6:.4g} MMACs"
    total += f", peak memory {found.peak_memory_mb:.3g} MB, file {found.artifact_mb:.3g} MB"
    if found.score is not None and found.score_std is not None and found.score_source == "estimated":
        total += f", accuracy {100 * found.score:.1f} ± {100 * found.score_std:.1f} % (estimated)"
    typer.echo(f"{total}\n")
    misled = sum(bool(change.macs_say) for change in found.changes)
    if found.changes:
        title = f"One change: what it adds. MACs mislead about {misled} of {len(found.changes)}"
        _print_rows(title, [_change_row(change, found.score_source) for change in found.changes])


@app.command()
def refine(
    study: Annotated[str, typer.Argument(help="A study.")],
    arch: Annotated[str, typer.Option("--arch", help="arch_id of a network of the study, a preset or an arch.json.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many to print.")] = 10,
    enqueue: Annotated[int, typer.Option("--enqueue", min=0, help="Have the study train so many of the best at its next run.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Networks one or two changes away that are faster at equal estimated score, or better at equal latency, beyond the uncertainty."""
    from lowsearch.study import knowledge, refinement
    from lowsearch.study.workers.worker import Plan

    folder = _study_folder(study)
    plan, known = Plan.read(folder), knowledge.of_study(folder)
    network = _network_in(known.space, arch, study)
    found = refinement.refine(
        known, network, settings=plan.settings, reference=plan.reference, tried=refinement.tried_in(folder, known.space)
    )  # fmt: skip
    path = refinement.save(folder, found)
    waiting = refinement.enqueue(folder, plan.settings, known.space, found.leads[:enqueue]) if enqueue else []
    if as_json:
        _print_json({"study": folder.name, **found.to_dict(), "waiting": waiting, "file": str(path)})
        return
    title = f"{len(found.leads)} of {found.n_judged} untried networks one or two changes from {network.arch_id} promise more"
    if found.leads:
        _print_rows(
            title, [{"network": x.change.arch_id, "gain": x.gain, **_change_row(x.change, known.score_source)} for x in found.leads[:top]]
        )
    else:
        _tell(f"{title}: it is the best of its neighbourhood, as far as the predictors can tell")
    _tell(f"networks: {path}")
    if waiting:
        _tell(f"{len(waiting)} wait for training; a search that has spent its time needs more: lowsearch run --study {study} --budget …")


def _network_in(space: Any, name: str, study: str) -> Any:
    """A network of a study's space by what a user calls it, with the study's number of classes."""
    import dataclasses

    from lowsearch.presets import PRESETS

    if name in space.family:
        return space.family[name]
    if name.endswith(".json") or name in PRESETS:
        return dataclasses.replace(_network(name), num_classes=space.num_classes)
    return _network_of_study(study, name)[0]


def _change_row(change: Any, score_source: str) -> dict[str, Any]:
    """The row of a table for one `lowsearch.study.explain.Change`."""
    row = {
        "change": ", ".join(map(str, change.steps)), "latency_ms": change.latency_ms, "±": change.latency_std_ms,
        "latency %": round(100 * change.latency_share, 1), "MACs %": round(100 * change.macs_share, 1),
        "params %": round(100 * change.params_share, 1), "MACs say": change.macs_say,
    }  # fmt: skip
    if score_source == "estimated":
        row |= {"accuracy %": round(100 * change.score, 2), "± %": round(100 * change.score_std, 2)}
    return row


@app.command()
def train(
    what: Annotated[str, typer.Argument(help="A study, a preset, or a network's arch.json.")],
    arch: Annotated[str | None, typer.Option("--arch", help="arch_id of a network of the study.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data set; default: the study's, else fashion-mnist-mini.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A name (`lowsearch recipes`) or a YAML file; default: the study's, else micro.")
    ] = None,
    recipe_set: RecipeSetOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Train longer or shorter than the recipe says.")] = None,
    init: Annotated[
        Literal["random", "pretrained"],
        typer.Option("--init", help="pretrained: start from what fits of the nearest published network's weights."),
    ] = "random",
    weights: Annotated[
        Path | None, typer.Option("--weights", help="With --init pretrained: from this file of weights, instead of the hub.")
    ] = None,
    from_supernet: Annotated[
        str | None, typer.Option("--from-supernet", metavar="NAME", help="Start from the weights that this supernet holds for the network.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for weights and metrics; default: ./trained/<arch_id>-<recipe>-s<seed>.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train one network on the whole schedule. Resumes where it stopped; under torchrun on several GPUs or processes."""
    import dataclasses

    from lowsearch.data import load_data
    from lowsearch.study.assembly import schedule_of_study
    from lowsearch.train import recipe as recipe_named
    from lowsearch.train import require_trainable
    from lowsearch.train.distributed import launched_ranks
    from lowsearch.train.full import train_fully
    from lowsearch.train.recipe import DEFAULT_RECIPE, assignments

    network, defaults = _network_of_study(what, arch) if arch is not None else (_network(what), {})
    if recipe is None and arch is not None and (of_study := schedule_of_study(_study_folder(what))) is not None:
        schedule = of_study.changed(assignments(recipe_set or ()))
    else:
        schedule = recipe_named(_recipe_spec(recipe or DEFAULT_RECIPE, recipe_set))
    if epochs is not None:
        schedule = dataclasses.replace(schedule, name=f"{schedule.name}-{epochs}ep", epochs=epochs)
    images = load_data(data or defaults.get("data") or "fashion-mnist-mini")
    network = dataclasses.replace(network, num_classes=len(images.classes))
    require_trainable(device)
    if weights is not None and init != "pretrained":
        raise UsageError("--weights is given, but training starts from random weights", hint="--init pretrained")
    if from_supernet is not None and init != "random":
        raise UsageError(
            "training starts from published weights or from a supernet's, not from both", hint="drop --init or --from-supernet"
        )
    with launched_ranks(device) as ranks:
        start, origin = None, None
        if ranks.rank == 0 and init == "pretrained":
            start, origin = _pretrained(network, seed, weights)
        elif ranks.rank == 0 and from_supernet is not None:
            start, origin = _from_supernet(network, from_supernet, images)
        start, origin = ranks.agreed((start, origin))
        began = "" if origin is None else f"-from-{origin['source']}"
        folder = out or Path("trained") / f"{network.arch_id}-{schedule.name}{began}-s{seed}"
        with _progress() as progress:
            metrics = train_fully(
                network, images, schedule, seed=seed, folder=folder, init=start, origin=origin, device=device, ranks=ranks,
                progress=None if ranks.rank else lambda done: progress(round(100 * done), 100, f"train {network.arch_id}"),
            )  # fmt: skip
    if ranks.rank != 0:
        return
    if as_json:
        _print_json({**metrics, "folder": str(folder)})
        return
    shown = ("arch_id", "data", "recipe", "seed", "val_accuracy", "test_accuracy", "test_accuracy_std", "cpu_seconds")
    _print_table("Trained", ["what", "value"], [*([k, _plain(metrics[k])] for k in shown), ["folder", str(folder)]])


def _from_supernet(network: Any, name: str, images: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The weights that `network` inherits from a supernet, statistics included, and where they are from."""
    from lowsearch.train.supernet import inherit, load_supernet

    folder, plan = _supernet(name)
    model = inherit(load_supernet(folder), network, images)
    return model.state_dict(), {"source": f"supernet-{folder.name}", "supernet_hash": plan.supernet_hash, "share": 1.0}


def _pretrained(network: Any, seed: int, weights: Path | None) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The weights that `network` starts from, and what it inherited, which is told."""
    import dataclasses

    from lowsearch.model.inherit import pretrained_start

    model, inherited = pretrained_start(network, seed=seed, weights=weights)
    without = [place for place, share in inherited.blocks.items() if not share]
    _tell(
        f"{100 * inherited.share:.1f} % of the parameters inherited from {inherited.source}"
        + (f"; nothing by {', '.join(without)}" if without else "")
    )
    return model.state_dict(), {**dataclasses.asdict(inherited), "share": inherited.share}


@app.command()
def recipes(as_json: JsonFlag = False) -> None:
    """The training recipes by name, with their fields, as --recipe-set and a YAML file take them."""
    from lowsearch.train import RECIPES

    values = {name: make().to_dict() for name, make in RECIPES.items()}
    if as_json:
        _print_json(values)
        return
    fields = [field for field in next(iter(values.values())) if field not in ("name", "teacher_hash")]
    rows = [[field, *(json.dumps(recipe[field]) for recipe in values.values())] for field in fields]
    _print_table("Recipes", ["field", *values], rows)


supernets = typer.Typer(help="A supernet: all networks of a space in one store of weights.", rich_markup_mode=None)
app.add_typer(supernets, name="supernet")


@supernets.command("train")
def train_supernet(
    context: typer.Context,
    space: SpaceOption = "lowformer-micro",
    data: Annotated[str, typer.Option("--data", help="Data set, as of `lowsearch train`.")] = "fashion-mnist-mini",
    budget: Annotated[str, typer.Option("--budget", help="Time to train, as 10m: the steps of the schedule are fixed by it.")] = "10m",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps, instead of a time.")] = None,
    max_macs: Annotated[
        float | None, typer.Option("--max-macs", help="Train only networks up to so many, as 13e6: most steps for your time.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the supernet's folder; default: from space and data.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Train all networks of a space together. Resumes where it stopped; under torchrun on several GPUs or processes."""
    import dataclasses

    from lowsearch import locations
    from lowsearch.data import load_data
    from lowsearch.space import SearchSpace
    from lowsearch.train import require_trainable
    from lowsearch.train.distributed import launched_ranks
    from lowsearch.train.supernet import SupernetPlan, read_plan, steps_within
    from lowsearch.train.supernet import train_supernet as train_shared

    seconds = parse_budget(budget)
    require_trainable(device)
    folder = locations.new("supernets") / _study_name(name or f"{Path(space).stem}-{Path(data.replace(':', '/')).stem}")
    stored = read_plan(folder)
    if stored is not None and not _was_typed(context, "data"):
        data = stored.data
    images = load_data(data)
    with launched_ranks(device) as ranks:
        asked: dict[str, Any] = {"max_macs": max_macs, "seed": seed, "steps": steps or 1}
        if stored is None or _was_typed(context, "space"):
            asked["space"] = SearchSpace.load(space).text
        asked |= {"data": images.name, "data_hash": images.data_hash, "num_classes": len(images.classes), "processes": ranks.size}
        if stored is None:
            plan = SupernetPlan(**asked)
            if steps is None:
                plan = dataclasses.replace(plan, steps=steps_within(seconds, plan, images, device=device, ranks=ranks))
        else:  # It goes on as it was made; what was typed must agree.
            kept = {flag for flag in ("max_macs", "seed", "steps") if not _was_typed(context, flag)}
            plan = dataclasses.replace(stored, **{key: value for key, value in asked.items() if key not in kept})
        with _progress() as progress:
            train_shared(plan, images, folder, device=device, ranks=ranks, progress=progress if ranks.rank == 0 else None)
    if ranks.rank != 0:
        return
    facts = {"supernet": folder.name, "steps": plan.steps, "data": plan.data, "max_macs": plan.max_macs, "folder": str(folder)}
    if as_json:
        _print_json(facts)
    else:
        _print_table("Supernet", ["what", "value"], [[key, _plain(value)] for key, value in facts.items()])
        _tell(f"what its networks score: lowsearch supernet score {folder.name} --arch …")


@supernets.command("score")
def score_supernet(
    name: Annotated[str, typer.Argument(help="Name or folder of a supernet.")],
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", help="A preset, an arch.json, a member of the space's family or, with --study, an id; may be repeated."),
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Networks of this study: all of them, or those of --arch.")] = None,
    calibrate: Annotated[
        str | None, typer.Option("--calibrate", help="A study, or a records.jsonl: estimate accuracies as trained there, with an interval.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data set, where it has moved; default: the supernet's.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Score networks by the weights of a supernet: ranks, or calibrated on trained networks, estimates of their accuracy."""
    from lowsearch import cost as costs
    from lowsearch.accuracy.ladder import RECORDS
    from lowsearch.accuracy.records import AccuracyRecords
    from lowsearch.accuracy.supernet import SupernetEstimator
    from lowsearch.data import load_data
    from lowsearch.train import require_trainable

    if not (arch or study):
        raise UsageError("no network was named", hint=f"lowsearch supernet score {name} --arch micro-b-s, or --study NAME")
    require_trainable(device)
    folder, plan = _supernet(name)
    estimator = SupernetEstimator(folder, load_data(data or plan.data), device=device)
    if study and not arch:
        networks, _ = _networks_of_study(study, [""])
        fitting = {key: network for key, network in networks.items() if estimator.holds(network)}
        if len(fitting) < len(networks):
            _tell(f"{len(networks) - len(fitting)} of {len(networks)} networks of the study are not ones that the supernet was trained for")
    else:
        fitting = {key: _network_in(estimator.space, key, study) if study else _member(estimator.space, key) for key in arch or ()}
    with _progress() as progress:
        if calibrate is not None:
            records = Path(calibrate) if calibrate.endswith(".jsonl") else _study_folder(calibrate) / RECORDS
            if not records.is_file():
                raise UsageError(f"no trained networks: there is no {records}", hint="give a study, or a records.jsonl")
            estimator.calibrate(AccuracyRecords(records), progress=progress)
        scores = estimator.score(list(fitting.values()), progress=progress)
    mean, std = estimator.estimate(list(fitting.values()))
    rows = []
    for key, score, top1, top1_std in zip(fitting, scores, mean, std, strict=True):
        counted = costs.count(score.arch)
        row: dict[str, Any] = {"network": key, "macs": counted.macs, "params": counted.params}
        row |= {"inherited_accuracy": score.val_accuracy, "inherited_loss": score.val_loss, "unit": estimator.unit}
        rows.append({**row, "estimate": float(top1), "estimate_std": float(top1_std)})
    rows.sort(key=lambda row: row["estimate"], reverse=True)
    if as_json:
        _print_json({"supernet": folder.name, "unit": estimator.unit, "networks": rows})
        return
    if not rows:
        _tell("none of the networks is one that the supernet was trained for")
        return
    if estimator.unit == "top1":
        shown = [
            {**row, "estimate": f"{100 * row['estimate']:.2f} %", "estimate_std": f"{100 * row['estimate_std']:.2f} %"} for row in rows
        ]
        _print_rows(f"Supernet {folder.name}: estimated accuracy", shown)
    else:
        _print_rows(f"Supernet {folder.name}: estimate is minus the inherited loss; it ranks, and is no accuracy of a training", rows)


def _supernet(name: str) -> tuple[Path, Any]:
    """The folder and the plan of a supernet by its name or folder."""
    from lowsearch import locations
    from lowsearch.train.supernet import PLAN, read_plan

    found = Path(name) if (Path(name) / PLAN).is_file() else locations.find("supernets", name)
    plan = read_plan(found) if found is not None else None
    if found is None or plan is None:
        known = sorted({p.parent.name for folder in locations.folders("supernets") for p in folder.glob(f"*/{PLAN}")})
        raise StudyError(f"no supernet {name!r}", hint=f"known: {', '.join(known)}" if known else "lowsearch supernet train")
    return found, plan


def _member(space: Any, name: str) -> Any:
    """A network by what a user calls it, with the space's number of classes."""
    import dataclasses

    return space.family[name] if name in space.family else dataclasses.replace(_network(name), num_classes=space.num_classes)


@app.command()
def proxies(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", help="A preset, an arch.json or, with --study, an id; may be repeated.")
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Networks of this study: all of them, or those of --arch.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data set; default: the study's, else fashion-mnist-mini.")] = None,
    images: Annotated[int, typer.Option("--images", min=4, help="Images in the batch that the proxies look at.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random weights.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Training-free scores of networks: NASWOT, SynFlow, ZiCo and AZ-NAS, beside params and MACs. They are no accuracies."""
    import dataclasses

    import numpy as np

    from lowsearch import cost as costs
    from lowsearch.accuracy.proxies import proxy_scores
    from lowsearch.data import load_data

    if not (arch or study):
        raise UsageError("no network was named", hint="lowsearch proxies --arch lowformer_b1, or --study NAME")
    networks, defaults = _networks_of_study(study, arch or [""]) if study else ({name: _network(name) for name in arch or ()}, {})
    loaded = load_data(data or defaults.get("data") or "fashion-mnist-mini")
    batch = loaded.train.take(np.arange(min(images, len(loaded.train))))
    archs = [dataclasses.replace(network, num_classes=len(loaded.classes)) for network in networks.values()]
    with _progress() as progress:
        scores = proxy_scores(archs, batch, seed=seed, progress=progress)
    rows = []
    for i, (name, network) in enumerate(zip(networks, archs, strict=True)):
        counted = costs.count(network)
        rows.append({"network": name, "params": counted.params, "macs": counted.macs, **{k: float(v[i]) for k, v in scores.items()}})
    if as_json:
        _print_json({"data": loaded.name, "images": len(batch), "seed": seed, "networks": rows})
    else:
        _print_rows(f"Proxies on {len(batch)} images of {loaded.name}: scores, not accuracies; AZ-NAS ranks these networks only", rows)


@app.command()
def trust(
    study: Annotated[str, typer.Argument(help="Name or folder of a study.")],
    networks: Annotated[int, typer.Option("--networks", min=5, help="Networks held out, at least.")] = 12,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each; two give the ceiling.")] = 1,
    as_json: JsonFlag = False,
) -> int:
    """Examine a study's accuracy predictor on networks it never saw, trained for that. Resumes; exit code 1 where it is not trusted."""
    from lowsearch.study.trust import trust as examine

    folder = _study_folder(study)
    with _progress() as progress:
        found = examine(folder, n_networks=networks, n_seeds=seeds, progress=progress)
    if as_json:
        _print_json(found.to_dict())
    else:
        rows = [
            {
                "signal": row["signal"], "latency": row["band"] or "all", "networks": row["n_networks"],
                "Spearman": _rounded(row["spearman"]), "95 %": _interval(row["low"], row["high"]),
                "Kendall": _rounded(row["kendall"]), "95 % ": _interval(row["kendall_low"], row["kendall_high"]),
            }
            for row in found.rows()
        ]  # fmt: skip
        _print_rows(f"{found.n_networks} held-out networks, trained with {found.n_seeds} seed{'s' * (found.n_seeds > 1)} each", rows)
        typer.echo(f"verdict: {found.verdict}: {found.reason}")
        if found.ceiling is not None:
            _tell(
                f"ceiling: with {found.n_seeds} seeds each, a predictor that knew these networks would reach Spearman {found.ceiling:.2f}"
            )
        _tell(
            f"{100 * found.coverage:.0f} % of the accuracies lie within the predictor's 90 % intervals; "
            f"it learned from {found.n_records} networks of the study"
        )
        _tell(f"numbers: {folder / 'trust.json'}; lowsearch report {folder.name} shows them")
    return 1 if found.verdict == "not trusted" else 0


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"


def _recipe_spec(recipe: str | None, changes: Sequence[str] | None) -> Any:
    """The recipe that the flags mean, as one string; None where none was given."""
    if recipe is None and not changes:
        return None
    from lowsearch.train.recipe import DEFAULT_RECIPE, recipe_spec

    return recipe_spec(recipe or DEFAULT_RECIPE, changes or ())


def _was_typed(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _one(name: str, values: Sequence[Any] | None, default: Any) -> Any:
    """The value of an option that holds for all devices of a search. Raises UsageError where there are several."""
    different = list(dict.fromkeys(values or [default]))
    if len(different) > 1:
        raise UsageError(
            f"--{name} is given as {' and '.join(map(str, different))}: one search has one {name}, on every device",
            hint=f"--{name} {different[0]}, and another study for the other",
        )
    return different[0]


def _without_password(url: str | None) -> str | None:
    """The url of a storage as it may be stored; its password goes where this process and its workers read it."""
    if url is None:
        return None
    from lowsearch.study.workers.database import PASSWORD, split_password

    bare, password = split_password(url)
    if password is not None:
        os.environ[PASSWORD] = password
    return bare


def _study_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"study name {name!r} is no folder name", hint="use letters, digits, dots, dashes and underscores")
    return name


def _study_folder(name: str) -> Path:
    from lowsearch import locations

    found = Path(name) if (Path(name) / "study.yaml").is_file() else locations.find("studies", name)
    if found is None or not (found / "study.yaml").is_file():
        known = sorted({p.parent.name for folder in locations.folders("studies") for p in folder.glob("*/study.yaml")})
        raise StudyError(f"no study {name!r}", hint=f"known: {', '.join(known)}" if known else "lowsearch run --objective acc-latency")
    return found


def _network_of_study(study: str, arch_id: str) -> tuple[Any, Mapping[str, Any]]:
    """A network of a study by its id or the beginning of it, and the study's settings."""
    found, settings = _networks_of_study(study, [arch_id])
    if len(found) != 1:
        hint = f"{_study_folder(study) / 'front.csv'} lists the front's"
        raise StudyError(f"study {study!r} has {len(found)} networks whose id begins with {arch_id!r}", hint=hint)
    return next(iter(found.values())), settings


def _networks_of_study(study: str, beginnings: Sequence[str]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """arch_id -> network of a study, of those whose id begins with one of `beginnings`; and the study's settings."""
    import yaml

    from lowsearch.arch import Arch

    folder = _study_folder(study)
    try:
        networks = json.loads((folder / "networks.json").read_text(encoding="utf-8"))
        settings = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
        found = {key: values for key, values in networks.items() if key.startswith(tuple(beginnings))}
    except (ValueError, TypeError, AttributeError, FileNotFoundError, yaml.YAMLError) as error:
        raise StudyError(f"study {folder} has no readable networks.json and study.yaml", hint=f"lowsearch run --study {study}") from error
    if not found:
        named = ", ".join(map(repr, beginnings))
        raise StudyError(f"study {study!r} has no network {named}", hint=f"{folder / 'front.csv'} lists the front's")
    return {key: Arch.from_dict(values["arch"]) for key, values in found.items()}, settings if isinstance(settings, dict) else {}


def _target(device: str, runtime: str | None, **settings: Any) -> Any:
    """The Target that a user means, with the device's usual runtime where none was named."""
    from lowsearch.latency.table import default_runtime
    from lowsearch.latency.target import resolve_target

    return resolve_target(device, runtime or default_runtime(device), **settings)


def _network(name: str) -> Any:
    from lowsearch.arch import Arch
    from lowsearch.presets import preset

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no such file: {name}", hint="give a preset's name or the arch.json of a network")
        return Arch.from_json(path.read_text(encoding="utf-8"))
    return preset(name)


def _print_front(study: Any, front: Sequence[Mapping[str, Any]]) -> None:
    """`study`: its files. Metrics beyond the usual ones are shown where it has objectives or limits on them."""
    from lowsearch.report.tables import UNITS, asked_metrics

    headings = {"throughput_ips": "images/s", "time_per_image_ms": "ms/image", "peak_memory_mb": "memory MB", "artifact_mb": "file MB"}
    headings["energy_mj"] = "energy mJ"
    asked = [metric for metric in UNITS if metric in headings and metric in asked_metrics(study)]
    trained = any(row.get("test_accuracy") is not None for row in front)
    rows = [
        {"network": row.get("name") or row["arch_id"], "origin": row["origin"]}
        | (
            {"val %": _percent(row, "val_accuracy"), "test %": _percent(row, "test_accuracy"), "± %": _percent(row, "accuracy_std")}
            if trained
            else {"score": row["score"], "± score": row.get("score_std"), "score source": row["accuracy_source"]}
            if "score" in row
            else {}
        )
        | {"latency_ms": row["latency_ms"], "±": row["latency_std_ms"], "source": row["latency_source"]}
        | _on_other_devices(study, row)
        | {headings[metric]: _whole_where_large(row.get(metric)) for metric in asked}
        | {"MMACs": row["macs"] / 1e6, "Mparams": row["params"] / 1e6, "px": row["resolution_px"]}
        for row in sorted(front, key=lambda row: row["latency_ms"])
    ]
    if rows:
        _print_rows(f"Front of {study.name}: {len(rows)} networks", rows)
    else:
        _tell("the front is empty: no network kept the limits")


def _on_other_devices(study: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a front's row that a study of several devices adds: latency on all but the first, and the worst case."""
    others = list(study.settings.get("devices") or ())[1:]
    columns = {f"ms on {other['device']} ({other['latency_source']})": row[f"latency_ms@{other['device']}"] for other in others}
    return {**columns, "worst": row["worst_latency"]} if others else {}


def _print_sharing(summary: Mapping[str, Any]) -> None:
    """What one network for all devices costs, in a search of several."""
    if "sharing" not in summary:
        return
    rows = [
        {"network for": "all devices" if name == "shared" else f"{name} alone", "networks": front["networks"]}
        | {f"on {device} %": _slower(front["mean_regret"][device]) for device in summary["sharing"]["devices"]}
        | {"worst device %": _slower(front["mean_worst_regret"]), "at most %": _slower(front["worst_regret"])}
        for name, front in summary["sharing"]["fronts"].items()
    ]
    _print_rows("What sharing costs: % slower than a device's own networks of no lower score", rows)


def _slower(regret: float | None) -> float | None:
    return None if regret is None else round(100 * (regret - 1), 1)


def _whole_where_large(value: float | None) -> float | None:
    return round(value) if value is not None and value >= 1000 else value


def _percent(row: Mapping[str, Any], key: str) -> float | None:
    return round(100 * row[key], 2) if isinstance(row.get(key), float) else None


def _print_summary(summary: Mapping[str, Any]) -> None:
    if summary["steering_ended"]:
        _tell(summary["steering_ended"])
    elif (forecast := summary["forecast"])["low"] is not None:
        _tell(
            f"forecasts from the lowest rung rank {forecast['n_networks']} fully trained networks with Spearman {forecast['spearman']:.2f} "
            f"({forecast['low']:.2f} to {forecast['high']:.2f}); on networks held out for it: lowsearch trust"
        )
    if (verified := summary["verified"])["networks"]:
        worst = f", the worst by {100 * verified['worst_excess']:.1f} %; those were not trained" if verified["over"] else ""
        _tell(f"candidates near the latency limit, measured before training: {verified['networks']}; over it: {verified['over']}{worst}")
    limit = summary["limit"]
    if limit["broken"]:
        _tell(
            f"{limit['broken']} of {limit['limited']} shortlisted networks broke the latency limit when measured, "
            f"the worst by {100 * limit['worst_excess']:.1f} %; a network over it is trained only where none keeps it"
        )
    elif limit["limited"]:
        _tell(f"all {limit['limited']} shortlisted networks kept the latency limit when measured")
    pace = summary["pace"]
    if pace is not None and abs(pace - 1) >= 0.02:
        change = f"{100 * abs(pace - 1):.0f} % {'slower' if pace > 1 else 'faster'}"
        _tell(f"the machine was {change} when it measured the shortlist than when it measured the table")
    if summary.get("exhausted"):
        _tell("the search has ended early: no network within the limits is left to try")
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in summary["spent_s"].items())
    _tell(f"{summary['candidates']['complete']} networks scored, {summary['finalists']} finalists ({spent})")


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


def _print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    _print_table(title, list(rows[0]), [list(row.values()) for row in rows])


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    numeric = [all(isinstance(row[i], int | float) for row in rows) and bool(rows) for i in range(len(columns))]
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(value) for value in row))
    console = Console() if sys.stdout.isatty() else Console(width=200)  # A pipe has no width to fit.
    console.print(table)


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


def _verbs() -> set[str]:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return commands | {str(group.name) for group in app.registered_groups}
