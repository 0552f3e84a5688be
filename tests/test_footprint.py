"""The closed form of file size and peak memory, against the ONNX file that is written and the tensors that torch really makes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowsearch import footprint
from lowsearch.arch import Arch, Block, Lowtention, input_channels
from lowsearch.latency.onnx_runtimes import export_onnx, quantised
from lowsearch.model.blocks import build_block, randomise
from lowsearch.model.lowformer import LowFormer
from lowsearch.presets import PRESETS
from lowsearch.space import SearchSpace

SPACES = ("lowformer", "lowformer-micro")
GRAPH_BYTES_A_BLOCK = {"fp32": 4_000, "fp16": 4_000, "int8": 25_000}


class LiveTensors(TorchDispatchMode):
    """Every operator that torch runs, with the storages it reads and makes: what must live when, if each is freed after its last use."""

    def __init__(self, given: Tensor, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._ids: dict[int, int] = {}
        """Storage of a padded tensor -> that of what was padded."""
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        self.elements: dict[int, int] = {}
        self.operators: list[set[int]] = []
        """The storages that each reads or writes, in the order they run."""
        self._held: list[Tensor] = [given]  # No address is used twice while every tensor is held.
        self._note(given)

    def _note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self.elements.setdefault(storage.data_ptr(), storage.nbytes() // tensor.element_size())
        return storage.data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self._weights]
        if func is torch.ops.aten.constant_pad_nd.default:  # A convolution pads as it reads: no tensor of its own.
            padded = func(*args, **(kwargs or {}))
            self._held.append(padded)
            self._ids[padded.untyped_storage().data_ptr()] = self._key(read[0])
            return padded
        made = func(*args, **(kwargs or {}))
        first = made[0] if isinstance(made, tuple | list) else made  # A norm's statistics are its own.
        outputs = list(made) if isinstance(made, list) else [first]
        if not read:  # A view of a weight.
            self._weights |= {t.untyped_storage().data_ptr() for t in outputs}
            return made
        self._held += outputs
        for tensor in [*read, *outputs]:
            self._note(tensor)
        self.operators.append({self._key(t) for t in [*read, *outputs]})
        return made

    def _key(self, tensor: Tensor) -> int:
        pointer = tensor.untyped_storage().data_ptr()
        return self._ids.get(pointer, pointer)

    def peak_elements(self) -> int:
        first = {key: i for i, keys in reversed(list(enumerate(self.operators))) for key in keys}
        last = {key: i for i, keys in enumerate(self.operators) for key in keys}
        return max(
            sum(self.elements[key] for key in first if first[key] <= i <= last[key]) for i in range(len(self.operators))
        )  # fmt: skip


def real_peak_elements(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the operators that torch runs in `module`, its BatchNorms folded away, attention as two products."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.BatchNorm2d):
            module.set_submodule(name, nn.Identity())
    with torch.inference_mode(False), torch.no_grad(), LiveTensors(x, module.state_dict()) as live:
        module.eval()(x)
    return live.peak_elements()


def members(n: int) -> Iterator[Arch]:
    for name in SPACES:
        space = SearchSpace.load(name)
        yield from (space.decode(genome) for genome in space.sample(n, rng=np.random.default_rng(0)))


def blocks_of_every_form() -> list[Block]:
    """One block of every kind and form of both spaces."""
    found: dict[tuple[Any, ...], Block] = {}
    forms = ("fused", "bias", "projection", "norm", "kernel", "stride")
    for name in reversed(SPACES):  # Where both have a form, the small network's.
        for block in SearchSpace.load(name).blocks:
            found.setdefault((block.kind, *(getattr(block, form, None) for form in forms)), block)
    return list(found.values())


def an_input(block: Block) -> Tensor:
    return torch.zeros(2, input_channels(block), block.resolution_px, block.resolution_px)


ODD = Lowtention(channels=32, resolution_px=7, stride=2, kernel=3, heads=2, head_dim=8, projection="nearest", norm=True)


@pytest.mark.parametrize("block", [*blocks_of_every_form(), ODD], ids=repr)
def test_peak_of_a_block_is_that_of_the_tensors_torch_makes(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 * footprint.peak_elements(block) == real_peak_elements(build_block(block), an_input(block), monkeypatch)


@pytest.mark.parametrize("arch", [*members(2), PRESETS["lowformer_b0"]], ids=lambda arch: arch.arch_id)
def test_peak_of_a_network_is_its_weights_and_its_largest_block(arch: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, arch.resolution_px, arch.resolution_px)
    peak = real_peak_elements(LowFormer(arch), x, monkeypatch)
    activations_mb = footprint.peak_memory_mb(arch, batch=2) - footprint.artifact_mb(arch)
    assert activations_mb == pytest.approx(4e-6 * peak, rel=1e-12)


def weights_of(model: bytes) -> int:
    """Bytes of all weights in an ONNX file; what has at most one element belongs to the graph."""
    sizes = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.INT32: 4}
    found = [(sizes.get(i.data_type, 1), int(np.prod(i.dims))) for i in onnx.load_from_string(model).graph.initializer]
    return sum(size * n for size, n in found if n > 1)


@pytest.mark.parametrize(
    ("arch", "precision"), [*((arch, "fp32") for arch in members(2)), *((arch, "fp16") for arch in members(2) if arch.resolution_px < 96)]
)  # fmt: skip
def test_artifact_is_the_weights_of_the_onnx_file_and_little_less_than_the_file(arch: Arch, precision: str) -> None:
    model, x = LowFormer(arch).eval(), torch.zeros(1, 3, arch.resolution_px, arch.resolution_px)
    randomise(model, seed=0)
    if precision == "fp16":
        model, x = model.half(), x.half()
    exported = export_onnx(model, x)
    predicted = round(1e6 * footprint.artifact_mb(arch, precision=precision))
    assert predicted == weights_of(exported)
    assert 0 < len(exported) - predicted < GRAPH_BYTES_A_BLOCK[precision] * len(arch.blocks())


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without the advice that ONNX Runtime's quantiser logs for every model."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("block", blocks_of_every_form(), ids=repr)
def test_artifact_at_int8_is_the_quantised_file(block: Block, quiet: None) -> None:
    module, x = build_block(block).eval(), torch.randn(1, input_channels(block), block.resolution_px, block.resolution_px)
    randomise(module, seed=0)
    model = quantised(export_onnx(module, x), x.numpy())
    predicted = footprint.weight_bytes(block, "int8")
    assert predicted == pytest.approx(weights_of(model), rel=0.02, abs=8)
    assert len(model) - predicted < GRAPH_BYTES_A_BLOCK["int8"]


def test_precision_and_batch_scale_what_they_should() -> None:
    arch = PRESETS["lowformer_b1"]
    weights, one, eight = (footprint.artifact_mb(arch), footprint.peak_memory_mb(arch), footprint.peak_memory_mb(arch, batch=8))
    assert eight - weights == pytest.approx(8 * (one - weights))
    assert footprint.peak_memory_mb(arch, precision="fp16", batch=8) == pytest.approx(eight / 2)
    assert weights / 4 < footprint.artifact_mb(arch, precision="int8") < weights / 3
