"""Weights that model-local functions hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx_ir import from_proto, to_proto
from torch import nn

import fourierft_export as ff
from fourierft_export.errors import BadInputError, BaseMismatchError

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
MODES = ("merged", "unmerged", "swappable", "paired", "bank")
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
SHAPE = (10, 6)
X = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {"up": SHAPE, "down": SHAPE[::-1]}.items()
    }


def constant(name: str, array: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name))


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    return helper.make_function("local", name, ["x"], ["y"], nodes, OPSETS)


def call(name: str, source: str, to: str) -> onnx.NodeProto:
    return helper.make_node(name, [source], [to], domain="local")


def model_of_functions(names: dict[str, str], opsets: Any = OPSETS) -> onnx.ModelProto:
    """tanh(up) and down in a function each, in an outer one called twice; and one without weights.

    `up` is held as (out, in) and transposed there, `down` as (in, out).
    """
    held, bias = weights(), np.full(10, 0.5, np.float32)
    up = [
        constant(names["up"], held["up"]),
        constant(names["bias"], bias),
        helper.make_node("Transpose", [names["up"]], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["product"]),
        helper.make_node("Add", ["product", names["bias"]], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["y"]),
    ]
    down = [
        constant(names["down"], held["down"].T.copy()),
        helper.make_node("MatMul", ["x", names["down"]], ["y"]),
    ]
    other = [helper.make_node("Sin", ["x"], ["y"])]
    both = [call("Up", "x", "middle"), call("Down", "middle", "y")]
    nodes = [call("Both", "x", "once"), call("Both", "once", "twice"), call("Other", "twice", "y")]
    values = [helper.make_tensor_value_info(name, 1, ["batch", 6]) for name in "xy"]
    bodies = {"Up": up, "Down": down, "Other": other, "Both": both}
    functions = [function(name, body) for name, body in bodies.items()]
    functions[0].opset_import[0].version = opsets[0].version
    return helper.make_model(
        helper.make_graph(nodes, "g", [values[0]], [values[1]]),
        opset_imports=OPSETS,
        ir_version=8,
        functions=functions,
    )


NAMED = {"up": "up.weight", "down": "down.weight", "bias": "up.bias"}
ANONYMOUS = {"up": "c0", "down": "c1", "bias": "c2"}


def exact(x: np.ndarray, up: np.ndarray, down: np.ndarray, bias: np.ndarray | float) -> np.ndarray:
    y = x.astype(np.float64)
    for _ in range(2):
        y = np.tanh(y @ up.T + bias) @ down.T
    return np.sin(y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", [NAMED, ANONYMOUS], ids=["by name", "by value"])
def test_weights_within_functions(
    names: dict[str, str], mode: str, make_bundle: Any, exact_delta: Any, tmp_path: Path, run: Run
) -> None:
    """Both calls of a function have the adapter; functions without weights stay."""
    held = {name: weights()[name] for name in ("up", "down")}
    saved = {"up.bias": np.linspace(-1, 1, 10, dtype=np.float32)} if names is NAMED else {}
    bundle = make_bundle(["up", "down"], held, saved, scaling=30.0)
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model_of_functions(names), source)
    report = ff.apply_onnx(source, {"a": bundle}, out, mode=mode)
    assert "functions that hold weights are expanded: Both, Down, Up" in report.notes
    kept = [one.name for one in onnx.load(out).functions if one.domain == "local"]
    assert kept == ["Other"]
    got = ff.AdapterSession(out)
    base, feeds = exact(X, held["up"], held["down"], 0.5), {"x": X}
    new = {name: held[name] + exact_delta(bundle, name, held[name].shape) for name in held}
    want = exact(X, new["up"], new["down"], saved.get("up.bias", 0.5))
    assert np.abs(want - base).max() > 0.5
    if mode in ("merged", "unmerged"):
        answer = run(out, feeds)["y"]
    else:
        np.testing.assert_allclose(got.run(feeds)["y"], base, atol=1e-4 * np.abs(base).max())
        got.load("mine", bundle)
        answer = got.run(feeds, adapter="mine")["y"]
    np.testing.assert_allclose(answer, want, rtol=0, atol=1e-4 * np.abs(want).max())
    # One constant for both calls, as it was one in the function.
    shapes = [tuple(t.dims) for t in onnx.load(out).graph.initializer]
    if mode == "merged":
        assert sorted(shape for shape in shapes if len(shape) == 2) == [(10, 6), (10, 6)]


@pytest.mark.parametrize("calls", ["without end", "2^40 times"])
def test_functions_that_call_each_other(calls: str, make_bundle: Any, tmp_path: Path) -> None:
    model, source = model_of_functions(NAMED), tmp_path / "in.onnx"
    for depth in range(40):
        inner = ("Both" if depth == 0 else f"F{depth - 1}") if calls[0] == "2" else f"F{39 - depth}"
        twice = [call(inner, "x", "m"), call(inner, "m", "y")]
        model.functions.append(function(f"F{depth}", twice))
    model.graph.node.insert(0, call("F39", "x", "unused"))
    onnx.save(model, source)
    bundle = make_bundle(["up"], {"up": weights()["up"]})
    with pytest.raises(BadInputError, match="without end" if calls[0] == "w" else "found more"):
        ff.apply_onnx(source, bundle, tmp_path / "out.onnx")


def test_mapped_by_hand(make_bundle: Any, exact_delta: Any, tmp_path: Path, run: Run) -> None:
    """An unbound adapter has no fingerprint: the caller names the constant in the function."""
    bundle = make_bundle(["layer"], scaling=30.0)
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model_of_functions(ANONYMOUS), source)
    with pytest.raises(BaseMismatchError, match="--map"):
        ff.apply_onnx(source, bundle, out)
    ff.apply_onnx(source, bundle, out, mapping={"layer": "c0"})
    held = weights()
    want = exact(X, held["up"] + exact_delta(bundle, "layer", SHAPE), held["down"], 0.5)
    np.testing.assert_allclose(run(out, {"x": X})["y"], want, rtol=0, atol=1e-4)


def test_functions_that_cannot_be_expanded(make_bundle: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(model_of_functions(NAMED, [helper.make_opsetid("", 17)]), source)
    bundle = make_bundle(["up"], {"up": weights()["up"]})
    with pytest.raises(BadInputError, match="inline_local_functions"):
        ff.apply_onnx(source, bundle, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def block_functions(plain: onnx.ModelProto) -> onnx.ModelProto:
    """An export with the nodes of each block, and what they hold, in a function of its own."""
    model = onnx.ModelProto.FromString(plain.SerializeToString())
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    scopes = [next(p.value for p in n.metadata_props if "scopes" in p.key) for n in graph.node]
    calls = []
    for number in range(2):
        nodes = [n for n, s in zip(graph.node, scopes, strict=True) if f"'{number}'" in s]
        made = {name for node in nodes for name in node.output}
        fed = [name for node in nodes for name in node.input if name not in made | held.keys()]
        used = [name for node in nodes for name in node.input if name in held]
        last = nodes[-1].output[0]
        constants = [constant(n, numpy_helper.to_array(held.pop(n))) for n in dict.fromkeys(used)]
        model.functions.append(
            helper.make_function(
                "local", f"Block{number}", [fed[0]], [last], constants + nodes, model.opset_import
            )
        )
        calls.append(helper.make_node(f"Block{number}", [fed[0]], [last], domain="local"))
    del graph.node[:]
    graph.node.extend(calls)
    del graph.initializer[:]
    graph.initializer.extend(held.values())
    del graph.value_info[:]
    model.opset_import.append(helper.make_opsetid("local", 1))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_a_dynamo_export_as_functions(
    mode: str, make_bundle: Any, exact_delta: Any, tmp_path: Path, run: Run
) -> None:
    """Layers are found by the scopes of their nodes; equal to PyTorch in float64."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(4, 3, 8)
    program = torch.onnx.export(
        model, (x,), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},), opset_version=18
    )
    assert program is not None
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    in_functions = block_functions(to_proto(from_proto(program.model_proto)))
    onnx.save(in_functions, source)
    assert len(in_functions.functions) == 2
    name, output = in_functions.graph.input[0].name, in_functions.graph.output[0].name
    layers = ["0.up", "1.down"]
    held = {name: model.get_submodule(name).weight.detach().numpy() for name in layers}
    bundle = make_bundle(layers, scaling=40.0, n=30)
    report = ff.apply_onnx(source, {"a": bundle}, out, mode=mode)
    assert set(report.layers) == set(layers)
    changed = model.double()
    for layer in layers:
        delta = exact_delta(bundle, layer, held[layer].shape)
        changed.get_submodule(layer).weight.data += torch.from_numpy(delta)
    want = changed(x.double()).detach().numpy()
    feeds = {name: x.numpy()}
    if mode in ("merged", "unmerged"):
        got = run(out, feeds)[output]
    else:
        session = ff.AdapterSession(out)
        session.load("mine", bundle)
        got = session.run(feeds, adapter="mine")[output]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
