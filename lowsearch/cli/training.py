"""Verbs that train networks and judge estimates of their accuracy: train, recipes, supernet, proxies, trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowsearch.cli.options import JsonFlag, RecipeSetOption, SpaceOption
from lowsearch.cli.output import interval_text, load_images, plain, print_json, print_rows, print_table, progress_bar, rounded, tell
from lowsearch.cli.typed import (
    checked_study_name,
    member_named,
    network_in_space,
    network_named,
    network_of_study,
    networks_of_study,
    parse_budget,
    recipe_typed,
    study_folder,
    was_typed,
)
from lowsearch.errors import UsageError


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
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights and of the order of images.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    loaders: Annotated[
        int | None,
        typer.Option("--loaders", min=0, help="Processes that prepare batches ahead; default: some where a GPU would wait for them."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for weights and metrics; default: ./trained/<arch_id>-<recipe>-s<seed>.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train one network on the whole schedule. Resumes where it stopped; under torchrun on several GPUs or processes."""
    import dataclasses

    from lowsearch.study.assembly import schedule_of_study
    from lowsearch.train import recipe as recipe_named
    from lowsearch.train import require_trainable
    from lowsearch.train.distributed import launched_ranks
    from lowsearch.train.full import train_fully
    from lowsearch.train.recipe import DEFAULT_RECIPE, assignments

    network, defaults = network_of_study(what, arch) if arch is not None else (network_named(what), {})
    if recipe is None and arch is not None and (of_study := schedule_of_study(study_folder(what))) is not None:
        schedule = of_study.changed(assignments(recipe_set or ()))
    else:
        schedule = recipe_named(recipe_typed(recipe or DEFAULT_RECIPE, recipe_set))
    if epochs is not None:
        schedule = dataclasses.replace(schedule, name=f"{schedule.name}-{epochs}ep", epochs=epochs)
    images = load_images(data or defaults.get("data") or "fashion-mnist-mini")
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
        with progress_bar() as progress:
            metrics = train_fully(
                network, images, schedule, seed=seed, folder=folder, init=start, origin=origin, device=device, ranks=ranks, loaders=loaders,
                progress=None if ranks.rank else lambda done: progress(round(100 * done), 100, f"train {network.arch_id}"),
            )  # fmt: skip
    if ranks.rank != 0:
        return
    if as_json:
        print_json({**metrics, "folder": str(folder)})
        return
    shown = ("arch_id", "data", "recipe", "seed", "val_accuracy", "test_accuracy", "test_accuracy_std", "cpu_seconds")
    print_table("Trained", ["what", "value"], [*([k, plain(metrics[k])] for k in shown), ["folder", str(folder)]])


def _from_supernet(network: Any, name: str, images: Any) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The weights that `network` inherits from a supernet, statistics included, and where they are from."""
    from lowsearch.train.supernet import find_supernet, inherit, load_supernet, require_trained

    folder, plan = find_supernet(name)
    plan.search_space().encode(network)
    require_trained(plan, network, folder.name)
    model = inherit(load_supernet(folder), network, images)
    return model.state_dict(), {"source": f"supernet-{folder.name}", "supernet_hash": plan.supernet_hash, "share": 1.0}


def _pretrained(network: Any, seed: int, weights: Path | None) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The weights that `network` starts from, and what it inherited, which is told."""
    import dataclasses

    from lowsearch.model.inherit import pretrained_start

    model, inherited = pretrained_start(network, seed=seed, weights=weights)
    without = [place for place, share in inherited.blocks.items() if not share]
    tell(
        f"{100 * inherited.share:.1f} % of the parameters inherited from {inherited.source}"
        + (f"; nothing by {', '.join(without)}" if without else "")
    )
    return model.state_dict(), {**dataclasses.asdict(inherited), "share": inherited.share}


def recipes(as_json: JsonFlag = False) -> None:
    """The training recipes by name, with their fields, as --recipe-set and a YAML file take them."""
    from lowsearch.train import RECIPES

    values = {name: make().to_dict() for name, make in RECIPES.items()}
    if as_json:
        print_json(values)
        return
    fields = [field for field in next(iter(values.values())) if field not in ("name", "teacher_hash")]
    rows = [[field, *(json.dumps(recipe[field]) for recipe in values.values())] for field in fields]
    print_table("Recipes", ["field", *values], rows)


supernets = typer.Typer(help="A supernet: all networks of a space in one store of weights.", rich_markup_mode=None)


@supernets.command("train")
def train_supernet(
    context: typer.Context,
    space: SpaceOption = "lowformer-micro",
    data: Annotated[str, typer.Option("--data", help="Data set, as of `lowsearch train`.")] = "fashion-mnist-mini",
    budget: Annotated[str, typer.Option("--budget", help="Time to train, as 10m: the steps of the schedule are fixed by it.")] = "10m",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps, instead of a time.")] = None,
    max_macs: Annotated[
        float | None, typer.Option("--max-macs", help="Train only networks up to so many, as 13e6, and so fit more steps into the budget.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the supernet's folder; default: from space and data.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights, images and networks drawn.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    as_json: JsonFlag = False,
) -> None:
    """Train all networks of a space together. Resumes where it stopped; under torchrun on several GPUs or processes."""
    import dataclasses

    from lowsearch import locations
    from lowsearch.space import SearchSpace
    from lowsearch.train import require_trainable
    from lowsearch.train.distributed import launched_ranks
    from lowsearch.train.supernet import SupernetPlan, read_plan, steps_within
    from lowsearch.train.supernet import train_supernet as train_shared

    seconds = parse_budget(budget)
    require_trainable(device)
    folder = locations.new("supernets") / checked_study_name(name or f"{Path(space).stem}-{Path(data.replace(':', '/')).stem}")
    with launched_ranks(device) as ranks:
        stored = ranks.agreed(read_plan(folder) if ranks.rank == 0 else None)
        if stored is not None and not was_typed(context, "data"):
            data = stored.data
        images = load_images(data)
        asked: dict[str, Any] = {"max_macs": max_macs, "seed": seed, "steps": steps or 1}
        if stored is None or was_typed(context, "space"):
            asked["space"] = ranks.agreed(SearchSpace.load(space).text if ranks.rank == 0 else None)
        asked |= {"data": images.name, "data_hash": images.data_hash, "num_classes": len(images.classes), "processes": ranks.size}
        if stored is None:
            plan = SupernetPlan(**asked)
            if steps is None:
                plan = dataclasses.replace(plan, steps=steps_within(seconds, plan, images, device=device, ranks=ranks))
        else:  # It goes on as it was made; what was typed must agree.
            kept = {flag for flag in ("max_macs", "seed", "steps") if not was_typed(context, flag)}
            plan = dataclasses.replace(stored, **{key: value for key, value in asked.items() if key not in kept})
        with progress_bar() as progress:
            train_shared(plan, images, folder, device=device, ranks=ranks, progress=progress if ranks.rank == 0 else None)
    if ranks.rank != 0:
        return
    facts = {"supernet": folder.name, "steps": plan.steps, "data": plan.data, "max_macs": plan.max_macs, "folder": str(folder)}
    if as_json:
        print_json(facts)
    else:
        print_table("Supernet", ["what", "value"], [[key, plain(value)] for key, value in facts.items()])
        tell(f"what its networks score: lowsearch supernet score {folder.name} --arch …")


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
    from lowsearch.train import require_trainable
    from lowsearch.train.supernet import find_supernet

    if not (arch or study):
        raise UsageError("no network was named", hint=f"lowsearch supernet score {name} --arch micro-b-s, or --study NAME")
    require_trainable(device)
    folder, plan = find_supernet(name)
    estimator = SupernetEstimator(folder, load_images(data or plan.data), device=device)
    if study and not arch:
        networks, _ = networks_of_study(study, [""])
        fitting = {key: network for key, network in networks.items() if estimator.holds(network)}
        if len(fitting) < len(networks):
            tell(f"{len(networks) - len(fitting)} of {len(networks)} networks of the study are not ones that the supernet was trained for")
    else:
        fitting = {
            key: network_in_space(estimator.space, key, study) if study else member_named(estimator.space, key) for key in arch or ()
        }
    with progress_bar() as progress:
        if calibrate is not None:
            records = Path(calibrate) if calibrate.endswith(".jsonl") else study_folder(calibrate) / RECORDS
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
        print_json({"supernet": folder.name, "unit": estimator.unit, "networks": rows})
        return
    if not rows:
        tell("none of the networks is one that the supernet was trained for")
        return
    if estimator.unit == "top1":
        shown = [
            {**row, "estimate": f"{100 * row['estimate']:.2f} %", "estimate_std": f"{100 * row['estimate_std']:.2f} %"} for row in rows
        ]
        print_rows(f"Supernet {folder.name}: estimated accuracy", shown)
    else:
        print_rows(f"Supernet {folder.name}: estimate is minus the inherited loss; it ranks, and is no accuracy of a training", rows)


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

    if not (arch or study):
        raise UsageError("no network was named", hint="lowsearch proxies --arch lowformer_b1, or --study NAME")
    networks, defaults = networks_of_study(study, arch or [""]) if study else ({name: network_named(name) for name in arch or ()}, {})
    loaded = load_images(data or defaults.get("data") or "fashion-mnist-mini")
    batch = loaded.train.take(np.arange(min(images, len(loaded.train))))
    archs = [dataclasses.replace(network, num_classes=len(loaded.classes)) for network in networks.values()]
    with progress_bar() as progress:
        scores = proxy_scores(archs, batch, seed=seed, progress=progress)
    rows = []
    for i, (name, network) in enumerate(zip(networks, archs, strict=True)):
        counted = costs.count(network)
        rows.append({"network": name, "params": counted.params, "macs": counted.macs, **{k: float(v.mean[i]) for k, v in scores.items()}})
    if as_json:
        print_json({"data": loaded.name, "images": len(batch), "seed": seed, "unit": "rank", "networks": rows})
    else:
        print_rows(
            f"Proxies on {len(batch)} images of {loaded.name}: scores (rank), not accuracies; AZ-NAS ranks these networks only", rows
        )


def trust(
    study: Annotated[str, typer.Argument(help="Name or folder of a study.")],
    networks: Annotated[int, typer.Option("--networks", min=5, help="Networks held out, at least.")] = 12,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each; two give the ceiling.")] = 1,
    band: Annotated[bool, typer.Option("--band", help="Networks of like latency: within 15 % of the front's median.")] = False,
    band_at: Annotated[float | None, typer.Option("--band-at", metavar="MS", help="As --band, around another latency.")] = None,
    as_json: JsonFlag = False,
) -> int:
    """Examine a study's accuracy predictor on networks it never saw, trained for that. Resumes; exit code 1 where it is not trusted."""
    from lowsearch.study.held_out import Band
    from lowsearch.study.trust import BETWEEN_SEEDS, TRUST
    from lowsearch.study.trust import trust as examine

    folder = study_folder(study)
    within = Band.around(band_at) if band_at is not None else Band.of_front(folder) if band else None
    with progress_bar() as progress:
        found = examine(folder, n_networks=networks, n_seeds=seeds, band=within, progress=progress)
    if as_json:
        print_json(found.to_dict())
    else:
        if found.ceiling is not None:
            between = next(row["spearman"] for row in found.rows() if row["signal"] == BETWEEN_SEEDS)
            typer.echo(
                f"ceiling: one seed ranks these networks as another with Spearman {between:.2f}; "
                f"with {found.n_seeds} seeds each, a predictor that knew them would reach {found.ceiling:.2f}"
            )
        rows = [
            {
                "signal": row["signal"], "unit": row["unit"], "latency": row["band"] or "all", "networks": row["n_networks"],
                "Spearman": rounded(row["spearman"]), "95 %": interval_text(row["low"], row["high"]),
                "Kendall": rounded(row["kendall"]), "95 % ": interval_text(row["kendall_low"], row["kendall_high"]),
                "CPU s a network": row["cpu_seconds"],
            }
            for row in found.rows()
        ]  # fmt: skip
        where = "" if within is None else f" of {within.low_ms:.3g} to {within.high_ms:.3g} ms"
        title = f"{found.n_networks} held-out networks{where}, trained with {found.n_seeds} seed{'s' * (found.n_seeds > 1)} each"
        print_rows(title, rows)
        typer.echo(f"verdict: {found.verdict}: {found.reason}")
        tell(
            f"{100 * found.coverage:.0f} % of the accuracies lie within the predictor's 90 % intervals; "
            f"it learned from {found.n_records} networks of the study, {found.learned_cpu_seconds:.0f} CPU seconds of training"
        )
        tell(f"numbers: {folder / TRUST['range' if within is None else 'band']}; lowsearch report {folder.name} shows them")
    return 1 if found.verdict == "not trusted" else 0
