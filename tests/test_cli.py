"""The command line: what it prints, and that every mistake is one clear line with exit code 2 and nothing damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowsearch import PRESETS, cli
from lowsearch.cli.typed import parse_budget
from lowsearch.errors import UsageError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOWSEARCH_HOME", str(tmp_path / "home"))
    return tmp_path


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that a mistaken command prints."""
    code = cli.invoke(arguments)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    assert "Traceback" not in printed.err
    return lines[0]


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke([]) == 0
    printed = capsys.readouterr().out
    for verb in ("devices", "profile", "run", "report", "train", "space", "cost"):
        assert f"  {verb} " in printed


def test_cost_of_a_preset_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["cost", "lowformer_b1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["arch_id"] == PRESETS["lowformer_b1"].arch_id
    assert values["macs"] == sum(row["macs"] for row in values["blocks"])
    assert round(values["macs"] / 1e6) == 1411


def test_cost_reads_an_arch_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "arch.json").write_text(PRESETS["cpubone_b0"].to_json())
    assert cli.invoke(["cost", "arch.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arch_id"] == PRESETS["cpubone_b0"].arch_id


def test_space_prints_its_genes_and_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["space", "lowformer-micro", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["networks"] > 1e12 and {"micro-b-s", "micro-e-s"} <= {row["name"] for row in values["family"]}
    assert cli.invoke(["space", "lowformer"]) == 0
    assert "stage3.attention.stride" in capsys.readouterr().out


def test_devices_lists_this_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["kind"] == "cpu"


@pytest.mark.parametrize(("text", "seconds"), [("8m", 480), ("90s", 90), ("1h30m", 5400), ("0.5h", 1800), ("1m30s", 90)])
def test_budgets_are_durations(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "m", "8 minutes", "-8m", "0m", "8m!", "30s1m"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["spce"], "No such command"),
        (["--nonsense"], "No such option"),
        (["space"], "Missing argument"),
        (["space", "nowhere"], "known: lowformer, lowformer-micro"),
        (["space", "nowhere.yaml"], "cannot read"),
        (["cost", "lowformer_b9"], "unknown preset"),
        (["cost", "nowhere.json"], "no such file"),
        (["profile", "--batch", "many"], "--batch"),
        (["profile", "--batch", "0"], "--batch"),
        (["profile", "--threads", "-1"], "--threads"),
        (["profile", "--seed", "x"], "--seed"),
        (["profile", "--device", "rtx3090"], "rtx3090 is not attached"),
        (["profile", "--device", "rtx3090", "--runtime", "eager"], "latency_tables/rtx3090"),
        (["profile", "--device", "cuda"], "no cuda device is attached"),
        (["profile", "--device", "../../etc"], "not a name"),
        (["profile", "--runtime", "tensorflow"], "onnxruntime"),
        (["profile", "--precision", "fp12"], "precision"),
        (["profile", "--space", "nowhere"], "unknown search space"),
        (["run", "--objective", "acc-speed"], "speed"),
        (["run", "--objective", "acc-acc"], "acc"),
        (["run", "--max", "latency_ms"], "latency_ms"),
        (["run", "--max", "latency_ms=fast"], "fast"),
        (["run", "--max", "latency=3"], "latency"),
        (["run", "--min", "accuracy=nan"], "nan"),
        (["run", "--budget", "8"], "8m, 90s or 1h30m"),
        (["run", "--budget", "0s"], "is not a duration"),
        (["run", "--trials", "0"], "trials"),
        (["run", "--trials", "ten"], "--trials"),
        (["run", "--workers", "0"], "workers"),
        (["run", "--seed", "-1"], "seed"),
        (["run", "--sampler", "cma"], "--sampler"),
        (["run", "--accuracy", "top5"], "--accuracy"),
        (["run", "--accuracy", "macs", "--min", "accuracy=0.8"], "accuracy has a limit"),
        (["run", "--study", "../escape"], "no folder name"),
        (["run", "--study", ""], "no folder name"),
        (["run", "--space", "nowhere"], "unknown search space"),
        (["run", "--space", "lowformer"], "--accuracy macs"),
        (["run", "--device", "rtx3090"], "rtx3090"),
        (["run", "--device", "rtx3090", "--accuracy", "macs"], "rtx3090"),
        (["run", "--data", "imagenet"], "unknown data set"),
        (["run", "--data", "folder:nowhere"], "nowhere"),
        (["run", "--data", "npz:nowhere.npz"], "nowhere.npz"),
        (["run", "--data", "torchvision:NoSuchSet"], "NoSuchSet"),
        (["run", "--recipe", "imagenet"], "unknown recipe"),
        (["run", "--rungs", "0.25@2px,1"], "rungs are '0.25@2px,1'"),
        (["run", "--rungs", "0.5"], "--rungs 0.25@0.5px,0.5,1"),
        (["run", "--rungs", "1@0.001img,1"], "fewer than the 10 classes"),
        (["report", "nowhere"], "no study"),
        (["train", "nowhere"], "unknown preset"),
        (["train", "nowhere", "--arch", "abc"], "no study"),
        (["train", "lowformer_b0", "--epochs", "0"], "--epochs"),
        (["train", "lowformer_b0", "--device", "tpu"], "cannot train"),
        (["train", "lowformer_b0", "--device", "cuda"], "no CUDA device"),
        (["train", "lowformer_b0", "--recipe", "imagenet"], "unknown recipe"),
        (["train", "lowformer_b0", "--data", "folder:nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(arguments, capsys)
    assert says in said, said


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"resolution_px": 224}', '{"resolution_px": 224, "stem": 3, "stages": []}', "\x00"])
def test_malformed_arch_files_are_refused_and_left_alone(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "arch.json"
    path.write_text(text)
    complaint(["cost", "arch.json"], capsys)
    assert path.read_text() == text


def test_malformed_space_file_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ninput:\n  - {resolution_px: 33, stem_stride: 1}\nstem: {width: [8]}\nstages: []\nhead_widths: [[8, 8]]\n"
    )
    assert "mine.yaml:3: resolution_px 33" in complaint(["space", "mine.yaml"], capsys)


def test_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m lowsearch space lowformer | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


TABLE = Path("latency_tables") / "rtx3090" / "eager-fp32-b1-t1.jsonl"
DAMAGED_TABLES = [
    "", "{", "[]", "null", '{"schema": "other"}', '{"schema": "lowsearch-latency-table", "version": 99}', "\x00\x01", '{"a": 1}\n{"b"',
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED_TABLES)
def test_damaged_tables_are_refused_and_left_alone(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    TABLE.parent.mkdir(parents=True)
    TABLE.write_text(text)
    assert TABLE.name in complaint(["run", "--device", "rtx3090", "--runtime", "eager"], capsys)
    assert TABLE.read_text() == text


@pytest.mark.parametrize("text", ["", "- 1", "schema: other", "{", "schema: lowsearch-study\nversion: 99"])
def test_damaged_studies_are_refused_and_left_alone(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("studies") / "mine" / "study.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert "study.yaml" in complaint(["run", "--study", "mine"], capsys)
    assert path.read_text() == text


def _images(path: Path, n: int = 8, px: int = 32) -> None:
    from PIL import Image

    for i in range(n):
        path.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (px, px), (i * 20, 0, 0)).save(path / f"{i}.png")


def _empty() -> None:
    Path("data").mkdir()


def _one_class() -> None:
    _images(Path("data/cat"))


def _empty_class() -> None:
    _images(Path("data/cat"))
    Path("data/dog").mkdir()


def _broken_image() -> None:
    _images(Path("data/cat"))
    _images(Path("data/dog"))
    Path("data/dog/0.png").write_bytes(b"no image")


def _file_instead() -> None:
    Path("data").write_text("no folder")


@pytest.mark.parametrize("make", [_empty, _one_class, _empty_class, _broken_image, _file_instead])
def test_malformed_data_folders_are_refused(make: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    make()
    assert "data" in complaint(["train", "lowformer_b0", "--data", "folder:data"], capsys)
    assert not Path("trained").exists()


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"x_train": np.zeros((4, 8, 8, 3), np.uint8)},
        {"x_train": np.zeros((4, 8, 8, 3)), "y_train": np.zeros(4, int), "x_test": np.zeros((4, 8, 8, 3)), "y_test": np.zeros(4, int)},
        {"x_train": np.zeros(4, np.uint8), "y_train": np.zeros(4, int), "x_test": np.zeros(4, np.uint8), "y_test": np.zeros(4, int)},
        {"x_train": np.array([{}], dtype=object), "y_train": np.zeros(1, int)},
    ],
)
def test_malformed_npz_files_are_refused(arrays: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("data.npz", **arrays)  # type: ignore[arg-type]
    assert "data.npz" in complaint(["train", "lowformer_b0", "--data", "npz:data.npz"], capsys)


def test_a_study_goes_on_with_its_own_settings_and_only_typed_flags_are_asked_anew(capsys: pytest.CaptureFixture[str]) -> None:
    from lowsearch.study.run import write_study_file
    from lowsearch.study.settings import SCHEMA, VERSION, StudySettings

    made = StudySettings(device="rtx3090", runtime="eager", accuracy="macs", seed=7, trials=3)
    Path("studies/mine").mkdir(parents=True)
    write_study_file(Path("studies/mine"), {"schema": SCHEMA, "version": VERSION, "settings": made.to_dict()})
    assert "rtx3090 eager" in complaint(["run", "--study", "mine"], capsys)
    assert "seed 7, not 1" in complaint(["run", "--study", "mine", "--seed", "1"], capsys)
