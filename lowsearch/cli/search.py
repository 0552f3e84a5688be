"""Verbs that search: run, worker."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from lowsearch.cli.found import print_front, print_sharing, print_summary
from lowsearch.cli.options import JsonFlag, RecipeSetOption, SpaceOption
from lowsearch.cli.output import print_json, progress_bar, tell
from lowsearch.cli.typed import (
    checked_study_name,
    one_value,
    parse_budget,
    recipe_typed,
    study_file,
    study_folder,
    was_typed,
    without_password,
)
from lowsearch.errors import UsageError


def run(
    context: typer.Context,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="Joined by -: acc, latency, throughput, imagetime, worstlatency (on several devices), memory, size, energy, macs, params.",
        ),
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
        typer.Option(
            "--data",
            help="fashion-mnist-mini (default), or folder:, tiny-imagenet: or npz:PATH, or torchvision:NAME; a supernet has its own.",
        ),
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Time to search, as 8m (default), 90s or 1h30m.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Networks to propose, instead of a time.")] = None,
    study: Annotated[
        str | None, typer.Option("--study", "--name", help="Name of the study's folder; default: the objective, or with --from X: X-again.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STUDY", help="A new study by the settings of this one, or of a study.yaml; other options change them."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of proposals and trainings.")] = 0,
    maximum: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="NAME=VALUE", help="A limit, as latency_ms=3, latency_ms@rtx3090=3, macs=1e9."),
    ] = None,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", metavar="NAME=VALUE", help="A limit, as accuracy=0.8 or throughput_ips=500.")
    ] = None,
    confidence: Annotated[
        float,
        typer.Option(
            "--confidence", help="Probability with which a network has to keep a limit on latency or throughput before it is tried."
        ),
    ] = 0.9,
    sampler: Annotated[
        str, typer.Option("--sampler", help="What proposes networks: lowsearch, nsga2, nsga3, tpe, gp, random or exhaustive.")
    ] = "lowsearch",
    workers: Annotated[int, typer.Option("--workers", help="Processes that train side by side.")] = 2,
    train_device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(
            "--train-device",
            help="Where networks are trained, or scored by a supernet; default: the GPU if one is searched for, else the CPU.",
        ),
    ] = None,
    accuracy: Annotated[
        str | None,
        typer.Option(
            "--accuracy",
            help="trained (default), or a score without training: published (224 px class), macs, params or supernet:NAME.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Training recipe: a name (`lowsearch recipes`) or a YAML file; default: micro.")
    ] = None,
    recipe_set: RecipeSetOption = None,
    rungs: Annotated[
        str,
        typer.Option(
            "--rungs",
            help="When networks are judged, as shares of the passes; 0.25@0.5px@0.2img: at half the resolution, on a fifth of the images.",
        ),
    ] = "0.5,1",
    final_seeds: Annotated[
        int | None, typer.Option("--final-seeds", help="Fresh trainings of every finalist; default: 1, or 2 where the budget allows.")
    ] = None,
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
    warm_start: Annotated[
        list[str] | None,
        typer.Option(
            "--warm-start", metavar="STUDY", help="An earlier study of the same space, data and recipe to learn from; repeatable."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Search: profile if needed, propose and train networks, then re-measure and train the front. The same command resumes."""
    import dataclasses

    from lowsearch import locations
    from lowsearch.report.page import build_report
    from lowsearch.report.study_files import read_study
    from lowsearch.report.tables import supernet_in_words
    from lowsearch.search.objectives import parse_limits
    from lowsearch.study.run import run as run_study
    from lowsearch.study.settings import StudySettings, settings_in, stored_settings

    origin = None if source is None else study_file(source)
    named = objective if origin is None else f"{origin.parent.name if origin.name == 'study.yaml' else origin.stem}-again"
    folder = locations.new("studies") / checked_study_name(named if study is None else study)
    if origin is not None and origin.resolve() == (folder / "study.yaml").resolve():
        raise UsageError(f"{folder.name!r} is the study that --from names", hint="give the new one a name: --name NEW")
    asked: dict[str, Any] = {
        "device": ",".join(device or ["cpu"]), "runtime": ",".join(runtime) if runtime else None,
        "precision": one_value("precision", precision, "fp32"), "batch": one_value("batch", batch, 1),
        "threads": one_value("threads", threads, 1),
        "space": space, "data": data, "objective": objective,
        "limits": parse_limits(maxima=maximum or [], minima=minimum or [], confidence=confidence),
        "budget_s": parse_budget(budget) if budget is not None else None, "trials": trials, "sampler": sampler, "seed": seed,
        "workers": workers, "recipe": recipe_typed(recipe, recipe_set), "rungs": rungs, "accuracy": accuracy, "final_seeds": final_seeds,
        "allow_stale": allow_stale, "train_device": train_device, "storage": without_password(storage),
        "engine": engine, "in_flight": in_flight, "trial_cpus": trial_cpus, "trial_gpus": trial_gpus,
        "warm_start": tuple(dict.fromkeys(warm_start or ())),
    }  # fmt: skip
    stored = stored_settings(folder) if origin is None else settings_in(origin)
    if stored is None:
        settings = StudySettings(**asked)
    else:  # A study goes on as it was made; only what was typed is asked of it anew.
        flags = {"limits": ("maximum", "minimum", "confidence"), "budget_s": ("budget",), "recipe": ("recipe", "recipe_set")}
        typed = {name for name in asked if any(was_typed(context, flag) for flag in flags.get(name, (name,)))}
        typed |= {"budget_s", "trials"} if typed & {"budget_s", "trials"} else set()  # What was typed of the length is all of it.
        if origin is not None and "device" in typed:  # Another device has another runtime.
            typed.add("runtime")
        settings = dataclasses.replace(stored, **{name: asked[name] for name in typed})
    with progress_bar() as progress:
        result = run_study(settings, folder, progress=progress)
    page = build_report(folder)
    if as_json:
        print_json({"study": folder.name, "front": result.front, "summary": result.summary, "report": str(page)})
        return
    print_front(read_study(folder), result.front)
    print_sharing(result.summary)
    if settings.accuracy == "published":
        from lowsearch.accuracy.prior import RELATIVES_RMSE_POINTS, leave_one_out

        error = leave_one_out()
        tell(
            f"scores are the trend of published accuracies, no accuracies: it foretells one of {error.n_networks} published networks from "
            f"the others to {error.rmse_points:.2f} points (they spread by {error.std_over_networks_points:.2f}), and networks of other "
            f"families to {RELATIVES_RMSE_POINTS:.1f} points"
        )
    if settings.supernet:
        tell(f"scores are no accuracies. {supernet_in_words(read_study(folder).settings['supernet'])}")
    print_summary(result.summary)
    tell(f"report: {page}")


def worker(
    study: Annotated[str, typer.Argument(help="Name or folder of a study that `lowsearch run` works on.")],
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that train side by side.")] = 2,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="Where this machine reaches the database, if not where the study says.")
    ] = None,
) -> None:
    """Train for a study that is being run, from another machine that shares its folder. Ends with its search."""
    from lowsearch.study.workers.joining import join

    folder = study_folder(study)
    with progress_bar() as progress:
        scored = join(folder, workers=workers, url=without_password(storage), progress=progress)
    tell(f"the search is over, or nobody runs study {folder.name} any more; networks scored here: {scored}")
