"""Verbs about search spaces and the cost of their networks: space, cost."""

from __future__ import annotations

from typing import Annotated

import typer

from lowsearch.cli.options import JsonFlag
from lowsearch.cli.output import cost_columns, plain, print_json, print_rows, print_table, tell
from lowsearch.cli.typed import network_named


def space(name: Annotated[str, typer.Argument(help="A space's name or YAML file.")], as_json: JsonFlag = False) -> None:
    """Check a search space and print its genes, its size and its hand-made family."""
    from lowsearch import cost
    from lowsearch.space import SearchSpace

    loaded = SearchSpace.load(name)
    family = [{"name": n, "arch_id": arch.arch_id, **cost_columns(cost.count(arch))} for n, arch in loaded.family.items()]
    if as_json:
        print_json({
            "name": loaded.name, "networks": loaded.size(), "blocks": len(loaded.blocks), "num_classes": loaded.num_classes,
            "genes": {gene.name: gene.choices for gene in loaded.genes}, "family": family,
        })  # fmt: skip
        return
    print_table(
        f"{loaded.name}: {loaded.size():.3g} networks, {len(loaded.blocks):,} distinct blocks",
        ["gene", "choices"],
        [[gene.name, ", ".join(plain(c) for c in gene.choices)] for gene in loaded.genes],
    )
    if family:
        print_rows("Hand-made family", family)


def cost(network: Annotated[str, typer.Argument(help="A preset, or a network's arch.json.")], as_json: JsonFlag = False) -> None:
    """MACs, params and activations of a network, block by block; peak memory and file size of the whole, in fp32 at batch 1."""
    from lowsearch import cost as costs
    from lowsearch.footprint import artifact_mb, peak_memory_mb

    arch = network_named(network)
    footprint = {"peak_memory_mb": peak_memory_mb(arch), "artifact_mb": artifact_mb(arch)}
    counted = costs.count(arch)
    rows = [{"place": place, "kind": block.kind, **cost_columns(block_cost)} for place, block, block_cost in counted.per_block]
    total = {"place": "total", "kind": f"{arch.resolution_px} px", **cost_columns(counted)}
    if as_json:
        print_json({"arch_id": arch.arch_id, "arch": arch.to_dict(), **cost_columns(counted), **footprint, "blocks": rows})
        return
    print_rows(f"{network} ({arch.arch_id})", [*rows, total])
    tell(f"peak memory {footprint['peak_memory_mb']:.4g} MB, file {footprint['artifact_mb']:.4g} MB (fp32, batch 1)")
