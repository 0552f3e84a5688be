"""Search spaces: which networks a search may choose from, and their encoding as genomes.

A space is a YAML file that lists the choices of every setting (docs/spaces.md). Each listed setting is a gene; a genome is the
vector of choice indices, and populations are arrays (n, n_genes) of int8. Genomes are canonical: a gene without effect (the stride of
an attention that is off, the kernel of a stage without blocks) is 0, so equal networks are equal vectors.
For speed a space compiles into slots: places in the network where a block may stand. The genes that a slot's block depends on index a
dense array, so that the sum of any per-block value over a population is a gather and a sum (`block_sums`), and its largest a gather and
a maximum (`block_maxima`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lowsearch import locations
from lowsearch.arch import (
    N_STAGES,
    Arch,
    Attention,
    Block,
    Head,
    Stage,
    Stem,
    conv_branch,
    downsampler,
    lowtention,
    mlp,
    stage_from_dict,
    stem_branch,
    stem_conv,
    stem_from_dict,
)
from lowsearch.errors import InvalidArchError, LowsearchError, NotInSpaceError, SpaceError
from lowsearch.presets import PRESETS

MAX_CHOICES = 100  # Genomes are int8.
MAX_SLOT_ENTRIES = 5_000_000
_CHUNK = 4096  # Rows scored at once: their gathered values stay in the L2 cache.

_STEM_SETTINGS = {"width": None, "depth": 1, "fused": True, "expansion": 4, "groups": 1}
_STAGE_SETTINGS = {
    "width": None, "depth": 1, "down_fused": True, "down_expansion": 6, "down_groups": 1,
    "fused": True, "expansion": 4, "groups": 1, "kernel": 3, "mlp_ratio": 0,
}  # fmt: skip
_ATTENTION_SETTINGS = {"enabled": False, "stride": 1, "kernel": 3, "compression": 0.5, "projection": "fused"}
_BRANCH_SETTINGS = ("fused", "expansion", "groups", "kernel", "mlp_ratio", *(f"attention.{name}" for name in _ATTENTION_SETTINGS))

Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Gene:
    """One setting of the space, its name as in `stage3.attention.stride`, and the values it may take."""

    name: str
    choices: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Slot:
    """A place in the network: `block` builds what stands there from the values of `genes`; it stands there `depth - 1` times where
    `depth_setting` names the setting of the depth, else once."""

    name: str
    settings: tuple[str, ...]
    block: Callable[[Mapping[str, Any]], Block | None]
    depth_setting: str | None = None


class SearchSpace:
    """A set of networks that share one encoding. Immutable; make one with `SearchSpace.load` or `SearchSpace.from_yaml`."""

    def __init__(self, *, name: str, genes: Sequence[Gene], family: Mapping[str, Arch], num_classes: int, text: str) -> None:
        self.name = name
        self.genes = tuple(genes)
        self.num_classes = num_classes
        self.family: Mapping[str, Arch] = dict(family)
        """The hand-made networks that a search has to beat, by name."""
        self.text = text
        """The YAML that defines the space, kept so that a study can store it."""
        self._column = {gene.name: i for i, gene in enumerate(self.genes)}

    @classmethod
    def load(cls, name_or_path: str | Path) -> SearchSpace:
        """Read a space by name (`lowformer-micro`) or from a YAML file. Raises SpaceError naming the file and the line at fault."""
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            found = locations.find("search_spaces", f"{name_or_path}.yaml")
            if found is None:
                known = sorted({p.stem for folder in locations.folders("search_spaces") for p in folder.glob("*.yaml")})
                raise SpaceError(f"unknown search space {str(name_or_path)!r}", hint=f"known: {', '.join(known)}; or give a .yaml file")
            path = found
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SpaceError(f"cannot read search space {path}: {reason}", hint="give the path of a YAML file") from error
        return cls.from_yaml(text, origin=str(path))

    @classmethod
    def from_yaml(cls, text: str, *, origin: str = "search space") -> SearchSpace:
        """A space from YAML text. Raises SpaceError, its message opening with `origin:line`."""
        return _SpaceReader(origin).read(text)

    def with_num_classes(self, num_classes: int) -> SearchSpace:
        """The same space for a task with `num_classes` classes."""
        family = {name: dataclasses.replace(arch, num_classes=num_classes) for name, arch in self.family.items()}
        return SearchSpace(name=self.name, genes=self.genes, family=family, num_classes=num_classes, text=self.text)

    def __repr__(self) -> str:
        return f"SearchSpace({self.name!r}, {self.n_genes} genes, {self.size():.3g} networks)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.name, self.genes, self.family, self.num_classes, self.text)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    @cached_property
    def cardinalities(self) -> np.ndarray:
        """Number of choices of every gene, (n_genes,) int."""
        return np.array([len(gene.choices) for gene in self.genes])

    def size(self) -> int:
        """Number of distinct networks (canonical genomes)."""

        def choices(*settings: str) -> int:
            return math.prod(len(self._choices(s)) for s in settings)

        def deep(setting: str) -> tuple[int, int]:
            depths = self._choices(setting)
            return sum(d == 1 for d in depths), sum(d > 1 for d in depths)

        flat, deeper = deep("stem.depth")
        total = choices("input", "head_widths", "stem.width")
        total *= flat + deeper * choices("stem.fused", "stem.expansion", "stem.groups")
        for number in range(1, N_STAGES + 1):
            stage = f"stage{number}."
            flat, deeper = deep(stage + "depth")
            enabled = self._choices(stage + "attention.enabled")
            attention = sum(not e for e in enabled) + sum(map(bool, enabled)) * choices(
                *(f"{stage}attention.{s}" for s in _ATTENTION_SETTINGS if s != "enabled")
            )
            branches = choices(*(stage + s for s in ("fused", "expansion", "groups", "kernel", "mlp_ratio"))) * attention
            total *= choices(*(stage + s for s in ("width", "down_fused", "down_expansion", "down_groups"))) * (flat + deeper * branches)
        return total

    # Genomes -----------------------------------------------------------------------------------------------------------

    def sample(self, n: int, *, rng: np.random.Generator) -> np.ndarray:
        """`n` random genomes, every gene uniform over its choices, (n, n_genes) int8, canonical."""
        return self.canonical(rng.integers(0, self.cardinalities, size=(n, self.n_genes)).astype(np.int8))

    def active(self, genomes: np.ndarray) -> np.ndarray:
        """Which genes have an effect, (n, n_genes) bool."""
        choices = np.ascontiguousarray(genomes.T)  # Gene by gene: what is read and written together lies together.
        mask = np.ones(choices.shape, dtype=bool)
        for gene, condition, effective in self._conditions:
            mask[gene] &= effective.take(choices[condition])
        return np.ascontiguousarray(mask.T)

    def canonical(self, genomes: np.ndarray) -> np.ndarray:
        """The genomes with every gene without effect set to 0. Raises NotInSpaceError on a wrong shape or an index out of range."""
        return self._canonical(self._checked(genomes))

    def mutate(self, genomes: np.ndarray, *, rng: np.random.Generator, rate: float | None = None) -> np.ndarray:
        """Canonical copies, in each of which at least one effective gene is redrawn and every other one with probability `rate`
        (default 1 / n_genes). Half of the redraws are steps to a neighbouring choice, the others uniform."""
        genomes = self._checked(genomes)
        n_free = np.cumsum(self.active(genomes) & (self.cardinalities > 1), axis=1, dtype=np.int16)
        chosen = rng.random(genomes.shape, dtype=np.float32) < (1 / self.n_genes if rate is None else rate)
        one_of_free = (rng.random(len(genomes)) * n_free[:, -1]).astype(np.int16)
        chosen[np.arange(len(genomes)), (n_free > one_of_free[:, None]).argmax(axis=1)] = True
        places = np.flatnonzero(chosen)
        values, n_choices = genomes.ravel()[places].astype(np.intp), self.cardinalities[places % self.n_genes]
        uniform = (values + 1 + (rng.random(len(places)) * (n_choices - 1)).astype(np.intp)) % n_choices
        step = values + np.where(rng.random(len(places)) < 0.5, -1, 1)
        step = np.where(step < 0, np.minimum(1, n_choices - 1), step)  # Off the low end: to the neighbour above.
        step = np.where(step >= n_choices, np.maximum(n_choices - 2, 0), step)
        redrawn = genomes.copy()
        redrawn.ravel()[places] = np.where(rng.random(len(places)) < 0.5, step, uniform)
        return self._canonical(redrawn)

    def crossover(self, first: np.ndarray, second: np.ndarray, *, rng: np.random.Generator) -> np.ndarray:
        """Canonical children (n, n_genes): every gene from one of the two parents with equal probability."""
        first, second = self._checked(first), self._checked(second)
        return self._canonical(np.where(rng.integers(0, 2, size=first.shape, dtype=bool), first, second))

    def neighbours(self, genome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The networks that one change of one setting makes of `genome` (n_genes,): which gene, (n,), and canonical genomes (n, n_genes).

        A setting with an order takes the next smaller and the next larger of its choices, one without (a projection) each of the others.
        What a change brings into effect holds its first choice. No network is there twice.
        """
        genome = self.canonical(genome[None])[0]
        steps = [
            (gene, step) for gene in np.flatnonzero(self.active(genome[None])[0]) for step in self._steps[gene][genome[gene]]
        ]  # fmt: skip
        genes = np.array([gene for gene, _ in steps], dtype=int)
        changed = np.repeat(genome[None], len(steps), axis=0)
        changed[np.arange(len(steps)), genes] = [step for _, step in steps]
        return genes, self.canonical(changed)

    def all_genomes(self) -> np.ndarray:
        """Every network of the space once, (size(), n_genes) int8, canonical. Only for spaces whose `size()` fits in memory."""
        genomes = np.zeros((1, self.n_genes), dtype=np.int8)
        n_conditions = np.bincount([gene for gene, _, _ in self._conditions], minlength=self.n_genes)
        for gene in np.argsort(n_conditions, kind="stable"):  # What a gene depends on has fewer conditions than the gene itself.
            free, n_choices = self.active(genomes)[:, gene], len(self.genes[gene].choices)
            opened = np.repeat(genomes[free], n_choices, axis=0)
            opened[:, gene] = np.tile(np.arange(n_choices, dtype=np.int8), int(free.sum()))
            genomes = np.vstack([genomes[~free], opened])
        return genomes

    def encode(self, arch: Arch) -> np.ndarray:
        """The canonical genome of `arch`, (n_genes,) int8. Raises NotInSpaceError naming the setting the space does not offer."""
        if arch.num_classes != self.num_classes:
            raise NotInSpaceError(f"num_classes is {arch.num_classes}, space {self.name!r} has {self.num_classes}")
        settings = _settings(arch)
        genome = np.zeros(self.n_genes, dtype=np.int8)
        for setting, value in settings.items():
            choices = self._choices(setting)
            if value not in choices:
                raise NotInSpaceError(f"{setting} is {value!r}, space {self.name!r} offers {_listed(choices)}")
            if setting in self._column:
                genome[self._column[setting]] = choices.index(value)
        return self.canonical(genome[None])[0]

    def decode(self, genome: np.ndarray) -> Arch:
        """The network of one genome (n_genes,). Raises NotInSpaceError on a wrong shape or an index out of range."""
        row = self._checked(np.asarray(genome)[None])[0]
        return _arch(self._values(row), self.num_classes)

    def contains(self, arch: Arch) -> bool:
        """Whether the space offers `arch`."""
        try:
            self.encode(arch)
        except NotInSpaceError:
            return False
        return True

    # Slots -------------------------------------------------------------------------------------------------------------

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every distinct block that a network of this space can contain, in a fixed order."""
        return self._compiled.blocks

    @cached_property
    def places(self) -> dict[str, tuple[Block, ...]]:
        """Every place of `Arch.named_blocks()` that a network of this space can have, and the distinct blocks that can stand there."""
        compiled, places = self._compiled, {}
        slots = _slots(self.num_classes)
        for slot, entries in zip(slots, np.split(np.arange(len(compiled.block_of_entry)), compiled.offsets[1:].astype(int)), strict=True):
            found = [compiled.blocks[i] for i in np.unique(compiled.block_of_entry[entries]) if i >= 0]
            if not found:
                continue
            if slot.depth_setting is None:
                places[slot.name] = tuple(found)
                continue
            part = slot.name.partition(".")[0]
            for number in range(1, max(self._choices(slot.depth_setting))):
                places[f"{part}.{number}.{found[0].kind}"] = tuple(found)
        return places

    def block_sums(self, values: np.ndarray) -> Scorer:
        """A scorer for populations: genomes (n, n_genes) -> (n, k), the sum of `values` over each network's blocks, repeats counted.

        `values` is (n_blocks, k), a row for every block of `blocks`. Scoring costs well under a microsecond a network.
        """
        return self._scorer(values, np.add, self._compiled.count_of_entry)

    def block_maxima(self, values: np.ndarray) -> Scorer:
        """As `block_sums`, but the largest of each column of `values` over the network's blocks; `values` are 0 or more."""
        return self._scorer(values, np.maximum, self._compiled.count_of_entry > 0)

    def _scorer(self, values: np.ndarray, combine: np.ufunc, factors: np.ndarray) -> Scorer:
        """`combine` over the slots of `values` times what `factors` (n_entries,) says of an entry; an empty slot counts 0."""
        compiled = self._compiled
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(compiled.blocks):
            raise ValueError(f"values has shape {values.shape}, expected ({len(compiled.blocks)}, k)")
        padded = np.vstack([values, np.zeros((1, values.shape[1]))])  # The last row, index -1: no block in this slot.
        entries = np.ascontiguousarray(padded[compiled.block_of_entry] * factors[:, None])
        return _SlotScorer(entries, combine, compiled.weights, compiled.offsets)

    def features(self, genomes: np.ndarray) -> np.ndarray:
        """A numeric description for predictors, (n, n_features): widths as log2, one column for every unordered choice, 0 for genes
        without effect, and the number of attention, MLP and fused branches of every stage. Names in `feature_names`."""
        genomes = self._checked(genomes)
        gene_of_column, starts, values = self._feature_values
        choices = np.where(self.active(genomes), genomes + np.int8(1), np.int8(0))
        columns = [values.take(choices.take(gene_of_column, axis=1) + starts)]
        repeats = [self._lookup(genomes, f"stage{n}.depth", lambda d: d - 1.0) for n in range(1, N_STAGES + 1)]
        for number in range(1, N_STAGES + 1):
            stage = f"stage{number}."
            for setting, as_number in _COUNTED_BRANCHES:
                columns.append((repeats[number - 1] * self._lookup(genomes, stage + setting, as_number))[:, None])
        return np.hstack(columns)

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the columns of `features`."""
        names = [name for columns, _ in self._feature_tables for name in columns]
        names += [f"stage{n}.n_{setting}" for n in range(1, N_STAGES + 1) for setting, _ in _COUNTED_BRANCHES]
        return tuple(names)

    # Private -----------------------------------------------------------------------------------------------------------

    def _choices(self, setting: str) -> tuple[Any, ...]:
        column = self._column.get(setting)
        return self.genes[column].choices if column is not None else (_default(setting),)

    def _values(self, row: np.ndarray) -> dict[str, Any]:
        return {gene.name: gene.choices[index] for gene, index in zip(self.genes, row, strict=True)}

    def _lookup(self, genomes: np.ndarray, setting: str, as_number: Callable[[Any], float]) -> np.ndarray:
        numbers = np.array([as_number(choice) for choice in self._choices(setting)], dtype=float)
        column = self._column.get(setting)
        return numbers[genomes[:, column]] if column is not None else np.full(len(genomes), numbers[0])

    def _canonical(self, genomes: np.ndarray) -> np.ndarray:
        return np.where(self.active(genomes), genomes, np.int8(0))

    def _checked(self, genomes: np.ndarray) -> np.ndarray:
        genomes = np.asarray(genomes)
        if genomes.ndim != 2 or genomes.shape[1] != self.n_genes or not np.issubdtype(genomes.dtype, np.integer):
            raise NotInSpaceError(
                f"genomes have shape {genomes.shape} and type {genomes.dtype}, space {self.name!r} needs whole numbers (n, {self.n_genes})"
            )
        bad = (genomes < 0) | (genomes >= self.cardinalities.astype(np.int8))  # A comparison of bytes where the genomes are bytes.
        if bad.any():
            row, column = np.argwhere(bad)[0]
            gene = self.genes[column]
            raise NotInSpaceError(
                f"gene {gene.name} is {genomes[row, column]}, space {self.name!r} has choices 0 to {len(gene.choices) - 1}"
            )
        return genomes.astype(np.int8, copy=False)

    @cached_property
    def _steps(self) -> list[list[list[int]]]:
        """For every gene and every choice of it, the choices one step away."""
        steps = []
        for gene in self.genes:
            indices = range(len(gene.choices))
            if isinstance(gene.choices[0], str):
                steps.append([[other for other in indices if other != index] for index in indices])
                continue
            order = sorted(indices, key=lambda index, choices=gene.choices: choices[index])
            rank = {index: position for position, index in enumerate(order)}
            steps.append([[order[r] for r in (rank[index] - 1, rank[index] + 1) if 0 <= r < len(order)] for index in indices])
        return steps

    @cached_property
    def _conditions(self) -> list[tuple[int, int, np.ndarray]]:
        """(gene, gene it depends on, which of that one's choices give it an effect)."""
        conditions = []

        def depends(settings: Sequence[str], on: str, effective: Callable[[Any], bool]) -> None:
            if on in self._column:
                mask = np.array([effective(choice) for choice in self._choices(on)])
                conditions.extend((self._column[s], self._column[on], mask) for s in settings if s in self._column)

        depends(("stem.fused", "stem.expansion", "stem.groups"), "stem.depth", lambda d: d > 1)
        for number in range(1, N_STAGES + 1):
            stage = f"stage{number}."
            depends([stage + s for s in _BRANCH_SETTINGS], stage + "depth", lambda d: d > 1)
            depends([f"{stage}attention.{s}" for s in _ATTENTION_SETTINGS if s != "enabled"], stage + "attention.enabled", bool)
        return conditions

    @cached_property
    def _feature_tables(self) -> list[tuple[list[str], np.ndarray]]:
        return [_feature_table(gene) for gene in self.genes]

    @cached_property
    def _feature_values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The gene of every feature column, where its values start, and all values: 0 for a gene without effect, then one a choice."""
        columns = [(gene, column) for gene, (_, table) in enumerate(self._feature_tables) for column in table.T]
        lengths = [1 + len(column) for _, column in columns]
        values = np.concatenate([np.append(0.0, column) for _, column in columns])
        return np.array([gene for gene, _ in columns]), np.cumsum([0, *lengths[:-1]]), values

    @cached_property
    def _compiled(self) -> _Compiled:
        ids: dict[Block, int] = {}
        blocks_of_entries, counts_of_entries, offsets = [], [], []
        slots = _slots(self.num_classes)
        weights = np.zeros((self.n_genes, len(slots)))
        offset = 0
        for column, slot in enumerate(slots):
            settings = slot.settings if slot.depth_setting is None else (*slot.settings, slot.depth_setting)
            stride = 1
            for setting in reversed(settings):
                if setting in self._column:
                    weights[self._column[setting], column] = stride
                    stride *= len(self._choices(setting))
            depths = (2,) if slot.depth_setting is None else self._choices(slot.depth_setting)
            entries = np.array(
                [
                    -1 if block is None else ids.setdefault(block, len(ids))
                    for combination in itertools.product(*(self._choices(s) for s in slot.settings))
                    for block in [slot.block(dict(zip(slot.settings, combination, strict=True)))]
                ]
                if any(d > 1 for d in depths)
                else [-1] * math.prod(len(self._choices(s)) for s in slot.settings)
            )
            blocks_of_entries.append(np.repeat(entries, len(depths)))
            counts_of_entries.append(np.tile(np.array(depths) - 1.0, len(entries)))
            offsets.append(offset)
            offset += stride
        exact = np.float32 if offset < 2**24 else np.float64  # The smaller one in which all entries can be told apart.
        return _Compiled(
            tuple(ids), np.concatenate(blocks_of_entries), np.concatenate(counts_of_entries), weights.astype(exact),
            np.array(offsets, dtype=exact),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Compiled:
    blocks: tuple[Block, ...]
    block_of_entry: np.ndarray  # (n_entries,) index into blocks, -1 for none
    count_of_entry: np.ndarray  # (n_entries,) how often the block stands there
    weights: np.ndarray  # (n_genes, n_slots) of a float: genomes @ weights + offsets = the entry of every slot
    offsets: np.ndarray  # (n_slots,)


@dataclass(frozen=True, slots=True, eq=False)
class _SlotScorer:
    """A Scorer as a value, so that whatever holds one can be pickled: `combine` over the slots of what stands in them."""

    values: np.ndarray  # (n_entries, k)
    combine: np.ufunc
    weights: np.ndarray  # These two as in _Compiled.
    offsets: np.ndarray

    def __call__(self, genomes: np.ndarray) -> np.ndarray:
        genomes = np.asarray(genomes)
        combined = np.empty((len(genomes), self.values.shape[1]))
        for start in range(0, len(genomes), _CHUNK):
            rows = genomes[start : start + _CHUNK]
            # Exact, and a float product runs on BLAS where an integer one does not.
            entries = self.weights.T @ rows.T.astype(self.weights.dtype)
            entries = (entries + self.offsets[:, None]).astype(np.intp)
            total = self.values.take(entries[0], axis=0)
            for slot in entries[1:]:
                self.combine(total, self.values.take(slot, axis=0), out=total)
            combined[start : start + len(rows)] = total
        return combined


_COUNTED_BRANCHES: tuple[tuple[str, Callable[[Any], float]], ...] = (
    ("attention.enabled", float),
    ("mlp_ratio", lambda ratio: float(ratio > 0)),
    ("fused", float),
)


def _rebuild(name: str, genes: Sequence[Gene], family: Mapping[str, Arch], num_classes: int, text: str) -> SearchSpace:
    return SearchSpace(name=name, genes=genes, family=family, num_classes=num_classes, text=text)


def _default(setting: str) -> Any:
    place, _, name = setting.partition(".")
    if place == "stem":
        return _STEM_SETTINGS[name]
    if name.startswith("attention."):
        return _ATTENTION_SETTINGS[name.removeprefix("attention.")]
    return _STAGE_SETTINGS[name]


def _listed(choices: Sequence[Any]) -> str:
    return ", ".join(str(choice) for choice in choices)


def _settings(arch: Arch) -> dict[str, Any]:
    """The settings of `arch` that have an effect, by gene name."""
    stem = arch.stem
    settings: dict[str, Any] = {
        "input": (arch.resolution_px, stem.stride), "head_widths": arch.head_widths, "stem.width": stem.width, "stem.depth": stem.depth,
    }  # fmt: skip
    if stem.depth > 1:
        settings |= {"stem.fused": stem.fused, "stem.expansion": stem.expansion, "stem.groups": stem.groups}
    for number, stage in enumerate(arch.stages, start=1):
        names = ["width", "depth", "down_fused", "down_expansion", "down_groups"]
        if stage.depth > 1:
            names += ["fused", "expansion", "groups", "kernel", "mlp_ratio"]
            settings[f"stage{number}.attention.enabled"] = stage.attention is not None
        settings |= {f"stage{number}.{name}": getattr(stage, name) for name in names}
        if stage.attention is not None:
            settings |= {f"stage{number}.attention.{name}": value for name, value in dataclasses.asdict(stage.attention).items()}
    return settings


def _stem(values: Mapping[str, Any]) -> Stem:
    fields = {name: values.get(f"stem.{name}", default) for name, default in _STEM_SETTINGS.items()}
    return Stem(stride=values["input"][1], **fields)


def _stage(values: Mapping[str, Any], number: int, *, depth: int | None = None) -> Stage:
    fields = {name: values.get(f"stage{number}.{name}", default) for name, default in _STAGE_SETTINGS.items()}
    if depth is not None:
        fields["depth"] = depth
    attention = {name: values.get(f"stage{number}.attention.{name}", default) for name, default in _ATTENTION_SETTINGS.items()}
    return Stage(attention=Attention(**attention) if attention.pop("enabled") else None, **fields)


def _arch(values: Mapping[str, Any], num_classes: int) -> Arch:
    stages = tuple(_stage(values, number) for number in range(1, N_STAGES + 1))
    return Arch(
        resolution_px=values["input"][0], stem=_stem(values), stages=(stages[0], stages[1], stages[2], stages[3]),
        head_widths=values["head_widths"], num_classes=num_classes,
    )  # fmt: skip


def _slots(num_classes: int) -> list[_Slot]:
    def px(values: Mapping[str, Any], number: int) -> int:
        resolution_px, stem_stride = values["input"]
        return resolution_px // (stem_stride * 2**number)

    def head(values: Mapping[str, Any]) -> Head:
        conv_width, linear_width = values["head_widths"]
        return Head(
            channels=values[f"stage{N_STAGES}.width"], resolution_px=px(values, N_STAGES), conv_width=conv_width,
            linear_width=linear_width, num_classes=num_classes,
        )  # fmt: skip

    def stage_slots(number: int) -> list[_Slot]:
        stage = f"stage{number}."
        width_before = "stem.width" if number == 1 else f"stage{number - 1}.width"
        down = ("input", width_before, *(stage + s for s in ("width", "down_fused", "down_expansion", "down_groups")))
        attention = ("input", stage + "width", *(f"{stage}attention.{s}" for s in _ATTENTION_SETTINGS), stage + "mlp_ratio")
        conv = ("input", *(stage + s for s in ("width", "fused", "expansion", "groups", "kernel")))
        depth = stage + "depth"
        return [
            _Slot(stage + "down", down, lambda v: downsampler(v[width_before], px(v, number - 1), _stage(v, number))),
            _Slot(stage + "attention", attention, lambda v: lowtention(px(v, number), _stage(v, number, depth=2)), depth),
            _Slot(
                stage + "mlp",
                ("input", stage + "width", stage + "mlp_ratio"),
                lambda v: mlp(px(v, number), _stage(v, number, depth=2)),
                depth,
            ),
            _Slot(stage + "conv", conv, lambda v: conv_branch(number, px(v, number), _stage(v, number, depth=2)), depth),
        ]

    stem_settings = ("input", *(f"stem.{s}" for s in ("width", "fused", "expansion", "groups")))
    return [
        _Slot("stem.conv", ("input", "stem.width"), lambda v: stem_conv(v["input"][0], _stem(v))),
        _Slot("stem.branch", stem_settings, lambda v: stem_branch(v["input"][0], _stem({**v, "stem.depth": 2})), "stem.depth"),
        *(slot for number in range(1, N_STAGES + 1) for slot in stage_slots(number)),
        _Slot("head", ("input", f"stage{N_STAGES}.width", "head_widths"), head),
    ]


def _feature_table(gene: Gene) -> tuple[list[str], np.ndarray]:
    """Column names and (n_choices, n_columns) values of one gene."""
    choices = gene.choices
    if gene.name == "input":
        return ["log2_resolution_px", "stem.stride"], np.array([[math.log2(px), stride] for px, stride in choices], dtype=float)
    if gene.name == "head_widths":
        return ["log2_head_conv", "log2_head_linear"], np.log2(np.array(choices, dtype=float))
    if isinstance(choices[0], str):
        return [f"{gene.name}={choice}" for choice in choices], np.eye(len(choices))
    values = np.array(choices, dtype=float)[:, None]
    return [gene.name], np.log2(values) if gene.name.endswith("width") else values


class _SpaceReader:
    """Reads the YAML of a space node by node, so that every complaint names its line."""

    def __init__(self, origin: str) -> None:
        self.origin = origin

    def read(self, text: str) -> SearchSpace:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line: int = mark.line + 1 if mark is not None else 1
            raise self._error(line, f"not YAML: {getattr(error, 'problem', None) or error}") from error
        if root is None:
            raise self._error(1, "the file is empty, expected a search space")
        keys = self._mapping(
            root, "a search space", ("name", "num_classes", "input", "stem", "stages", "head_widths", "family", "description")
        )
        self._require(root, keys, ("name", "input", "stem", "stages", "head_widths"))
        name = self._value(keys["name"])
        if not isinstance(name, str) or not name:
            raise self._error(keys["name"], f"name is {name!r}, expected text")
        num_classes = self._value(keys["num_classes"]) if "num_classes" in keys else 1000
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
            raise self._error(keys["num_classes"], f"num_classes is {num_classes!r}, expected a whole number of at least 1")
        nodes: dict[str, yaml.Node] = {}
        genes = [
            self._inputs(keys["input"]),
            *self._stem(keys["stem"], nodes),
            *self._stages(keys["stages"], nodes),
            self._heads(keys["head_widths"]),
        ]
        nodes["input"] = keys["input"]
        for gene in genes:
            if len(gene.choices) > MAX_CHOICES:
                raise self._error(
                    nodes.get(gene.name, keys["name"]), f"{gene.name} has {len(gene.choices)} choices, at most {MAX_CHOICES} fit"
                )
        space = SearchSpace(name=name, genes=genes, family={}, num_classes=num_classes, text="")
        self._check_networks_exist(space, nodes)
        family = self._family(keys["family"], space) if "family" in keys else {}
        return SearchSpace(name=name, genes=genes, family=family, num_classes=num_classes, text=text)

    # Sections

    def _inputs(self, node: yaml.Node) -> Gene:
        choices = []
        for item in self._choice_nodes(node, "input"):
            keys = self._mapping(item, "an input", ("resolution_px", "stem_stride"))
            self._require(item, keys, ("resolution_px", "stem_stride"))
            px, stride = self._value(keys["resolution_px"]), self._value(keys["stem_stride"])
            if not isinstance(px, int) or isinstance(px, bool) or px < 1:
                raise self._error(item, f"resolution_px is {px!r}, expected a positive whole number")
            if stride not in (1, 2) or isinstance(stride, bool):
                raise self._error(item, f"stem_stride is {stride!r}, expected 1 or 2")
            total = stride * 2**N_STAGES
            if px % total:
                raise self._error(item, f"resolution_px {px} is not a multiple of the network's total stride {total}")
            choices.append((px, stride))
        return self._gene("input", choices, node)

    def _stem(self, node: yaml.Node, nodes: dict[str, yaml.Node]) -> list[Gene]:
        keys = self._mapping(node, "the stem", tuple(_STEM_SETTINGS))
        self._require(node, keys, ("width",))
        genes = [self._listed_gene(f"stem.{key}", child, nodes) for key, child in keys.items()]
        for gene in genes:
            field = gene.name.removeprefix("stem.")
            for width, value, child in self._with_widths(gene, genes, nodes):
                self._build(lambda w=width, f=field, v=value: stem_from_dict({"width": w, "depth": 2, f: v}), child)
        return genes

    def _stages(self, node: yaml.Node, nodes: dict[str, yaml.Node]) -> list[Gene]:
        items = self._sequence(node, "stages")
        if len(items) != N_STAGES:
            raise self._error(node, f"stages has {len(items)} entries, expected {N_STAGES}")
        genes: list[Gene] = []
        for number, item in enumerate(items, start=1):
            genes += self._stage(item, number, nodes)
        return genes

    def _stage(self, node: yaml.Node, number: int, nodes: dict[str, yaml.Node]) -> list[Gene]:
        stage = f"stage{number}"
        keys = self._mapping(node, f"stage {number}", (*_STAGE_SETTINGS, "attention"))
        self._require(node, keys, ("width",))
        genes = [self._listed_gene(f"{stage}.{key}", child, nodes) for key, child in keys.items() if key != "attention"]
        for gene in genes:
            field = gene.name.removeprefix(f"{stage}.")
            for width, value, child in self._with_widths(gene, genes, nodes):
                self._build(lambda w=width, f=field, v=value: stage_from_dict({"width": w, "depth": 2, f: v}, f"stage {number}"), child)
        if "attention" not in keys:
            return genes
        attention = self._mapping(keys["attention"], f"the attention of stage {number}", tuple(_ATTENTION_SETTINGS))
        listed = [self._listed_gene(f"{stage}.attention.{key}", child, nodes) for key, child in attention.items()]
        enabled = f"{stage}.attention.enabled"
        nodes[f"{stage}.attention"] = keys["attention"]
        if enabled not in nodes:
            listed.insert(0, Gene(enabled, (True,)))
        for gene in listed:
            field = gene.name.removeprefix(f"{stage}.attention.")
            for value, child in zip(
                gene.choices, self._choice_nodes(nodes[gene.name], gene.name) if gene.name in nodes else [keys["attention"]], strict=True
            ):
                if field == "enabled":
                    if not isinstance(value, bool):
                        raise self._error(child, f"{gene.name} is {value!r}, expected true or false")
                    continue
                fields = {"width": 64, "depth": 2, "attention": {field: value}}
                self._build(lambda f=fields: stage_from_dict(f, f"stage {number}"), child)
        return genes + listed

    def _heads(self, node: yaml.Node) -> Gene:
        choices = []
        for item in self._choice_nodes(node, "head_widths"):
            widths = self._value(item)
            if (
                not isinstance(widths, list)
                or len(widths) != 2
                or not all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in widths)
            ):
                raise self._error(item, f"head_widths entry is {widths!r}, expected two positive whole numbers")
            choices.append(tuple(widths))
        return self._gene("head_widths", choices, node)

    def _check_networks_exist(self, space: SearchSpace, nodes: dict[str, yaml.Node]) -> None:
        """Refuse choices that fit alone but not together; every combination of a space must be a network."""
        for number in range(1, N_STAGES + 1):
            stage = f"stage{number}."
            attention_node = nodes.get(stage + "attention")
            if attention_node is not None and any(space._choices(stage + "attention.enabled")) and max(space._choices(stage + "depth")) > 1:
                for (px, stem_stride), stride in itertools.product(space._choices("input"), space._choices(stage + "attention.stride")):
                    stage_px = px // (stem_stride * 2**number)
                    if -(-stage_px // stride) < 2:
                        where = nodes.get(stage + "attention.stride", attention_node)
                        at = f"input {px} px, stem stride {stem_stride}: a {stage_px} px map at stride {stride}"
                        raise self._error(where, f"stage {number}: attention on one token ({at})")
                kernels, strides = (space._choices(f"{stage}attention.{s}") for s in ("kernel", "stride"))
                if 2 in kernels and 4 in strides:
                    raise self._error(
                        nodes.get(stage + "attention.kernel", attention_node),
                        f"stage {number}: a 2x2 attention kernel cannot have stride 4",
                    )
            before = "stem.width" if number == 1 else f"stage{number - 1}.width"
            for width, groups in itertools.product(space._choices(before), space._choices(stage + "down_groups")):
                if not isinstance(groups, int) or groups < 1 or width % groups:
                    raise self._error(
                        nodes[stage + "down_groups"],
                        f"stage {number}: down_groups {groups!r} does not divide the {width} channels before it",
                    )
        entries = max(math.prod(len(space._choices(s)) for s in slot.settings) for slot in _slots(space.num_classes))
        if entries > MAX_SLOT_ENTRIES:
            raise self._error(1, f"one place of the network has {entries:,} possible blocks, at most {MAX_SLOT_ENTRIES:,} can be indexed")

    def _family(self, node: yaml.Node, space: SearchSpace) -> dict[str, Arch]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, "family is no mapping of names to networks")
        family: dict[str, Arch] = {}
        for key, child in node.value:
            name, value = str(self._value(key)), self._value(child)
            if name in family:
                raise self._error(key, f"family member {name!r} is there twice")
            if value == "preset" or isinstance(value, str):
                preset_name = name if value == "preset" else value
                if preset_name not in PRESETS:
                    raise self._error(child, f"family member {name!r}: unknown preset {preset_name!r}")
                arch = dataclasses.replace(PRESETS[preset_name], num_classes=space.num_classes)
            else:
                arch = self._build(lambda v=value: Arch.from_dict({"num_classes": space.num_classes, **_as_mapping(v)}), child)
            try:
                space.encode(arch)
            except NotInSpaceError as error:
                raise self._error(child, f"family member {name!r} is not in the space: {error.message}") from error
            family[name] = arch
        return family

    # Nodes

    def _error(self, where: yaml.Node | int, message: str) -> SpaceError:
        line = where if isinstance(where, int) else where.start_mark.line + 1
        return SpaceError(f"{self.origin}:{line}: {message}", hint="docs/spaces.md lists the settings and their values")

    def _build(self, make: Callable[[], Any], node: yaml.Node) -> Any:
        try:
            return make()
        except LowsearchError as error:
            raise self._error(node, error.message) from error

    def _value(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise self._error(node, f"cannot read this value: {getattr(error, 'problem', None) or error}") from error

    def _mapping(self, node: yaml.Node, what: str, known: Sequence[str]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} is no mapping; its keys: {', '.join(known)}")
        keys: dict[str, yaml.Node] = {}
        for key_node, child in node.value:
            key = self._value(key_node)
            if key not in known:
                raise self._error(key_node, f"unknown key {key!r} in {what}; known: {', '.join(known)}")
            if key in keys:
                raise self._error(key_node, f"key {key!r} is there twice in {what}")
            keys[key] = child
        return keys

    def _require(self, node: yaml.Node, keys: Mapping[str, yaml.Node], required: Sequence[str]) -> None:
        missing = [key for key in required if key not in keys]
        if missing:
            raise self._error(node, f"key {missing[0]!r} is missing")

    def _sequence(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"{what} is {self._value(node)!r}, expected a list")
        return list(node.value)

    def _choice_nodes(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        items = self._sequence(node, what)
        if not items:
            raise self._error(node, f"{what} has no choices")
        return items

    def _listed_gene(self, name: str, node: yaml.Node, nodes: dict[str, yaml.Node]) -> Gene:
        nodes[name] = node
        return self._gene(name, [self._value(item) for item in self._choice_nodes(node, name)], node)

    def _gene(self, name: str, choices: list[Any], node: yaml.Node) -> Gene:
        seen: list[tuple[type, Any]] = []
        for choice, item in zip(choices, self._choice_nodes(node, name), strict=True):
            if (type(choice), choice) in seen:
                raise self._error(item, f"{name} lists {choice!r} twice")
            seen.append((type(choice), choice))
        return Gene(name, tuple(choices))

    def _with_widths(self, gene: Gene, genes: Sequence[Gene], nodes: Mapping[str, yaml.Node]) -> list[tuple[Any, Any, yaml.Node]]:
        """(width, value, node) for every value of `gene` beside every width it may meet."""
        items = self._choice_nodes(nodes[gene.name], gene.name)
        if gene.name.endswith(".width"):
            return [(value, value, item) for value, item in zip(gene.choices, items, strict=True)]
        widths = next(g.choices for g in genes if g.name.endswith(".width"))
        return [(width, value, item) for value, item in zip(gene.choices, items, strict=True) for width in widths]


def _as_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArchError(f"a network is {value!r}, expected a preset's name or a mapping of its fields")
    return value
