"""One ONNX model in ONNX Runtime on one CPU thread, ready to be timed.

Beside onnx_runtimes.py, which needs torch: this is carried to machines that lowsearch is not installed on (bundle.py), so numpy and
onnxruntime only, and Python 3.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def session_options(*, threads: int) -> Any:
    """What every session of ONNX Runtime is told here, wherever it runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # One thread need not wait for others. Several find each other faster spinning, but not when another block has its turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if threads == 1 else "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options


class OnnxProgram:
    """Input and output are bound once: a call moves no data through Python."""

    def __init__(self, model: bytes, x: np.ndarray) -> None:
        import onnxruntime as ort

        self._session = ort.InferenceSession(model, session_options(threads=1), providers=["CPUExecutionProvider"])
        (given,), (wanted,) = self._session.get_inputs(), self._session.get_outputs()
        self._output = ort.OrtValue.ortvalue_from_numpy(np.zeros(wanted.shape, np.float32))
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(given.name, ort.OrtValue.ortvalue_from_numpy(x))
        self._binding.bind_ortvalue_output(wanted.name, self._output)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> np.ndarray:
        self.run()
        return self._output.numpy().copy()
