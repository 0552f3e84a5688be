"""Verbs about devices and their latency tables: devices, profile, table, compare, insights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowsearch.cli.options import BatchOption, DeviceOption, JsonFlag, PrecisionOption, RuntimeOption, SpaceOption, ThreadsOption
from lowsearch.cli.output import plain, print_json, print_rows, print_table, progress_bar, tell
from lowsearch.cli.typed import target_named
from lowsearch.errors import UsageError


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
        print_json({"devices": attached, "tables": tables})
        return
    print_rows("Attached", attached)
    if tables:
        print_rows("Latency tables", tables)
    if not known_tables():
        tell("no latency table was measured here yet; measure one: lowsearch profile --device cpu --runtime onnxruntime")


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
        bool, typer.Option("--quick", help="Measure fewer blocks, for less time; the same command without it adds the others.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Do not lean on this machine's table of another batch: measure all blocks at this one.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order in which blocks are measured.")] = 0,
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
    target = target_named(device, runtime, precision=precision, batch=batch, threads=threads)
    if elsewhere:
        folder = bundle or Path("bundles") / f"{target.device}-{loaded.name}"
        _profile_elsewhere(loaded, target, folder, host, remote_python, max_blocks, seed, as_json)
        return
    with progress_bar() as progress:
        result = measure(loaded, target, max_blocks=max_blocks, seed=seed, quick=quick, alone=alone, progress=progress)
    print_profile(loaded, result, as_json)
    missing = sum(block not in result.entries for block in loaded.blocks)
    if quick and result.sibling is None and missing:
        tell(f"the same command without --quick measures more blocks: {target.profile_command} --space {space}")
    if result.sibling is not None and missing:
        tell(
            f"{missing:,} of {len(loaded.blocks):,} blocks are predicted from what they take at batch {result.sibling.batch} (table of "
            f"{result.sibling.date_utc}); the same command with --alone measures them: {target.profile_command} --space {space} --alone"
        )


def _profile_elsewhere(
    space: Any, target: Any, folder: Path, host: str | None, python: str, max_blocks: int | None, seed: int, as_json: bool
) -> None:
    """Write the bundle of `space`, and with a `host` measure it there and make the table."""
    from lowsearch.latency.bundle import RESULTS, make_bundle
    from lowsearch.latency.remote import measure_on_host

    with progress_bar() as progress:
        made = make_bundle(space, target, folder, max_blocks=max_blocks, seed=seed, progress=progress)
    if host is not None:
        with progress_bar() as progress:
            place = measure_on_host(made, host, python=python, progress=progress)
        tell(f"measured in {place}, which may be removed")
        _import_bundle(folder, as_json)
        return
    facts = {"bundle": str(folder), "target": str(target), "space": space.name, "items": len(made.items), "megabytes": made.n_bytes / 1e6}
    if as_json:
        print_json(facts)
        return
    print_table("Bundle", ["what", "value"], [[k, plain(v)] for k, v in facts.items()])
    tell(
        f"copy it to the machine, run `python3 run.py` in it (needs numpy and onnxruntime), bring {RESULTS} back into {folder}, "
        f"and run: lowsearch profile --import {folder}"
    )


def _import_bundle(folder: Path, as_json: bool) -> None:
    from lowsearch.latency.bundle import Bundle, import_results

    loaded = Bundle.load(folder)
    print_profile(loaded.space, import_results(loaded), as_json)


def print_profile(space: Any, table: Any, as_json: bool) -> None:
    """What was measured of `space`, and how well it predicts whole networks."""
    from lowsearch import locations
    from lowsearch.latency.predictor import LatencyPredictor

    summary = {
        **table.summary(), "blocks_of_space": len(space.blocks), "network_error_percent": 100 * LatencyPredictor(space, table).relative_std,
        "file": str(locations.new("latency_tables") / table.target.table_path),
    }  # fmt: skip
    if as_json:
        print_json(summary)
    else:
        print_table(f"Latency table of {table.target}", ["what", "value"], [[k, plain(v)] for k, v in summary.items()])
    again = table.context.measured_again
    tell(f"{_quality(table)}; {again} {'was' if again == 1 else 'were'} measured again" + (f"; {table.advice}" if table.advice else ""))


def _quality(table: Any) -> str:
    """How many rows of a table are worth what, in words."""
    counts = table.verdicts
    return f"{counts['valid']:,} of {sum(counts.values()):,} rows are valid, {counts['noisy']:,} noisy, {counts['invalid']:,} invalid"


tables = typer.Typer(help="Latency tables as files: show, check, merge, diff.", rich_markup_mode=None)
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
        print_json(facts)
    else:
        print_table(f"Latency table of {table.target}", ["what", "value"], [[k, plain(v)] for k, v in facts.items()])


@tables.command("check")
def check_table(name: TableName, as_json: JsonFlag = False) -> int:
    """Whether a table is whole, reliable, and may be used on this machine. Exit code 1 where it is not, 2 where it is damaged."""
    from lowsearch.latency.table_tools import open_table, why_unreliable, why_unusable

    table = open_table(name)
    reason = "; ".join(filter(None, (why_unreliable(table), why_unusable(table))))
    if as_json:
        print_json({**table.summary(), "usable": not reason, "reason": reason})
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
        print_json(rows)
    else:
        print_rows(f"{second} over {first}", rows)


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

    target = target_named(device, runtime, precision=precision, batch=batch, threads=threads)
    with progress_bar() as progress:
        rows = measure(networks, target, resolution_px=resolution, progress=progress)
    if out is not None:
        from lowsearch.report.comparison import build_comparison

        build_comparison(rows, str(target), out)
    if as_json:
        print_json(
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
    print_rows(f"Measured on {target}", shown)
    for advice in dict.fromkeys(r.verdict[1] for r in rows if r.verdict[1]):
        tell(f"not all are valid: {advice}")
    if out is not None:
        tell(f"page: {out}")


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

    target = target_named(device, runtime, precision=precision, threads=threads)
    with progress_bar() as progress:
        found = measure(target, claims=claim, progress=progress)
    path = insights_path(target)
    if as_json:
        print_json(found.to_dict())
    else:
        from lowsearch.report.insights import build_insights

        rows = [{"#": f.claim.number, "claim": f.claim.statement, "verdict": f.verdict} for f in found.findings]
        print_rows(f"On {target}", rows)
        tell(f"numbers: {path}")
        tell(f"page: {build_insights(found, path.with_suffix('.html'))}")
