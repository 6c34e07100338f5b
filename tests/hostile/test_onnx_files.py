"""ONNX files that are no valid graphs: one printable line that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.cli.main import run
from fourierft_export.errors import BadInputError

ESC = "\x1b[31m"


def add_sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))


Change = Callable[[onnx.ModelProto], object]
CASES: dict[str, tuple[Change, str]] = {
    f"opset {version}": (lambda m, v=version: setattr(m.opset_import[0], "version", v), "opset")
    for version in (0, -1, 2**63 - 1)
}
CASES |= {
    f"element type {kind}": (
        lambda m, k=kind: setattr(m.graph.initializer[0], "data_type", k), f"element type {kind}",
    )
    for kind in (0, 99, -1)
}  # fmt: skip
CASES |= {
    "short data": (lambda m: setattr(m.graph.initializer[0], "raw_data", b"\0" * 7), "7 bytes"),
    "negative size": (lambda m: m.graph.initializer[0].dims.__setitem__(0, -8), "the shape"),
    "unnamed": (lambda m: m.graph.initializer.add(data_type=1, dims=[0]), "without a name"),
    "doubled": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "2 times"),
    "sparse": (add_sparse, "sparse"),
    "output from nowhere": (lambda m: setattr(m.graph.output.add(), "name", ESC), "no node makes"),
    "input from nowhere": (lambda m: m.graph.node[0].input.__setitem__(0, ESC), "from nowhere"),
    "no outputs": (lambda m: setattr(m.graph.node.add(), "op_type", ESC), "without outputs"),
}


def change_node(kind: str, inputs: str = "x", outputs: str = "t", **attributes: object) -> Change:
    """A change that adds a node with these attributes."""
    node = helper.make_node(kind, inputs.split(), outputs.split(), **attributes)
    return lambda model: model.graph.node.append(node)


def change_attribute(kind: int) -> Change:
    """A change that adds a node with an attribute of this kind that has no value."""

    def change(model: onnx.ModelProto) -> None:
        node = helper.make_node("Own", ["x"], ["t"], domain="com.microsoft")
        node.attribute.add(name="own", type=kind)
        model.graph.node.append(node)

    return change


def replace_data(field: str, values: list[int]) -> Change:
    """A change that gives the weight its data in another field."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].ClearField("raw_data")
        getattr(model.graph.initializer[0], field).extend(values)

    return change


def return_outer_value(model: onnx.ModelProto) -> None:
    graph = helper.make_graph([], "then", [], [helper.make_tensor_value_info("x", 1, None)])
    change_node("If", then_branch=graph, else_branch=graph)(model)


def call_functions(depth: int, *, circle: bool = False, opset: int = 18) -> Change:
    """A change that adds functions of which each calls the next twice."""

    def change(model: onnx.ModelProto) -> None:
        for i in range(depth):
            last = i + 1 == depth and not circle
            kind = "Neg" if last else f"f{(i + 1) % depth}"
            domain = "" if last else "own"
            body = [helper.make_node(kind, ["a"], ["t"], domain=domain)]
            body.append(helper.make_node(kind, ["t"], ["b"], domain=domain))
            imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
            function = helper.make_function("own", f"f{i}", ["a"], ["b"], body, imports)
            model.functions.append(function)
        change_node("f0", domain="own")(model)

    return change


CASES |= {
    "IR version": (lambda m: setattr(m, "ir_version", 2**40), "IR version"),
    "typed data short": (replace_data("float_data", [1] * 7), "7 values in float_data"),
    "typed data in the wrong field": (replace_data("int64_data", [1] * 48), "0 values in float_d"),
    "input doubled": (lambda m: m.graph.input.append(m.graph.input[0]), "2 times"),
    "input unnamed": (lambda m: m.graph.input.add().type.CopyFrom(m.graph.input[0].type), "a name"),
    "input without a type": (lambda m: m.graph.input[0].ClearField("type"), "known type"),
    "opaque input": (lambda m: m.graph.input[0].type.opaque_type.SetInParent(), "known type"),
    "value made twice": (lambda m: m.graph.node.append(m.graph.node[0]), "2 times"),
    "outer value returned": (return_outer_value, "the output 'x', which no node makes"),
    "no operator": (change_node(""), "without an operator"),
    "function's opset": (call_functions(2, opset=-(2**63)), "opset -9"),
    "no inputs": (change_node("MatMul", ""), "with 0 inputs"),
    "input left out": (lambda m: m.graph.node[0].input.__setitem__(0, ""), "its input 'A'"),
    "no sizes": (change_node("MatMulNBits", "x x x", domain="com.microsoft", K=1), "the numbers N"),
    "no value": (change_node("Constant", ""), "with 0 values"),
    "untyped": (change_attribute(0), "unknown type"),
    "no tensor": (change_attribute(4), "without a value"),
    "attribute of text": (change_node("Transpose", perm=ESC), "'perm' of another type"),
    "attribute required": (change_node("Cast"), "without the attribute 'to'"),
    "permutation": (change_node("Transpose", perm=[0, 2]), "permutation"),
    "cycle": (change_node("Add", "x t"), "cycle"),
    "calls": (call_functions(17), "found more"),
    "calls in a circle": (call_functions(2, circle=True), "without end"),
}
for where in ("input", "output", "value_info"):
    CASES[f"type of {where}"] = (
        lambda m, w=where: setattr(
            (getattr(m.graph, w) or [m.graph.value_info.add()])[0].type.tensor_type, "elem_type", 99
        ),
        "known type",
    )


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    node = helper.make_node("Transpose", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(name, 1, ["n", 8]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:]))
    data = model.SerializeToString().replace(b"Transpose", b"Trans\xff\xfe\xfdX")
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(BadInputError, match="not UTF-8"):
        ff.recover_onnx(tmp_path / "m.onnx")


def make_model() -> onnx.ModelProto:
    """x [n, 8] times lin.weight gives y [n, 6]."""
    ends = [helper.make_tensor_value_info(n, 1, ["n", s]) for n, s in (("x", 8), ("y", 6))]
    weight = numpy_helper.from_array(np.ones((8, 6), np.float32), "lin.weight")
    node = helper.make_node("MatMul", ["x", "lin.weight"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def make_bundle() -> ff.Bundle:
    spec = AdapterSpec(777, 50.0, (LayerSpec("lin", 5),))
    return ff.Bundle.build(spec, {"lin": np.ones(5, np.float32)})


def test_a_graph_that_cannot_be_written_again(tmp_path: Path) -> None:
    model = make_model()
    model.graph.node[0].device_configurations.add()  # without a name
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BadInputError, match="without a configuration"):
        ff.apply_onnx(tmp_path / "m.onnx", make_bundle(), tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_onnx_runtime_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its errors hold names from the file; they are raised."""
    onnx.save(make_model(), tmp_path / "m.onnx")
    ff.apply_onnx(tmp_path / "m.onnx", make_bundle(), tmp_path / "out.onnx", mode="unmerged")
    model = onnx.load(tmp_path / "out.onnx")
    model.ir_version = 10
    model.graph.CopyFrom(onnx.GraphProto())
    onnx.save(model, tmp_path / "out.onnx")
    with pytest.raises(BadInputError, match="a model that ONNX Runtime loads"):
        ff.AdapterSession(tmp_path / "out.onnx")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", CASES)
def test_an_invalid_graph_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    change, words = CASES[name]
    model, bundle = make_model(), make_bundle()
    change(model)
    Path("m.onnx").write_bytes(model.SerializeToString())
    bundle.save("b")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadInputError, match=words):
        ff.apply_onnx("m.onnx", bundle, "out.onnx")
    with pytest.raises(BadInputError, match=words):
        ff.recover_onnx("m.onnx")
    for command in (
        "apply --onnx m.onnx --bundle b --mode merged -o out.onnx",
        "apply --onnx m.onnx --bundle b --mode swappable -o out.onnx",
        "recover --onnx m.onnx -o out",
        "pack b --to onnx-inputs --onnx m.onnx -o out",
    ):
        capfd.readouterr()
        assert run(command.split()) == 3
        line, *offenders = capfd.readouterr().err.splitlines()
        assert line.startswith("error: m.onnx: ") and words in line and len(line) <= 500
        assert all(text.startswith("  ") for text in offenders)
        assert "".join([line, *offenders]).isprintable()
    assert sorted(tmp_path.iterdir()) == before
