"""Finding a layer's weight in a graph by the numbers it was traced with, in either layout."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from fourierft_export.onnx_graph.trace.base import find_marks

RNG = np.random.default_rng(0)
A, B, C = (RNG.standard_normal((4, 4)).astype(np.float32) for _ in range(3))


def graph(**constants: np.ndarray) -> ir.Model:
    values = []
    for name, array in constants.items():
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        values.append(
            ir.Value(
                name=name,
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
    made = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20})
    return ir.Model(made, ir_version=10)


def held(model: ir.Model, marks: dict[str, np.ndarray]) -> dict[str, list[tuple[str | None, bool]]]:
    found = find_marks(model, marks)
    return {
        name: [(value.name, turned) for value, turned in places] for name, places in found.items()
    }


def test_either_layout_of_square_weights_is_told_by_content() -> None:
    model = graph(scalar=np.float32(1), first=A, second=B.T, other=C)
    assert held(model, {"b": B, "a": A}) == {"b": [("second", True)], "a": [("first", False)]}


def test_a_weight_held_in_both_layouts_has_two_places() -> None:
    assert held(graph(first=A, second=A.T), {"a": A}) == {"a": [("first", False), ("second", True)]}


def test_one_other_number_or_dtype_is_another_weight() -> None:
    nearly, half = A.copy(), A.astype(np.float16)
    nearly[3, 2] += 1e-6
    assert held(graph(first=nearly), {"a": A}) == {"a": []}
    assert held(graph(first=half.astype(np.float32)), {"a": half}) == {"a": []}
