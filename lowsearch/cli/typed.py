"""What a user typed, as the objects that it names. A name that nothing has raises an error that lists what there is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from lowsearch.errors import StudyError, UsageError

_BUDGET = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def parse_budget(text: str) -> float:
    """Seconds of a duration such as `8m`, `90s` or `1h30m`. Raises UsageError."""
    match = _BUDGET.fullmatch(text.strip())
    seconds = sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0.0
    if seconds <= 0:
        raise UsageError(f"budget {text!r} is not a duration", hint="write it as 8m, 90s or 1h30m")
    return seconds


def target_named(device: str, runtime: str | None, **settings: Any) -> Any:
    """The Target that a user means, with the device's usual runtime where none was named."""
    from lowsearch.latency.table import default_runtime
    from lowsearch.latency.target import resolve_target

    return resolve_target(device, runtime or default_runtime(device), **settings)


def network_named(name: str) -> Any:
    from lowsearch.arch import Arch
    from lowsearch.presets import preset

    if name.endswith(".json"):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no such file: {name}", hint="give a preset's name or the arch.json of a network")
        return Arch.from_json(path.read_text(encoding="utf-8"))
    return preset(name)


def member_named(space: Any, name: str) -> Any:
    """A network by what a user calls it, with the space's number of classes."""
    import dataclasses

    return space.family[name] if name in space.family else dataclasses.replace(network_named(name), num_classes=space.num_classes)


def network_in_space(space: Any, name: str, study: str) -> Any:
    """A network of a study's space by what a user calls it, with the study's number of classes."""
    import dataclasses

    from lowsearch.presets import PRESETS

    if name in space.family:
        return space.family[name]
    if name.endswith(".json") or name in PRESETS:
        return dataclasses.replace(network_named(name), num_classes=space.num_classes)
    return network_of_study(study, name)[0]


def recipe_typed(recipe: str | None, changes: Sequence[str] | None) -> Any:
    """The recipe that the flags mean, as one string; None where none was given."""
    if recipe is None and not changes:
        return None
    from lowsearch.train.recipe import DEFAULT_RECIPE, recipe_spec

    return recipe_spec(recipe or DEFAULT_RECIPE, changes or ())


def checked_study_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise UsageError(f"study name {name!r} is no folder name", hint="use letters, digits, dots, dashes and underscores")
    return name


def study_folder(name: str) -> Path:
    from lowsearch import locations

    return locations.study_folder(name)


def study_file(name: str) -> Path:
    """The study.yaml that a user means by a study's name or folder, or by the file itself."""
    return Path(name) if name.endswith((".yaml", ".yml")) else study_folder(name) / "study.yaml"


def network_of_study(study: str, arch_id: str) -> tuple[Any, Mapping[str, Any]]:
    """A network of a study by its id or the beginning of it, and the study's settings."""
    found, settings = networks_of_study(study, [arch_id])
    if len(found) != 1:
        hint = f"{study_folder(study) / 'front.csv'} lists the front's"
        raise StudyError(f"study {study!r} has {len(found)} networks whose id begins with {arch_id!r}", hint=hint)
    return next(iter(found.values())), settings


def networks_of_study(study: str, beginnings: Sequence[str]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """arch_id -> network of a study, of those whose id begins with one of `beginnings`; and the study's settings."""
    import yaml

    from lowsearch.arch import Arch

    folder = study_folder(study)
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


def one_value(name: str, values: Sequence[Any] | None, default: Any) -> Any:
    """The value of an option that holds for all devices of a search. Raises UsageError where there are several."""
    different = list(dict.fromkeys(values or [default]))
    if len(different) > 1:
        raise UsageError(
            f"--{name} is given as {' and '.join(map(str, different))}: one search has one {name}, on every device",
            hint=f"--{name} {different[0]}, and another study for the other",
        )
    return different[0]


def was_typed(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def without_password(url: str | None) -> str | None:
    """The url of a storage as it may be stored; its password goes where this process and its workers read it."""
    if url is None:
        return None
    from lowsearch.study.workers.database import PASSWORD, split_password

    bare, password = split_password(url)
    if password is not None:
        os.environ[PASSWORD] = password
    return bare
