"""Adapters swapped at run time with onnxruntime and numpy alone: this toolkit is not imported.

    python swap.py swappable.onnx a.onnx_adapter b.onnx_adapter
    python swap.py --paired paired.onnx a.inputs.safetensors b.inputs.safetensors

README.md beside this file says how the files are made.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnxruntime as ort


def session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # ONNX Runtime warns of every input that has a default
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def overridable(graph: ort.InferenceSession) -> list[ort.NodeArg]:
    """The inputs that have a default: get_inputs() leaves them out."""
    return graph.get_overridable_initializers()


def example(graph: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Two rows of eight tokens."""
    names = {value.name for value in graph.get_inputs()}
    ids = np.arange(100, 116, dtype=np.int64).reshape(2, 8)
    every = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    return {name: array for name, array in every.items() if name in names}


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    dtypes = {"F32": np.float32, "F64": np.float64, "F16": np.float16, "I64": np.int64}
    with open(path, "rb") as file:
        data = file.read()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(
            data[end + tensor["data_offsets"][0] : end + tensor["data_offsets"][1]],
            dtypes[tensor["dtype"]],
        ).reshape(tensor["shape"])
        for name, tensor in header.items()
    }


def swappable(model: str, adapters: list[str]) -> None:
    graph = session(model)
    inputs = example(graph)
    print("default", graph.run(None, inputs)[0])
    loaded = []  # ONNX Runtime does not keep these alive: without them it runs the default
    for path in adapters:
        adapter = ort.LoraAdapter()
        adapter.Load(path)
        loaded.append(adapter)
        run_options = ort.RunOptions()
        run_options.add_active_adapter(adapter)
        print(path, graph.run(None, inputs, run_options)[0])


def paired(model: str, adapters: list[str]) -> None:
    graph, expand = session(model), session(model.removesuffix(".onnx") + ".expand.onnx")
    inputs = example(graph)
    spectral = {value.name for value in (*expand.get_inputs(), *overridable(expand))}
    names = [value.name for value in expand.get_outputs()]
    for path in adapters:
        parameters = read_safetensors(path)
        heads = {k: v for k, v in parameters.items() if k not in spectral}
        start = time.perf_counter()
        weights = expand.run(names, {k: v for k, v in parameters.items() if k in spectral})
        spent = time.perf_counter() - start
        feeds = inputs | heads | dict(zip(names, weights, strict=True))
        print(path, f"expanded in {spent * 1e3:.0f} ms", graph.run(None, feeds)[0])


if __name__ == "__main__":
    if sys.argv[1] == "--paired":
        paired(sys.argv[2], sys.argv[3:])
    else:
        swappable(sys.argv[1], sys.argv[2:])
