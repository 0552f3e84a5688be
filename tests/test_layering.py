"""The order of the rooms: imports only go down, siblings do not import each other, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lowsearch"

# The top line may import everything below it; rooms on one line do not import each other.
LINES = (
    {"__main__"},
    {"cli"},
    {"report"},
    {"study", "insights"},
    {"search"},
    {"accuracy", "latency"},
    {"train"},
    {"data"},
    {"model"},
    {"space", "cost", "footprint"},
    {"presets", "published"},
    {"arch", "locations", "files", "memory"},
    {"errors"},
)
LINE_OF = {room: number for number, rooms in enumerate(LINES) for room in rooms}


def module_name(path: Path, package: Path = PACKAGE) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room of `lowsearch.latency.table` is `latency`; the package itself is in none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_modules(source: str, importer: str, *, is_package: bool, modules: set[str], types: bool = True) -> set[str]:
    """Modules of the package that `source` imports anywhere, in functions too, and for type checking alone unless not `types`.

    `from lowsearch.x import name` counts as an import of the submodule `lowsearch.x.name` where there is one.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    if not types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = importer.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module" and node.args:
            name = node.args[0]
            found |= {name.value} if isinstance(name, ast.Constant) and isinstance(name.value, str) else set()
    return {name for name in found if name in modules}


def import_graph(*, types: bool = True) -> dict[str, set[str]]:
    return {
        name: imported_modules(path.read_text(), name, is_package=path.name == "__init__.py", modules=set(MODULES), types=types) - {name}
        for name, path in MODULES.items()
    }


def wrong_way(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up, or sideways between rooms of one line."""
    return [
        f"{importer} imports {imported}"
        for importer, targets in graph.items()
        for imported in sorted(targets)
        if room_of(importer) and room_of(imported) and room_of(importer) != room_of(imported)
        if LINE_OF[room_of(importer)] >= LINE_OF[room_of(imported)]
    ]


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Every import cycle as `a -> b -> a`, found from its alphabetically first member."""
    found = []
    for start in sorted(graph):
        paths: list[tuple[str, ...]] = [(start,)]
        seen: set[str] = set()
        while paths:
            path = paths.pop()
            for step in sorted(graph[path[-1]]):
                if step == start:
                    found.append(" -> ".join([*path, start]))
                elif step > start and step not in seen:
                    seen.add(step)
                    paths.append((*path, step))
    return found


def test_every_module_stands_in_a_room():
    strangers = [name for name in MODULES if room_of(name) not in LINE_OF and name != "lowsearch"]
    assert not strangers, "give the room a line in LINES and in docs/architecture.md"


def test_imports_only_go_down():
    assert wrong_way(import_graph()) == []


def test_no_import_cycles():
    graph = import_graph(types=False)  # Two modules of a room may name each other's types.
    del graph["lowsearch"]  # The package's own names are looked up on first use, for users; nothing below imports them.
    assert cycles({name: targets & graph.keys() for name, targets in graph.items()}) == []


def test_modules_import_from_each_other_and_not_from_the_package_root():
    def from_root(path: Path) -> set[str]:
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module == "lowsearch"]
        return {alias.name for node in nodes for alias in node.names}

    allowed = {"__version__"} | {name.removeprefix("lowsearch.") for name in MODULES}
    wrong = {name: from_root(path) - allowed for name, path in MODULES.items() if name != "lowsearch"}
    assert not {name: names for name, names in wrong.items() if names}


@pytest.mark.parametrize(
    ("importer", "source", "expected"),
    [
        ("lowsearch.cost", "from lowsearch.report import page", "lowsearch.cost imports lowsearch.report.page"),
        ("lowsearch.cost", "def f():\n    import lowsearch.search", "lowsearch.cost imports lowsearch.search"),
        ("lowsearch.latency.table", "from ..accuracy import records", "lowsearch.latency.table imports lowsearch.accuracy.records"),
        ("lowsearch.model", "from ..train import engine", "lowsearch.model imports lowsearch.train.engine"),
        ("lowsearch.space", "import_module('lowsearch.cli')", "lowsearch.space imports lowsearch.cli"),
        ("lowsearch.space", "if TYPE_CHECKING:\n    from lowsearch.cost import Cost", "lowsearch.space imports lowsearch.cost"),
    ],
)
def test_the_walk_sees_an_import_that_goes_up_or_sideways(importer: str, source: str, expected: str):
    modules = {importer, expected.split(" imports ")[1]}
    found = imported_modules(source, importer, is_package=importer == "lowsearch.model", modules=modules)
    assert wrong_way({importer: found}) == [expected]


def test_the_walk_lets_an_import_that_goes_down_pass():
    found = imported_modules("from lowsearch.arch import Arch", "lowsearch.space", is_package=False, modules=set(MODULES))
    assert found == {"lowsearch.arch"}
    assert wrong_way({"lowsearch.space": found}) == []


def test_the_walk_sees_a_cycle():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b -> c -> a"]


HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "pandas", "plotly", "sklearn", "scipy", "optuna")


def heavy_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["lowsearch", "lowsearch.cli"])
def test_light_modules_import_nothing_heavy(module: str):
    assert heavy_after(f"import {module}") == set()


def test_help_imports_nothing_heavy():
    run = "import sys; sys.argv = ['lowsearch', '--help']\ntry:\n    from lowsearch.cli import main; main()\nexcept SystemExit: pass\n"
    quiet = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    exec({run!r})"
    assert heavy_after(quiet) == set()


def test_the_report_needs_no_torch_and_no_optuna():
    modules = [name for name in MODULES if room_of(name) == "report"]
    assert not heavy_after("import " + ", ".join(modules)) & {"torch", "torchvision", "timm", "onnx", "onnxruntime", "optuna"}
