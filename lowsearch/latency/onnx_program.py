"""One ONNX model in ONNX Runtime on one CPU thread, ready to be timed.

Used by runtimes.py, and carried to machines that lowsearch is not installed on (bundle.py): numpy and onnxruntime only, and Python 3.8.
"""

from __future__ import annotations

import numpy as np


class OnnxProgram:
    """Input and output are bound once: a call moves no data through Python."""

    def __init__(self, model: bytes, x: np.ndarray) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
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
