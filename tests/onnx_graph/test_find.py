"""Weights in graphs that others made: layouts, packed, tied and shared weights, ambiguity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError, UsageError

MODES = ("merged", "unmerged")
RNG = np.random.default_rng(0)
A, B, C = (RNG.standard_normal((8, 8)).astype(np.float32) for _ in range(3))
WIDE = RNG.standard_normal((12, 8)).astype(np.float32)
X = RNG.standard_normal((3, 8)).astype(np.float32)

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
Array = np.ndarray


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Array],
    outputs: dict[str, Sequence[int | None]],
    functions: Sequence[onnx.FunctionProto] = (),
    opset: int = 18,
    ir_version: int = 8,
) -> Path:
    """A model of one float input x [3, 8]."""
    io = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in {"x": [3, 8], **outputs}.items()
    ]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in constants.items()]
    graph = helper.make_graph(list(nodes), "g", io[:1], io[1:], tensors)
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid("local", 1)] if functions else []
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions)
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


node = helper.make_node


@dataclass(frozen=True)
class Case:
    """A way to hold weights: the file, and what each output is as a function of the weights."""

    nodes: Sequence[onnx.NodeProto]
    constants: dict[str, Array]
    want: Callable[[dict[str, Array]], dict[str, Array]]
    layers: dict[str, Array]
    functions: Sequence[onnx.FunctionProto] = ()

    def save(self, path: Path) -> Path:
        shapes = {name: value.shape for name, value in self.want(self.layers).items()}
        return save(path, self.nodes, self.constants, shapes, self.functions)


def one(w: dict[str, Array]) -> dict[str, Array]:
    return {"y": X @ w["a"].T}


def subgraph(weight_inside: bool) -> list[onnx.NodeProto]:
    """If(true) whose branches multiply by `w`, an initializer within or without."""
    inner = [numpy_helper.from_array(np.ascontiguousarray(A.T), "w")] if weight_inside else []
    out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 8])]
    then = helper.make_graph([node("MatMul", ["x", "w"], ["z"], "/a/MatMul")], "t", [], out, inner)
    otherwise = helper.make_graph([node("Identity", ["x"], ["z"])], "e", [], out)
    yes = numpy_helper.from_array(np.array(True), "yes")
    return [
        node("Constant", [], ["c"], value=yes),
        node("If", ["c"], ["y"], then_branch=then, else_branch=otherwise),
    ]


LINEAR = helper.make_function(
    "local",
    "Linear",
    ["u", "k"],
    ["v"],
    [node("Transpose", ["k"], ["t"], perm=[1, 0]), node("MatMul", ["u", "t"], ["v"])],
    [helper.make_opsetid("", 18)],
)

CASES = {
    "Gemm transB=1": Case(
        [node("Gemm", ["x", "a.weight"], ["y"], transB=1)], {"a.weight": A}, one, {"a": A}
    ),
    "Gemm transB=0": Case(
        [node("Gemm", ["x", "a.weight"], ["y"])], {"a.weight": A.T}, one, {"a": A}
    ),
    "MatMul": Case([node("MatMul", ["x", "a.weight"], ["y"])], {"a.weight": A.T}, one, {"a": A}),
    "genai's names": Case(
        [node("MatMul", ["x", "model.layers.0.attn.q_proj.MatMul.weight"], ["y"])],
        {"model.layers.0.attn.q_proj.MatMul.weight": A.T},
        lambda w: {"y": X @ w["model.layers.0.self_attn.q_proj"].T},
        {"model.layers.0.self_attn.q_proj": A},
    ),
    "Transpose": Case(
        [node("Transpose", ["a.weight"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])],
        {"a.weight": A},
        one,
        {"a": A},
    ),
    "weight first": Case(
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0]),
            node("MatMul", ["a.weight", "t"], ["u"]),
            node("Transpose", ["u"], ["y"], perm=[1, 0]),
        ],
        {"a.weight": A},
        one,
        {"a": A},
    ),
    "Cast": Case(
        [node("Cast", ["w"], ["t"], to=1), node("MatMul", ["x", "t"], ["y"], "/a/MatMul")],
        {"w": A.T.astype(np.float16)},
        one,
        {"a": A.astype(np.float16)},
    ),
    "bias": Case(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["a.bias", "m"], ["y"])],
        {"w": A.T, "a.bias": np.zeros(8, np.float32)},
        one,
        {"a": A},
    ),
    "tied with an embedding": Case(
        [
            node("Constant", [], ["ids"], value_ints=[2, 0]),
            node("Gather", ["embed.weight", "ids"], ["e"]),
            node("Transpose", ["embed.weight"], ["t"], perm=[1, 0]),
            node("MatMul", ["x", "t"], ["y"], "/lm_head/MatMul"),
        ],
        {"embed.weight": A},
        lambda w: {"y": X @ w["lm_head"].T, "e": A[[2, 0]]},
        {"lm_head": A},
    ),
    "shared by two layers": Case(
        [
            node("MatMul", ["x", "w"], ["y"], "/a/MatMul"),
            node("MatMul", ["x", "w"], ["z"], "/b/MatMul"),
        ],
        {"w": A.T},
        lambda w: {"y": X @ w["a"].T, "z": X @ A.T},
        {"a": A},
    ),
    "shared by two adapted layers": Case(
        [
            node("MatMul", ["x", "w"], ["y"], "/a/MatMul"),
            node("MatMul", ["x", "w"], ["z"], "/b/MatMul"),
        ],
        {"w": A.T},
        lambda w: {"y": X @ w["a"].T, "z": X @ w["b"].T},
        {"a": A, "b": A},
    ),
    "one layer, two copies of its weight": Case(
        [
            node("MatMul", ["x", "v"], ["y"], "/a/MatMul"),
            node("MatMul", ["x", "w"], ["z"], "/a/MatMul_1"),
        ],
        {"v": A.T, "w": A.T},
        lambda w: {"y": X @ w["a"].T, "z": X @ w["a"].T},
        {"a": A},
    ),
    "a child named with its container": Case(
        [node("MatMul", ["x", "w"], ["y"], "/1/1.0/1.0.0/fn/fn.1/query/MatMul")],
        {"w": A.T},
        lambda w: {"y": X @ w["1.0.0.fn.1.query"].T},
        {"1.0.0.fn.1.query": A},
    ),
    "one layer, called again by TorchScript": Case(
        [
            node("MatMul", ["x", "v"], ["y"], "/m/q/MatMul"),
            node("MatMul", ["y", "w"], ["z"], "/m/q_1/MatMul"),
            node("MatMul", ["z", "v"], ["u"], "/m/q_2/MatMul"),
            node("MatMul", ["x", "other"], ["o"], "/m/q_3/MatMul"),
        ],
        {"v": A.T * 0.2, "w": A.T * 0.2, "other": B.T},
        lambda w: {"u": X @ w["m.q"].T @ w["m.q"].T @ w["m.q"].T, "o": X @ B.T},
        {"m.q": A * 0.2},
    ),
    "packed, by content": Case(
        [node("MatMul", ["x", "qkv"], ["y"])],
        {"qkv": np.concatenate([WIDE, A, B]).T},
        lambda w: {"y": X @ np.concatenate([w["q"], A, w["v"]]).T},
        {"q": WIDE, "v": B},
    ),
    "packed, (out, in)": Case(
        [node("Gemm", ["x", "qkv"], ["y"], transB=1)],
        {"qkv": np.concatenate([A, B, C])},
        lambda w: {"y": X @ np.concatenate([w["q"], w["k"], C]).T},
        {"q": A, "k": B},
    ),
    "packed, with a bias": Case(
        [node("Gemm", ["x", "qkv", "c"], ["y"], transB=1)],
        {"qkv": np.concatenate([A, B, C]), "c": np.arange(24, dtype=np.float32)},
        lambda w: {"y": X @ np.concatenate([A, w["k"], w["v"]]).T + np.arange(24)},
        {"k": B, "v": C},
    ),
    "packed, behind a Transpose": Case(
        [node("Transpose", ["qkv"], ["t"], perm=[1, 0]), node("MatMul", ["x", "t"], ["y"])],
        {"qkv": np.concatenate([A, B])},
        lambda w: {"y": X @ np.concatenate([w["q"], w["k"]]).T},
        {"q": A, "k": B},
    ),
    "packed, behind a Cast": Case(
        [node("Cast", ["qkv"], ["t"], to=1), node("MatMul", ["x", "t"], ["y"])],
        {"qkv": np.concatenate([A, B]).T},
        lambda w: {"y": X @ np.concatenate([w["q"], w["k"]]).T},
        {"q": A, "k": B},
    ),
    "anonymous, by content": Case(
        [node("MatMul", ["x", "w"], ["y"]), node("MatMul", ["x", "v"], ["z"])],
        {"v": A.T, "w": B.T},
        lambda w: {"y": X @ B.T, "z": X @ w["a"].T},
        {"a": A},
    ),
    "a Constant node": Case(
        [
            node("Constant", [], ["w"], value=numpy_helper.from_array(np.ascontiguousarray(A.T))),
            node("MatMul", ["x", "w"], ["y"], "/a/MatMul"),
        ],
        {},
        one,
        {"a": A},
    ),
    "an Einsum": Case(
        [node("Einsum", ["x", "a.weight"], ["y"], equation="bi,oi->bo")], {"a.weight": A}, one,
        {"a": A},
    ),
    "an Einsum, weight first": Case(
        [node("Einsum", ["a.weight", "x"], ["y"], equation="io, ...i -> ...o")],
        {"a.weight": A.T}, one, {"a": A},
    ),
    "a Reshape to the same sizes": Case(
        [node("Reshape", ["a.weight", "s"], ["w"]), node("Transpose", ["w"], ["t"], perm=[1, 0]),
         node("MatMul", ["x", "t"], ["y"])],
        {"a.weight": A, "s": np.array([0, -1])}, one, {"a": A},
    ),
    "a Reshape that adds an axis": Case(
        [node("Reshape", ["a.weight", "s"], ["w"]), node("Squeeze", ["w", "i"], ["v"]),
         node("Gemm", ["x", "v"], ["y"], transB=1)],
        {"a.weight": WIDE, "s": np.array([12, 1, 8]), "i": np.array([1])}, one, {"a": WIDE},
    ),
    "an Unsqueeze": Case(
        [node("Unsqueeze", ["a.weight", "i"], ["w"]),
         node("Transpose", ["w"], ["t"], perm=[0, 2, 1]), node("MatMul", ["x", "t"], ["y"])],
        {"a.weight": A, "i": np.array([0])}, lambda w: {"y": (X @ w["a"].T)[None]}, {"a": A},
    ),
    "times a number": Case(
        [node("Mul", ["n", "a.weight"], ["w"]), node("Div", ["w", "m"], ["v"]),
         node("Gemm", ["x", "v"], ["y"], transB=1, alpha=3.0)],
        {"a.weight": A, "n": np.float32(2), "m": np.full(1, 4, np.float32)},
        lambda w: {"y": 1.5 * X @ w["a"].T}, {"a": A},
    ),
    "times a vector": Case(
        [node("Mul", ["a.weight", "n"], ["w"]), node("Gemm", ["x", "w"], ["y"], transB=1)],
        {"a.weight": A, "n": np.arange(8, dtype=np.float32)},
        lambda w: {"y": X * np.arange(8) @ w["a"].T}, {"a": A},
    ),
    "named as the layer": Case([node("MatMul", ["x", "W_q"], ["y"])], {"W_q": A.T},
        lambda w: {"y": X @ w["W_q"].T}, {"W_q": A},
    ),
    "used in a subgraph": Case(subgraph(False), {"w": A.T}, one, {"a": A}),
    "held in a subgraph": Case(subgraph(True), {}, one, {"a": A}),
    "used in a function": Case(
        [node("Linear", ["x", "a.weight"], ["y"], domain="local")],
        {"a.weight": A},
        one,
        {"a": A},
        [LINEAR],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_way_to_hold_a_weight(
    name: str, mode: str, make_bundle: Any, exact_delta: Any, tmp_path: Path, run: Run
) -> None:
    case, out = CASES[name], tmp_path / "out.onnx"
    path, bundle = case.save(tmp_path / "in.onnx"), make_bundle([*case.layers], case.layers)
    report = ff.apply_onnx(path, bundle, out, mode=mode)
    base = {key: value.astype(np.float64) for key, value in case.layers.items()}
    changed = {key: w + exact_delta(bundle, key, w.shape) for key, w in base.items()}
    got, before = (run(file, {"x": X}) for file in (out, path))
    half = any(a.dtype == np.float16 for a in case.layers.values())
    for key, want in case.want(changed).items():
        np.testing.assert_allclose(got[key], want, rtol=0, atol=2e-2 if half else 1e-5)
    assert any(np.abs(got[key] - before[key]).max() > 0.1 for key in got)
    shared = name.startswith(("tied", "shared by two"))
    assert any("used elsewhere" in note for note in report.notes) == shared
    assert not [note for note in report.notes if "no check" in note]


PACKED_NAMES = [name for name in CASES if name.startswith("packed")]
MOVED = ["an Einsum", "a Reshape to the same sizes", "a Reshape that adds an axis", "an Unsqueeze"]


@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
@pytest.mark.parametrize(
    ("name", "external"),
    [
        *((name, external) for name in PACKED_NAMES for external in (False, True)),
        *((name, False) for name in (*MOVED, "times a number")),
    ],
)
def test_adapters_that_come_at_run_time(
    name: str, mode: str, external: bool, make_bundle: Any, exact_delta: Any, tmp_path: Path
) -> None:
    case, out = CASES[name], tmp_path / "out.onnx"
    path, bundle = case.save(tmp_path / "in.onnx"), make_bundle([*case.layers], case.layers)
    if external:
        data = {"location": "weights", "size_threshold": 0}
        onnx.save_model(onnx.load(path), path, save_as_external_data=True, **data)
    ff.apply_onnx(path, bundle, out, mode=mode)
    base = {key: value.astype(np.float64) for key, value in case.layers.items()}
    changed = {key: w + exact_delta(bundle, key, w.shape) for key, w in base.items()}
    session, plain = ff.AdapterSession(out), case.want(base)["y"]
    session.load("mine", bundle)
    for adapter, want in (("mine", case.want(changed)["y"]), (None, plain)):
        got = session.run({"x": X}, adapter=adapter)["y"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.abs(case.want(changed)["y"] - plain).max() > 0.1
    if name in PACKED_NAMES:  # it stays whole, with its users; mode paired takes it as one input
        graph = onnx.load(out).graph
        assert "qkv" in {tensor.name for tensor in graph.initializer}
        assert ("qkv" in {value.name for value in graph.input}) == (mode == "paired")


def test_a_packed_weight_by_map(
    make_bundle: Any, exact_delta: Any, tmp_path: Path, run: Run
) -> None:
    case, out = CASES["packed, by content"], tmp_path / "out.onnx"
    path, bundle = case.save(tmp_path / "in.onnx"), make_bundle(["q", "v"])
    mapping = {"q": "qkv[0:12]", "v": "qkv[20:28]"}
    for mode in MODES:
        ff.apply_onnx(path, bundle, out, mode=mode, mapping=mapping, force=True)
        want = {n: w + exact_delta(bundle, n, w.shape) for n, w in case.layers.items()}
        got = run(out, {"x": X})["y"]
        np.testing.assert_allclose(got, case.want(want)["y"], rtol=0, atol=1e-5)


PACKED = CASES["packed, by content"]
PRODUCT = [node("MatMul", ["x", "w"], ["y"])]
TWO = [node("MatMul", ["x", "v"], ["y"]), node("MatMul", ["x", "w"], ["z"])]
# Nodes, constants, layers of the adapter (None: unbound), mapping, why.
REFUSED: dict[str, tuple[Any, dict[str, Array], dict[str, Any], dict[str, str], list[str]]] = {
    "nothing but a shape, no fingerprint": (
        PRODUCT, {"w": WIDE.T}, {"a": None}, {},
        ["a: no weight of this name or path; candidates: w [8, 12]"],
    ),
    "nothing but a shape, another content": (
        PRODUCT, {"w": WIDE.T}, {"a": WIDE + 1}, {},
        ["a: no weight of this name, path or content; candidates: w [8, 12]"],
    ),
    "equal weights without names": (
        TWO, {"v": A.T, "w": A.T}, {"a": A}, {},
        ["several weights have its content: v [8, 8], w [8, 8]"],
    ),
    "two layers, one weight": (
        PRODUCT, {"w": A.T}, {"a": A, "b": A}, {}, ["found for a, too"]
    ),
    "rows that x chooses": (
        [node("Cast", ["x"], ["i"], to=7), node("Gather", ["a.weight", "i"], ["y"], "/a/Gather")],
        {"a.weight": A}, {"a": None}, {}, ["is used by Gather /a/Gather, not as a layer's weight"],
    ),
    "a Reshape to other sizes": (
        [node("Reshape", ["a.weight", "s"], ["w"]), node("Gemm", ["x", "w"], ["y"])],
        {"a.weight": WIDE, "s": np.array([8, 12])}, {"a": None}, {"a": "a.weight"},
        ["is used by Reshape, not as a layer's weight"],
    ),
    "packed, unbound": (
        PACKED.nodes, PACKED.constants, {"q": None, "v": None}, {}, ["candidates: qkv [8, 28]"]
    ),
    "packed, beyond the end": (
        PACKED.nodes, PACKED.constants, {"v": None}, {"v": "qkv[20:29]"},
        ["has no outputs 20 to 29"],
    ),
    "packed, overlapping": (
        PACKED.nodes, PACKED.constants, {"q": None, "v": None},
        {"q": "qkv[0:12]", "v": "qkv[10:18]"}, ["found for q, too"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_not_found_beyond_doubt(
    name: str, make_bundle: Any, tmp_path: Path
) -> None:
    nodes, constants, layers, mapping, why = REFUSED[name]
    path = save(
        tmp_path / "in.onnx", nodes, constants, {one.output[0]: (None, None) for one in nodes}
    )
    bundle = make_bundle([*layers], layers if all(w is not None for w in layers.values()) else None)
    for mode in ("merged", "unmerged", "swappable"):
        with pytest.raises(BaseMismatchError, match="--map") as caught:
            ff.apply_onnx(path, bundle, tmp_path / "out.onnx", mode=mode, mapping=mapping)
        assert all(one in caught.value.offenders[0] for one in why)


@pytest.mark.parametrize("opset", [9, 13, 16, 20])
def test_modes_at_several_opsets(
    opset: int, make_bundle: Any, exact_delta: Any, tmp_path: Path, run: Run
) -> None:
    """The opset stays; before opset 13 a graph can be merged only."""
    versions = {"opset": opset, "ir_version": {9: 4, 13: 7}.get(opset, 9)}
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    save(path, PRODUCT, {"w": A.T}, {"y": [3, 8]}, **versions)
    bundle, mapping = make_bundle(["a"]), {"a": "w"}
    want = X @ (A + exact_delta(bundle, "a", (8, 8))).T
    for mode in MODES:
        if mode == "unmerged" and opset < 13:
            with pytest.raises(UsageError, match="opset 13 or newer"):
                ff.apply_onnx(path, bundle, out, mode=mode, mapping=mapping, force=True)
            continue
        ff.apply_onnx(path, bundle, out, mode=mode, mapping=mapping, force=True)
        model = onnx.load(out)
        least = 8 if mode == "unmerged" else 0  # functions came with IR version 8
        assert model.ir_version == max(versions["ir_version"], least)
        assert model.opset_import[0].version == opset
        np.testing.assert_allclose(run(out, {"x": X})["y"], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["swappable", "bank"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("weight first", "a: a.weight is used by MatMul in another way than x W"),
        ("weight first, turned", "a: a.weight is used by MatMul in another way than x W"),
        ("in a subgraph", "a: its MatMul is in a subgraph or function, which sees no adapter"),
        ("times a vector", "a: a.weight is used by Gemm in another way than x W"),
    ],
)
def test_what_no_adapter_can_be_beside(
    name: str, why: str, mode: str, make_bundle: Any, tmp_path: Path
) -> None:
    nodes, constants = CASES["weight first"].nodes, CASES["weight first"].constants
    if name.endswith("turned"):
        turn = node("Transpose", ["a.weight"], ["w"], perm=[1, 0])
        nodes = [turn, nodes[0], node("MatMul", ["w", "t"], ["u"]), nodes[2]]
        constants = {"a.weight": A.T}
    elif name == "in a subgraph":
        nodes, constants = subgraph(False), {"w": A.T}
    elif name in CASES:
        nodes, constants = CASES[name].nodes, CASES[name].constants
    path = save(tmp_path / "in.onnx", nodes, constants, {"y": [3, 8]})
    with pytest.raises(UsageError, match="use mode paired, merged or unmerged") as caught:
        ff.apply_onnx(path, make_bundle(["a"], {"a": A}), tmp_path / "out.onnx", mode=mode)
    assert caught.value.offenders == (why,)
    ff.apply_onnx(path, make_bundle(["a"], {"a": A}), tmp_path / "out.onnx", mode="paired")
