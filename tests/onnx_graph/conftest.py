"""Small models, and ONNX Runtime to run what was exported of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest


def run_onnx(path: Path, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name, from ONNX Runtime on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), quiet_options(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def quiet_options() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


@pytest.fixture(scope="session")
def run() -> Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]:
    return run_onnx


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], onnx.ModelProto]:
    """`folded(path)`: the model as ONNX Runtime has it once it is loaded."""
    import onnxruntime as ort

    def load(path: Path) -> onnx.ModelProto:
        options = quiet_options()
        out = tmp_path_factory.mktemp("folded") / "model.onnx"
        options.optimized_model_filepath = str(out)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(out)

    return load


@pytest.fixture(scope="session")
def node_list() -> Callable[[onnx.ModelProto], list[tuple[object, ...]]]:
    """`node_list(model)`: every node with all that it has, but what its weights are called."""

    def nodes(model: onnx.ModelProto) -> list[tuple[object, ...]]:
        constants = {tensor.name for tensor in model.graph.initializer}
        return [
            (
                node.domain,
                node.op_type,
                node.name,
                tuple("*" if name in constants else name for name in node.input),
                tuple(node.output),
                tuple(attribute.SerializeToString() for attribute in node.attribute),
            )
            for node in model.graph.node
        ]

    return nodes
