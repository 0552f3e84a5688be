"""The wheel is what users get: it carries the spaces, tables and data, and works away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from this checkout with the environment's own hatchling, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel alone; its dependencies come from this environment."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def run_installed(installed: Path, away: Path, *command: str) -> str:
    """Standard output of a Python `command` that sees the installed wheel before the checkout, started `away` from both."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "LOWSEARCH_HOME": str(away / "home")}
    done = subprocess.run([sys.executable, *command], cwd=away, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def shipped_files(folder: str) -> list[str]:
    """Files under `folder` that git tracks: what a clone of the project would ship."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return listed.stdout.split()
    return [str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()]


@pytest.mark.parametrize("folder", ["search_spaces", "latency_tables"])
def test_wheel_carries_every_file_of_the_top_level_folders(folder: str, names_in_wheel: set[str]):
    files = shipped_files(folder)
    assert files
    assert {f"lowsearch/shipped/{name}" for name in files} <= names_in_wheel


def test_wheel_carries_every_file_of_the_package(names_in_wheel: set[str]):
    files = [name for name in shipped_files("lowsearch") if "__pycache__" not in name]
    assert {"lowsearch/arch.py", "lowsearch/py.typed"} <= set(files) <= names_in_wheel


def test_wheel_carries_the_licences(names_in_wheel: set[str]):
    licences = {Path(name).name for name in names_in_wheel if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE", "LICENSE-fashion-mnist.txt"}


def test_wheel_carries_nothing_else(names_in_wheel: set[str]):
    strangers = [n for n in names_in_wheel if not n.startswith(("lowsearch/", "lowsearch-")) or "__pycache__" in n or n.endswith(".pyc")]
    assert strangers == []


def test_wheel_stays_small(wheel: Path):
    assert wheel.stat().st_size < 12 * 2**20


def test_installed_wheel_is_the_one_in_use(installed: Path, tmp_path: Path):
    where = run_installed(installed, tmp_path, "-c", "import lowsearch; print(lowsearch.__file__)")
    assert Path(where).is_relative_to(installed)


@pytest.mark.parametrize("name", ["lowformer", "lowformer-micro"])
def test_installed_wheel_finds_its_search_spaces(installed: Path, tmp_path: Path, name: str):
    code = f"from lowsearch import SearchSpace; space = SearchSpace.load({name!r}); print(all(map(space.contains, space.family.values())))"
    assert run_installed(installed, tmp_path, "-c", code) == "True"


def test_installed_wheel_finds_its_tables(installed: Path, tmp_path: Path):
    code = "from lowsearch import locations; print(*locations.folders('latency_tables'))"
    assert run_installed(installed, tmp_path, "-c", code) == str(installed / "lowsearch" / "shipped" / "latency_tables")


def test_installed_wheel_loads_its_embedded_data(installed: Path, tmp_path: Path):
    code = "from lowsearch.data import load_data; data = load_data('fashion-mnist-mini'); print(len(data.classes), data.train.images.ndim)"
    assert run_installed(installed, tmp_path, "-c", code) == "10 4"


def test_installed_command_line_answers(installed: Path, tmp_path: Path):
    assert "profile" in run_installed(installed, tmp_path, "-m", "lowsearch", "--help")


def test_a_clone_ships_its_shipped_tables_and_not_those_that_were_measured_in_it(tmp_path: Path):
    """Both in the wheel and in the source archive."""
    clone = tmp_path / "clone"
    for name in ("lowsearch", "search_spaces"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone / name)
    shutil.copytree(ROOT / "latency_tables", clone / "latency_tables", ignore=lambda *_: ["shipped"])
    own, shipped = (clone / "latency_tables" / device / "eager-fp32-b1-t1.jsonl" for device in ("my-cpu", "shipped/their-cpu"))
    for path in (own, own.with_suffix(".partial.jsonl"), shipped):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    for kind in ("wheel", "sdist"):
        command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(tmp_path / kind), str(clone)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        (built,) = (tmp_path / kind).iterdir()
        if kind == "wheel":
            with zipfile.ZipFile(built) as archive:
                names = [name.removeprefix("lowsearch/shipped/") for name in archive.namelist()]
        else:
            with tarfile.open(built) as archive:
                names = [name.partition("/")[2] for name in archive.getnames()]
        tables = {name for name in names if name.startswith("latency_tables/")}
        assert tables == {"latency_tables/README.md", "latency_tables/shipped/their-cpu/eager-fp32-b1-t1.jsonl"}
