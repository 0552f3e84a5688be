"""`__all__` is the promise: every name in it exists, and every public name that a module defines is in it."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import lowsearch

MODULES = ["lowsearch", *sorted(m.name for m in pkgutil.walk_packages(lowsearch.__path__, "lowsearch.") if not m.name.endswith("__main__"))]


def source_of(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def declared_names(module: str) -> list[str] | None:
    """The literal value of `__all__`, read without importing; None where there is none."""
    for node in source_of(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


WITH_ALL = [module for module in MODULES if declared_names(module) is not None]


def test_the_package_declares_its_names():
    assert "lowsearch" in WITH_ALL


@pytest.mark.parametrize("module", WITH_ALL)
def test_every_declared_name_exists_once(module: str):
    names = declared_names(module) or []
    assert len(names) == len(set(names))
    loaded = importlib.import_module(module)
    assert [name for name in names if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", WITH_ALL)
def test_every_public_definition_is_declared(module: str):
    definitions = {n.name for n in source_of(module).body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")}
    assert definitions <= set(declared_names(module) or [])


def test_lazy_names_are_the_declared_ones():
    """`lowsearch.__getattr__` knows exactly the names of `__all__`, and refuses others."""
    assert {*lowsearch._HOMES, "cost"} == set(lowsearch.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lowsearch.no_such_name


def test_the_version_is_the_one_in_pyproject():
    text = (Path(lowsearch.__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{lowsearch.__version__}"' in text


def test_types_are_shipped():
    assert (Path(lowsearch.__file__).parent / "py.typed").exists()
