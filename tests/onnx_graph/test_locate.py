"""Finding a layer's weight in a graph by the numbers it was traced with, in either layout."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fourierft_export.errors import BadInputError
from fourierft_export.onnx_graph.locate.marks import locate_marks

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


def test_either_layout_of_square_weights_is_told_by_content() -> None:
    model = graph(scalar=np.float32(1), first=A, second=B.T, other=C)
    sites = locate_marks(model, {"layer.b": B, "layer.a": A})
    found = [(site.layer, site.value.name, site.turned) for site in sites]
    assert found == [("layer.b", "second", True), ("layer.a", "first", False)]


def test_a_weight_held_in_both_layouts_has_two_sites() -> None:
    sites = locate_marks(graph(first=A, second=A.T), {"a": A})
    assert [(site.value.name, site.turned) for site in sites] == [
        ("first", False),
        ("second", True),
    ]


def test_one_other_number_or_dtype_is_another_weight() -> None:
    nearly = A.copy()
    nearly[3, 2] += 1e-6
    with pytest.raises(BadInputError):
        locate_marks(graph(first=nearly), {"a": A})
    half = A.astype(np.float16)
    with pytest.raises(BadInputError):
        locate_marks(graph(first=half.astype(np.float32)), {"a": half})


def test_all_missing_layers_are_named_at_once() -> None:
    with pytest.raises(BadInputError) as caught:
        locate_marks(graph(first=A), {"a": A, "b": B, "c": C})
    assert caught.value.offenders == ("b", "c")
    assert "2 of 3" in str(caught.value)
