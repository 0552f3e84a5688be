"""Verbs about studies that were run: report, study, explain, refine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowsearch.cli.found import print_front
from lowsearch.cli.options import BatchOption, DeviceOption, JsonFlag, PrecisionOption, RuntimeOption, StudyName, ThreadsOption
from lowsearch.cli.output import plain, print_json, print_rows, print_table, tell
from lowsearch.cli.typed import checked_study_name, network_in_space, network_named, study_folder, target_named, was_typed
from lowsearch.errors import UsageError


def report(study: Annotated[str, typer.Argument(help="Name or folder of a study.")]) -> None:
    """Write a study's interactive page again, also while it runs."""
    from lowsearch.report.page import build_report

    typer.echo(build_report(study_folder(study)))


studies = typer.Typer(help="Studies as values: list, show, export, diff, merge.", rich_markup_mode=None)


@studies.command("list")
def list_studies(as_json: JsonFlag = False) -> None:
    """Every study here: when and for what it was made, how many networks it scored, and what it found."""
    from lowsearch.report.study_tools import list_studies as listed

    rows = listed()
    if as_json:
        print_json(rows)
    elif rows:
        columns = list(dict.fromkeys(name for row in rows for name in row if name != "folder"))
        print_table("Studies", columns, [[row.get(name) for name in columns] for row in rows])
    else:
        tell("no study yet; make one: lowsearch run --objective acc-latency")


@studies.command("show")
def show_study(study: StudyName, as_json: JsonFlag = False) -> None:
    """A study's settings, its counts and its front."""
    from lowsearch.report.study_files import read_study
    from lowsearch.report.study_tools import show

    files = read_study(study_folder(study))
    found = show(files)
    if as_json:
        print_json(found)
        return
    values = {**found["settings"], "limits": ", ".join(found["settings"]["limits"] or ()) or "none"}
    values |= {name: found[name] for name in ("created", "scored", "finalists", "hypervolume")}
    print_table(f"Study {found['name']}", ["what", "value"], [[name, plain(value)] for name, value in values.items()])
    print_front(files, found["front"])


@studies.command("export")
def export_study(
    study: StudyName, out: Annotated[Path, typer.Option("--out", help="File to write: .csv or .json.")], as_json: JsonFlag = False
) -> None:
    """All candidates and finalists with their architectures, in one file."""
    from lowsearch.report.study_files import read_study
    from lowsearch.report.study_tools import export

    n_rows = export(read_study(study_folder(study)), out)
    if as_json:
        print_json({"file": str(out), "rows": n_rows})
    else:
        typer.echo(f"{out}: {n_rows} rows")


@studies.command("diff")
def diff_studies(first: StudyName, second: StudyName, as_json: JsonFlag = False) -> None:
    """Which settings of two studies differ, and how their fronts compare."""
    from lowsearch.report.study_files import read_study
    from lowsearch.report.study_tools import diff

    found = diff(read_study(study_folder(first)), read_study(study_folder(second)))
    if as_json:
        print_json(found)
        return
    if found["settings"]:
        changed = [[name, *map(plain, pair)] for name, pair in found["settings"].items()]
        print_table("Settings that differ", ["setting", first, second], changed)
    columns = ("name", "networks", "hypervolume", "dominated", "clearly")
    fronts = [{name: front[name] for name in columns} for front in found["fronts"]]
    print_rows(f"Fronts, accuracy on {found['accuracy_on']} images, one reference point", fronts)
    for caveat in found["caveats"]:
        tell(f"not alike: {caveat}")


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

    into = locations.new("studies") / checked_study_name(study)
    counts = merge(study_folder(first), study_folder(second), into)
    if as_json:
        print_json({"study": study, **counts})
    else:
        typer.echo(f"{into}: {counts['first']} networks of {first}, {counts['second']} more of {second}, {counts['records']} trainings")
        tell(f"it goes on with: lowsearch run --study {study} --budget …")


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
        typed = [name for name in ("device", "runtime", "space", "precision", "batch", "threads") if was_typed(context, name)]
        if typed:
            raise UsageError(f"a study has its own {typed[0]}", hint=f"drop --{typed[0]}, or drop --study")
        known = knowledge.of_study(study_folder(study))
        network = network_in_space(known.space, arch, study)
    else:
        chosen = SearchSpace.load(space) if space is not None else None
        network = chosen.family[arch] if chosen is not None and arch in chosen.family else network_named(arch)
        chosen = knowledge.space_of(network) if chosen is None else chosen.with_num_classes(network.num_classes)
        chosen.encode(network)
        known = knowledge.on_target(chosen, target_named(device, runtime, precision=precision, batch=batch, threads=threads))
    found = take_apart(known, network)
    if as_json:
        print_json(found.to_dict())
        return
    for title, parts in (("By stage", found.stages), ("By block", found.blocks)):
        print_rows(
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
    if found.score is not None:
        (what, score), (_, std) = _score_columns(found.score, found.score_std, found.score_unit).items()
        total += f", {what} {plain(score)}" + (f" ± {plain(std)}" if std is not None else "") + f" ({found.score_source})"
    typer.echo(f"{total}\n")
    misled = sum(bool(change.macs_say) for change in found.changes)
    if found.changes:
        title = f"One change: what it adds. MACs mislead about {misled} of {len(found.changes)}"
        print_rows(title, [_change_row(change, found.score_unit) for change in found.changes])


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

    folder = study_folder(study)
    plan, known = Plan.read(folder), knowledge.of_study(folder)
    network = network_in_space(known.space, arch, study)
    found = refinement.refine(
        known, network, settings=plan.settings, reference=plan.reference, tried=refinement.tried_in(folder, known.space)
    )  # fmt: skip
    path = refinement.save(folder, found)
    waiting = refinement.enqueue(folder, plan.settings, known.space, found.leads[:enqueue]) if enqueue else []
    if as_json:
        print_json({"study": folder.name, **found.to_dict(), "waiting": waiting, "file": str(path)})
        return
    title = f"{len(found.leads)} of {found.n_judged} untried networks one or two changes from {network.arch_id} promise more"
    if found.leads:
        print_rows(
            title, [{"network": x.change.arch_id, "gain": x.gain, **_change_row(x.change, known.score_unit)} for x in found.leads[:top]]
        )
    else:
        tell(f"{title}: it is the best of its neighbourhood, as far as the predictors can tell")
    tell(f"networks: {path}")
    if waiting:
        tell(f"{len(waiting)} wait for training; a search that has spent its time needs more: lowsearch run --study {study} --budget …")


def _change_row(change: Any, score_unit: str) -> dict[str, Any]:
    """The row of a table for one `lowsearch.study.explain.Change`."""
    row = {
        "change": ", ".join(map(str, change.steps)), "latency_ms": change.latency_ms, "±": change.latency_std_ms,
        "latency %": round(100 * change.latency_share, 1), "MACs %": round(100 * change.macs_share, 1),
        "params %": round(100 * change.params_share, 1), "MACs say": change.macs_say,
    }  # fmt: skip
    return row if change.score is None else row | _score_columns(change.score, change.score_std, score_unit)


def _score_columns(score: float, std: float | None, unit: str) -> dict[str, Any]:
    """A score and its error, by headings that tell the unit."""
    if unit == "top1":
        return {"accuracy %": round(100 * score, 2), "± %": None if std is None else round(100 * std, 2)}
    return {"score (rank)": score, "± score": std}
