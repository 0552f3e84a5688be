"""Which networks keep a study's limits: all of a small space, and whether any of a large one does, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowsearch.errors import StudyError
from lowsearch.search.estimates import Estimator, at_confidence, excess, of_limit
from lowsearch.search.objectives import Limit
from lowsearch.space import SearchSpace

MAX_LISTED = 500_000
"""Spaces of at most so many networks are gone through one by one."""
MAX_EXHAUSTIVE = 20_000
"""So many networks can be tried one after the other in a study at all."""
_SAMPLE = 4096
_BEAM = 8


def networks_within(estimator: Estimator, limits: Sequence[Limit]) -> np.ndarray | None:
    """Every network of the space that keeps the limits, (n, n_genes); None where the space is too large to go through."""
    if estimator.space.size() > MAX_LISTED:
        return None
    genomes = estimator.space.all_genomes()
    return genomes[excess(estimator.estimate(genomes), limits) == 0]


def all_to_try(estimator: Estimator, limits: Sequence[Limit]) -> np.ndarray:
    """As `networks_within`, for a study that tries them all. Raises StudyError where they are too many."""
    space, genomes = estimator.space, networks_within(estimator, limits)
    hint = f"use --sampler lowsearch, narrow the space, or set a limit that at most {MAX_EXHAUSTIVE:,} networks keep"
    if genomes is None:
        raise StudyError(f"space {space.name!r} has {space.size():.3g} networks, too many to try them all", hint=hint)
    if len(genomes) > MAX_EXHAUSTIVE:
        raise StudyError(f"{len(genomes):,} networks of space {space.name!r} keep the limits, too many to try them all", hint=hint)
    return genomes


def check_limits(estimator: Estimator, limits: Sequence[Limit]) -> None:
    """Raise StudyError where no network keeps the limits by all that is known before training: with the nearest one, and what it keeps.

    In a small space every network was looked at; in a large one, the nearest is where no change of a single setting comes nearer.
    """
    known = [limit for limit in limits if limit.metric != "accuracy"]
    if not known:
        return
    space = estimator.space
    genome, broken = nearest(estimator, known)
    if broken == 0:
        return
    estimates = estimator.estimate(genome[None])
    misses, flags = [], []
    for limit in known:
        if not excess(estimates, [limit])[0]:
            continue
        value, std = (float(values[0]) for values in of_limit(estimates, limit))
        misses.append(f"{limit.name} {value:.4g}{f' ± {std:.2g}' if std else ''}")
        flags.append(f"--{limit.side} {limit.name}={_rounded(float(at_confidence(estimates, limit)[0]), up=limit.side == 'max')}")
    proof = f"all {space.size():,} were looked at" if space.size() <= MAX_LISTED else "none was found"
    found = f"the nearest, {space.decode(genome).arch_id}, has {', '.join(misses)}"
    raise StudyError(
        f"no network of space {space.name!r} keeps {', '.join(map(str, known))} ({proof}); {found}", hint=f"it keeps {' '.join(flags)}"
    )


def nearest(estimator: Estimator, limits: Sequence[Limit]) -> tuple[np.ndarray, float]:
    """The network (n_genes,) that breaks the limits least by its estimates, and by how much (`excess`).

    Found by descent: from the best of a sample and the family, to whichever single changes come nearest, until none does.
    """
    space = estimator.space

    def broken(genomes: np.ndarray) -> np.ndarray:
        return excess(estimator.estimate(genomes), limits)

    if space.size() <= MAX_LISTED:
        genomes = space.all_genomes()
        by = broken(genomes)
        return genomes[by.argmin()], float(by.min())
    family = [space.encode(arch)[None] for arch in space.family.values()]
    beam = np.vstack([*family, space.sample(_SAMPLE, rng=np.random.default_rng(0))])
    least = np.inf
    while True:
        by = broken(beam)
        order = np.argsort(by, kind="stable")[:_BEAM]
        beam = beam[order]
        if by[order[0]] == 0 or by[order[0]] >= least:
            return beam[0], float(by[order[0]])
        least = float(by[order[0]])
        beam = np.unique(np.vstack([beam, *(_single_changes(space, genome) for genome in beam)]), axis=0)


def _single_changes(space: SearchSpace, genome: np.ndarray) -> np.ndarray:
    """Every network with another choice of one gene, (n, n_genes)."""
    changed = np.repeat(genome[None], int(space.cardinalities.sum()), axis=0)
    genes = np.repeat(np.arange(space.n_genes), space.cardinalities)
    changed[np.arange(len(changed)), genes] = np.concatenate([np.arange(n) for n in space.cardinalities])
    return space.canonical(changed)


def _rounded(bound: float, *, up: bool) -> str:
    """Three significant digits on the side that the network still keeps."""
    scale = 10.0 ** (np.floor(np.log10(bound)) - 2) if bound > 0 else 1.0
    return f"{(np.ceil if up else np.floor)(bound / scale) * scale:.6g}"
