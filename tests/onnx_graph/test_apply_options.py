"""`apply` on files and with options of every kind: old opsets, inlining, defaults, odd graphs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import fourierft_export as ff
from fourierft_export.cli.main import run as run_command
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError

RUNTIME_MODES = ("swappable", "paired", "bank")
RNG = np.random.default_rng(0)
W = {
    name: RNG.standard_normal(shape).astype(np.float32)
    for name, shape in (("up", (12, 8)), ("head", (3, 12)))
}
X = RNG.standard_normal((4, 5, 8)).astype(np.float32)
NODES: list[tuple[Any, ...]] = [
    ("MatMul", ["x", "up.weight"], ["t"], {"name": "/up/MatMul"}),
    ("Tanh", ["t"], ["h"]),
    ("MatMul", ["h", "head.weight"], ["y"], {"name": "/head/MatMul"}),
]
CONSTANTS = {f"{name}.weight": weight.T for name, weight in W.items()}


def exact(bundle: Any, exact_delta: Any, head: np.ndarray | None = None) -> np.ndarray:
    weight = W["up"].astype(np.float64)
    if bundle is not None:
        weight = weight + exact_delta(bundle, "up", (12, 8))
    hidden = np.tanh(X.astype(np.float64) @ weight.T)
    return hidden @ (W["head"] if head is None else head).T.astype(np.float64)


@pytest.fixture
def plain(tmp_path: Path, write_onnx: Any) -> Path:
    shapes = {"x": ["batch", 5, 8]}, {"y": ["batch", 5, 3]}
    return write_onnx(tmp_path / "plain.onnx", NODES, CONSTANTS, *shapes)


@pytest.fixture
def bundle(make_bundle: Any) -> Any:
    return make_bundle(["up"], W)


def aged(path: Path, opset: int) -> Path:
    """As of an older opset, with one of ONNX Runtime's operators and a function."""
    model = onnx.load(path)
    model.opset_import[0].version = opset
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[1].CopyFrom(
        helper.make_node("QuickGelu", ["t"], ["h"], domain="com.microsoft")
    )
    body = [helper.make_node("Identity", ["v"], ["w"])]
    opsets = [helper.make_opsetid("", opset)]
    model.functions.append(helper.make_function("some.where", "Same", ["v"], ["w"], body, opsets))
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    model.graph.node[2].input[0] = "same"
    model.graph.node.insert(2, helper.make_node("Same", ["h"], ["same"], domain="some.where"))
    model.ir_version = 8
    old = path.with_name("old.onnx")
    onnx.save_model(model, old, save_as_external_data=True, location="old.bin", size_threshold=0)
    return old


@pytest.mark.parametrize("mode", ["unmerged", "swappable", "bank"])
def test_an_old_opset(mode: str, plain: Path, bundle: Any, tmp_path: Path, run: Any) -> None:
    """Refused with the way out; converted where asked; 16 is enough for branches."""
    old, out = aged(plain, 11), tmp_path / "out.onnx"
    arguments = ["apply", "--onnx", str(old), "--bundle", str(tmp_path / "b"), "-o", str(out)]
    bundle.save(tmp_path / "b")
    with pytest.raises(UsageError, match=r"--opset 18 .*onnx\.version_converter"):
        ff.apply_onnx(old, bundle, out, mode=mode)
    ff.apply_onnx(old, bundle, tmp_path / "merged.onnx")
    assert run_command([*arguments, "--mode", mode, "--opset", "16"]) == 0
    assert onnx.load(out).opset_import[0].version == 16
    ids = {"adapter_id": np.ones(4, np.int64)} if mode == "bank" else {}
    got, want = (run(out, {"x": X} | ids)["y"], run(tmp_path / "merged.onnx", {"x": X})["y"])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    for opset in (10, 1000):
        with pytest.raises(UsageError, match="an opset from 11"):
            ff.apply_onnx(old, bundle, tmp_path / "no.onnx", mode=mode, opset=opset)


@pytest.mark.parametrize("mode", RUNTIME_MODES)
@pytest.mark.parametrize("defaults", ["base", "required"])
def test_defaults(
    defaults: str, mode: str, plain: Path, bundle: Any, exact_delta: Any, tmp_path: Path, run: Any
) -> None:
    """An input of the base's own that has a default keeps it."""
    model, out = onnx.load(plain), tmp_path / "out.onnx"
    model.graph.input.append(helper.make_tensor_value_info("head.weight", 1, [12, 3]))
    onnx.save(model, plain)
    report = ff.apply_onnx(plain, bundle, out, mode=mode, defaults=defaults)
    graph = onnx.load(out).graph
    held = {t.name for t in graph.initializer}
    fed = [v.name for v in graph.input if v.name not in held]
    assert "head.weight" not in fed
    assert fed == list(report.inputs)
    if defaults == "base":
        assert set(fed) <= {"x", "adapter_id"}
        ids = {"adapter_id": np.array([0, 1, 1, 0])} if mode == "bank" else {}
        np.testing.assert_allclose(run(out, {"x": X} | ids)["y"], exact(None, None), atol=1e-5)
    else:
        assert len(fed) == {"swappable": 4, "paired": 2, "bank": 5}[mode]
    session = ff.AdapterSession(out)
    session.load("a", bundle)
    for name in ("a", None):
        got = session.run({"x": X}, name)["y"]
        want = exact(bundle if name else None, exact_delta)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("mode", ["unmerged", "paired"])
def test_inline(mode: str, make_bundle: Any, tmp_path: Path, write_onnx: Any, run: Any) -> None:
    """Standard operators only, and quantisers can read the result."""
    from onnxruntime.quantization import quantize_dynamic

    plain, layers, x = tmp_path / "plain.onnx", ["a", "b"], X[:, 0]
    weights = {name: RNG.standard_normal((8, 8)).astype(np.float32) for name in layers}
    nodes = [("MatMul", ["x", "a.weight"], ["t"]), ("MatMul", ["t", "b.weight"], ["y"])]
    constants = {f"{name}.weight": weight.T for name, weight in weights.items()}
    write_onnx(plain, nodes, constants, {"x": ["batch", 8]}, {"y": ["batch", 8]})
    outputs = []
    for inline in (False, True):
        out = tmp_path / f"{inline}.onnx"
        ff.apply_onnx(plain, make_bundle(layers, weights), out, mode=mode, inline=inline)
        outputs.append(run(out, {"x": x})["y"])
        expander = out.with_suffix(".expand.onnx")
        for path in (out, expander) if mode == "paired" else (out,):
            model = onnx.load(path)
            domains = {node.domain for node in model.graph.node}
            assert not inline or (domains == {""} and not model.functions)
    np.testing.assert_array_equal(*outputs)
    if mode == "unmerged":
        quantize_dynamic(out, tmp_path / "quantised.onnx")
        got = run(tmp_path / "quantised.onnx", {"x": x})["y"]
        assert np.abs(got - outputs[0]).max() < 0.05 * np.abs(outputs[0]).max()


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_a_saved_tensor_that_another_node_reads_too(
    mode: str, make_bundle: Any, exact_delta: Any, tmp_path: Path, write_onnx: Any
) -> None:
    """That node keeps the base's; the head becomes an input under its own name."""
    table = RNG.standard_normal((3, 12)).astype(np.float32)
    nodes = [*NODES[:2], ("Gemm", ["f", "head.weight"], ["g"], {"transB": 1, "name": "/head/Gemm"})]
    nodes[2:2] = [("Flatten", ["h"], ["f"])]
    nodes += [("Gather", ["head.weight", "ids"], ["row"]), ("Add", ["g", "one"], ["y"])]
    constants = {"up.weight": CONSTANTS["up.weight"], "head.weight": table}
    constants |= {"ids": np.array([1]), "one": np.zeros(3, np.float32)}
    plain, out = tmp_path / "plain.onnx", tmp_path / "out.onnx"
    outputs = {"y": ["batch", 3], "row": [1, 12]}
    write_onnx(plain, nodes, constants, {"x": ["batch", 8]}, outputs)
    own = {"head.weight": table + 1}
    bundle = make_bundle(["up"], W, own)
    ff.apply_onnx(plain, {"a": bundle}, out, mode=mode)
    session = ff.AdapterSession(out)
    session.load("a", bundle)
    for name, head in (("a", table + 1), (None, table)):
        got = session.run({"x": X[:, 0]}, name)
        want = exact(bundle if name else None, exact_delta, head)[:, 0]
        np.testing.assert_allclose(got["y"], want, rtol=0, atol=1e-5 * np.abs(want).max())
        np.testing.assert_array_equal(got["row"], table[1:2])


@pytest.mark.parametrize("mode", ["merged", "unmerged", *RUNTIME_MODES])
def test_a_head_that_no_output_depends_on(
    mode: str, make_bundle: Any, tmp_path: Path, write_onnx: Any
) -> None:
    nodes = [*NODES, ("Identity", ["h"], ["z"])]
    plain = tmp_path / "plain.onnx"
    write_onnx(plain, nodes, CONSTANTS, {"x": ["batch", 5, 8]}, {"z": ["batch", 5, 12]})
    bundle = make_bundle(["up"], W, {"head.weight": W["head"] + 1})
    with pytest.raises(BaseMismatchError, match="outputs depend") as caught:
        ff.apply_onnx(plain, bundle, tmp_path / "out.onnx", mode=mode)
    assert caught.value.offenders == ("head.weight: no output depends on head.weight",)
    assert list(tmp_path.iterdir()) == [plain]


@pytest.mark.parametrize("force", [False, True])
def test_no_expander_is_left_alone(
    plain: Path, bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """Where the graph cannot be moved to its place, as on a full disk."""
    out, replace = tmp_path / "out.onnx", os.replace
    if force:
        ff.apply_onnx(plain, bundle, out, mode="paired")

    def full(source: Any, to: Any) -> None:
        if Path(to) == out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, to)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileAccessError, match="no space left"):
        ff.apply_onnx(plain, bundle, out, mode="paired", force=force)
    assert list(tmp_path.iterdir()) == [plain]


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_a_file_that_onnx_runtime_saved(
    mode: str, plain: Path, make_bundle: Any, exact_delta: Any, tmp_path: Path
) -> None:
    """It drops what no node uses, such as the base's head: never is the adapter's taken for it."""
    bundle = make_bundle(["up"], W, {"head.weight": W["head"] + 1})
    out, saved = tmp_path / "out.onnx", tmp_path / "saved.onnx"
    ff.apply_onnx(plain, {"a": bundle}, out, mode=mode)
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(saved), 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    if mode == "paired":
        out.with_suffix(".expand.onnx").rename(saved.with_suffix(".expand.onnx"))
    session = ff.AdapterSession(saved)
    session.load("a", bundle)
    for name, head in (("a", W["head"] + 1), (None, W["head"])):
        want = exact(bundle if name else None, exact_delta, head)
        np.testing.assert_allclose(session.run({"x": X}, name)["y"], want, rtol=0, atol=1e-4)
    model = onnx.load(saved)
    (entry,) = (one for one in model.metadata_props if one.key == "fourierft_export")
    content = json.loads(entry.value)
    content["base"] = {}  # as for a large head
    entry.value = json.dumps(content)
    onnx.save(model, saved)
    if mode != "bank":  # whose nodes use it
        with pytest.raises(BadInputError, match="saved tensors") as caught:
            ff.AdapterSession(saved)
        assert caught.value.offenders == ("head.weight",)


def test_features_are_no_batch(make_bundle: Any, tmp_path: Path, write_onnx: Any) -> None:
    plain = tmp_path / "plain.onnx"
    write_onnx(plain, NODES[:1], CONSTANTS, {"x": [8]}, {"t": [12]})
    with pytest.raises(UsageError, match="features last") as caught:
        ff.apply_onnx(plain, make_bundle(["up"], W), tmp_path / "out.onnx", mode="bank")
    assert caught.value.offenders == ("up: input ['8']",)


@pytest.mark.parametrize("mode", ["merged", "unmerged", *RUNTIME_MODES])
def test_weights_without_numbers(mode: str, plain: Path, bundle: Any, tmp_path: Path) -> None:
    model = onnx.load(plain)
    model.graph.initializer[0].ClearField("raw_data")
    onnx.save(model, plain)
    with pytest.raises(BadInputError, match="without data") as caught:
        ff.apply_onnx(plain, bundle, tmp_path / "out.onnx", mode=mode)
    assert caught.value.offenders == ("up.weight",)


def test_a_note_on_dynamic_ranges_in_a_bank(plain: Path, bundle: Any, tools: Any) -> None:
    quantised = tools.quantise(plain, "dynamic int8")
    for mode, count in (("bank", 1), ("swappable", 0)):
        report = ff.apply_onnx(quantised, bundle, plain.with_name(f"{mode}.onnx"), mode=mode)
        assert sum("one range for the whole batch" in note for note in report.notes) == count


@pytest.mark.parametrize("form", ["MatMul", "Cast", "4 bit"])
def test_float16_without_inferred_types(
    form: str, make_bundle: Any, tmp_path: Path, write_onnx: Any, tools: Any, run: Any
) -> None:
    """The branch ends in the layer's dtype, also where inference does not know it."""
    weight = RNG.standard_normal((16, 16)).astype(np.float16)
    first = ("Unheard", ["x"], ["u"], {"domain": "some.where"})
    held = weight.T.astype(np.float32) if form == "Cast" else weight.T
    nodes: list[tuple[Any, ...]] = [("MatMul", ["x", "w"], ["y"], {"name": "/lin/MatMul"})]
    if form == "Cast":
        nodes.insert(0, ("Cast", ["lin.weight"], ["w"], {"to": TensorProto.FLOAT16}))
    constants = {"lin.weight" if form == "Cast" else "w": held}
    plain = tmp_path / "plain.onnx"
    shapes = {"x": ["batch", 16]}, {"y": ["batch", 16]}
    write_onnx(plain, nodes, constants, *shapes, TensorProto.FLOAT16)
    plain = tools.quantise(plain, form) if form == "4 bit" else plain
    model = onnx.load(plain)
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    for node in model.graph.node:
        node.input[:] = ["u" if name == "x" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node(*first[:3], **first[3]))
    onnx.save(model, tmp_path / "in.onnx")
    bundle, out = make_bundle(["lin"], {"lin": weight}), tmp_path / "out.onnx"
    ff.apply_onnx(tmp_path / "in.onnx", bundle, out, mode="swappable", allow_base_mismatch=True)
    nodes_out = {node.output[0]: node for node in onnx.load(out).graph.node}
    rounded = nodes_out[nodes_out["y"].input[1]]
    assert (rounded.op_type, rounded.attribute[0].i) == ("Cast", TensorProto.FLOAT16)


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_quantised_after_applying(
    mode: str, plain: Path, make_bundle: Any, exact_delta: Any, tmp_path: Path
) -> None:
    """With the nodes excluded that the metadata lists, only the base is quantised."""
    from onnxruntime.quantization import quantize_dynamic

    bundle = make_bundle(["up"], W, {"head.weight": W["head"] + 1}, scaling=30.0)
    out, quantised = tmp_path / "out.onnx", tmp_path / "quantised.onnx"
    ff.apply_onnx(plain, {"a": bundle}, out, mode=mode)
    metadata = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    nodes = json.loads(metadata["fourierft_export"])["nodes"]
    quantize_dynamic(out, quantised, nodes_to_exclude=nodes)
    if mode == "paired":
        out.with_suffix(".expand.onnx").rename(quantised.with_suffix(".expand.onnx"))
    else:
        kinds = [node.op_type for node in onnx.load(quantised).graph.node]
        assert kinds.count("MatMulInteger") == 1
    session = ff.AdapterSession(quantised)
    session.load("a", bundle)
    for name, head in (("a", W["head"] + 1), (None, W["head"])):
        got = session.run({"x": X}, name)["y"]
        want = exact(bundle if name else None, exact_delta, head)
        assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


def test_messages(plain: Path, make_bundle: Any, stories260k: Path, tmp_path: Path) -> None:
    """What was given is not asked for; a graph without opset_import is one."""
    bundle = make_bundle(["model.layers.0.self_attn.q_proj"])
    for base, asked in ((stories260k, False), (None, True)):
        with pytest.raises(BaseMismatchError, match="LAYER=INITIALIZER") as caught:
            ff.apply_onnx(plain, bundle, tmp_path / "out.onnx", base=base)
        assert ("--base" in caught.value.remedy) == asked
    model = onnx.load(plain)
    del model.opset_import[:]
    onnx.save(model, plain)
    with pytest.raises(BadInputError, match="without opset_import"):
        ff.apply_onnx(plain, bundle, tmp_path / "out.onnx")
