"""Several processes train what one trains: from the same batches, to the same weights, over interruptions, whatever their number.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from few_images import few_images
from test_train import SMALL

from lowsearch.cli import invoke, main
from lowsearch.errors import UsageError
from lowsearch.train import Recipe, TrainResult, distributed, train
from lowsearch.train.augment import Augmentation, drawing_from
from lowsearch.train.checkpoint import load_tensors
from lowsearch.train.distributed import Ranks, _Launched, launched_ranks
from lowsearch.train.feed import augmented

ODD = Recipe(name="odd", epochs=1, train_images=63, batch_size=21)
EVERYTHING = Recipe(
    name="everything", epochs=2, train_images=88, batch_size=22, shift=0.1, ema_decay=0.9, loss="bce", random_crop=0.3,
    auto_augment="rand-m9-n2-mstd0.5-inc1", erasing=0.5, mixup=0.4, cutmix=1.0, resolutions=(0.5, 1.0), evaluate_at=(0.5, 1.0),
)  # fmt: skip
"""Eight steps with all that is drawn for a batch and its images; 22 are 11 pairs, 6 for one process and 5 for the other."""
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DIES_AT = 9


class Part(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Where sums in another order differ by so little that Adam, which divides by small gradients, does not blow it up."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- shares -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [8, 21, 22])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_are_whole_pairs_in_order_and_make_up_the_batch(n: int, size: int) -> None:
    shares = [Part(rank, size).share(n) for rank in range(size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(n))
    assert all(len(share) and (share[::-1] == n - 1 - share).all() for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    assert Ranks().share(n).tolist() == list(range(n))


def test_a_share_is_changed_and_mixed_as_in_the_whole_batch() -> None:
    stored, labels = torch.from_numpy(few_images(train=40, val=50, test=50).train.images), torch.arange(40) % 10
    batch = np.random.default_rng(0).permutation(40)[:22]
    augmentation = Augmentation(EVERYTHING, resolution_px=32, total_stride=16, num_classes=10)
    keys = np.arange(44).reshape(2, 22)

    def made(mine: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(batch[mine])
        images = augmented(stored, chosen, EVERYTHING, np.random.default_rng(1), part=(mine, 22))
        with drawing_from(np.random.default_rng(2)):
            x_BHWC = augmentation.pixels(images, keys[0, mine].tolist())
            return augmentation.mixed(x_BHWC.permute(0, 3, 1, 2).float(), labels[chosen], keys[1, mine].tolist())

    images, shares_of_labels = made(np.arange(22))
    assert len({image.numpy().tobytes() for image in images}) == 22
    for rank in range(3):
        mine = Part(rank, 3).share(22)
        x, targets = made(mine)
        assert torch.equal(x, images[mine]) and torch.equal(targets, shares_of_labels[mine])


# --- processes --------------------------------------------------------------------------------------------------------------------


def trained_together(folder: Path) -> None:
    """In each of two processes; `folder` holds the checkpoint of a training that one process began."""
    torch.set_default_dtype(torch.float64)
    images = few_images(train=88, val=600, test=50)
    with launched_ranks("cpu") as ranks:
        results = {
            "through": train(SMALL, images, EVERYTHING, seed=3, ranks=ranks),
            "half": train(SMALL, images, EVERYTHING, seed=3, until=0.5, checkpoint=folder / "together.safetensors", ranks=ranks),
            "continued": train(SMALL, images, EVERYTHING, seed=3, checkpoint=folder / "alone.safetensors", ranks=ranks),
            "odd": train(SMALL, images, ODD, seed=0, ranks=ranks),
        }
        for name, result in results.items():
            torch.save({"weights": result.weights, "curve": _curve(result)}, folder / f"{name}-{ranks.rank}.pt")
        distributed.launched_ranks = lambda device: contextlib.nullcontext(ranks)  # A process meets the others once.
        assert invoke(arguments(folder)) == 0


def _curve(result: TrainResult) -> list[float]:
    return [value for point in result.curve for value in (point.step, point.train_loss, point.val_accuracy, point.val_loss)]


def assert_near(weights: dict[str, torch.Tensor], curve: list[float], expected: TrainResult) -> None:
    assert curve == pytest.approx(_curve(expected), abs=1e-8)
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-8), name


@pytest.mark.usefixtures("in_float64")
def test_two_processes_train_what_one_trains_and_go_on_for_each_other(tmp_path: Path) -> None:
    images = few_images(train=88, val=600, test=50)
    alone = train(SMALL, images, EVERYTHING, seed=3)
    train(SMALL, images, EVERYTHING, seed=3, until=0.5, checkpoint=tmp_path / "alone.safetensors")
    done = subprocess.run([*LAUNCH, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "trained" / "metrics.json").read_text())
    assert json.loads(done.stdout) == {**metrics, "folder": str(tmp_path / "trained")}, "one of them tells"

    expected = {"through": alone, "continued": alone, "odd": train(SMALL, images, ODD, seed=0)}
    for name, result in expected.items():
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_near(first["weights"], first["curve"], result)
        assert first["curve"] == second["curve"]
        assert all(torch.equal(value, second["weights"][key]) for key, value in first["weights"].items())
    steps: list[int] = []
    continued = train(
        SMALL, images, EVERYTHING, seed=3, checkpoint=tmp_path / "together.safetensors", progress=lambda done: steps.append(round(8 * done))
    )
    assert steps == [5, 6, 7, 8]
    assert_near(continued.weights, _curve(continued), alone)


def arguments(folder: Path) -> list[str]:
    (folder / "arch.json").write_text(SMALL.to_json())
    recipe = [word for field in ("train_images=96", "batch_size=24", "epochs=3", "evaluate_at=[1.0]") for word in ("--recipe-set", field)]
    return ["train", str(folder / "arch.json"), "--out", str(folder / "trained"), "--json", *recipe]


def test_a_process_that_dies_ends_the_other_with_one_line_and_the_same_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (out, said), _ = (process.communicate(timeout=240) for process in processes)
    assert [process.returncode for process in processes] == [2, -signal.SIGKILL], said
    assert not (tmp_path / "taken-down").exists(), "Python took the process down, which now and then aborts"
    assert out == "" and "Traceback" not in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [
        "error: another process of this training ended, and with it this one; hint: its own message says why; the same command resumes"
    ]
    assert load_tensors(tmp_path / "trained" / "checkpoint.safetensors")[1]["step"] == DIES_AT - 1

    assert invoke(arguments(tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["val_accuracy"] > 0
    assert sorted(path.name for path in (tmp_path / "trained").iterdir()) == ["arch.json", "metrics.json", "model.safetensors"]


# --- faults -----------------------------------------------------------------------------------------------------------------------


def test_a_batch_too_small_for_the_processes_is_refused() -> None:
    images = few_images(train=88, val=50, test=50)
    with pytest.raises(UsageError, match="a batch of 22 images is too small for 12 processes"):
        train(SMALL, images, dataclasses.replace(EVERYTHING, epochs=1), seed=0, ranks=Part(0, 12))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="more processes than this machine has GPUs, 2"), launched_ranks("cuda"):
        pass


def _dies_in_company() -> None:
    """The command, whose second process is killed in a step."""
    atexit.register((Path(sys.argv[2]).parent / "taken-down").touch)
    real, calls = _Launched.sum, iter(range(1, 1000))

    def deadly(self: _Launched, tensors: list[Any]) -> None:
        if next(calls) == DIES_AT and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, tensors)

    _Launched.sum = deadly  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        trained_together(Path(sys.argv[1]))
    else:
        _dies_in_company()
