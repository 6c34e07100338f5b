"""Quantised weights in which several layers are packed, as onnxruntime-genai writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError, UsageError

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
Files = dict[str, Path]
FORMS = ("4 bit", "4 bit asymmetric", "8 bit", "4 bit QDQ", "QDQ", "dynamic int8")
ATTN = "model.layers.0.self_attn"
RANGES = {f"{ATTN}.q_proj": (0, 48), f"{ATTN}.k_proj": (48, 64), f"{ATTN}.v_proj": (64, 80)}
RNG = np.random.default_rng(0)
PARTS = {
    name: (RNG.standard_normal((stop - start, 32)) / 5).astype(np.float32)
    for name, (start, stop) in RANGES.items()
}
PACKED = np.concatenate([*PARTS.values()])
BIAS = RNG.standard_normal(80).astype(np.float32)
X = RNG.standard_normal((3, 4, 32)).astype(np.float32)
STEM = "model.layers.0.attn.qkv_proj.MatMul"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tools: Any, write_onnx: Any) -> dict[str, Path]:
    """A product with all three at once, by genai's names; what onnxruntime's quantisers make of it.

    At opset 21, for scales per block.
    """
    plain = tmp_path_factory.mktemp("packed") / "float.onnx"
    product = {"name": "/model/layers.0/attn/qkv_proj/MatMul"}
    nodes = [
        ("MatMul", ["x", f"{STEM}.weight"], ["m"], product),
        ("Add", ["m", "bias"], ["y"], {"name": "add"}),
    ]
    constants = {f"{STEM}.weight": PACKED.T, "bias": BIAS}
    write_onnx(plain, nodes, constants, {"x": ["batch", 4, 32]}, {"y": ["batch", 4, 80]})
    model = onnx.load(plain)
    model.opset_import[0].version = 21
    onnx.save(model, plain)
    feeds = [{"x": X}, {"x": 1.5 * X}]
    forms = (*FORMS, "QOperator")
    return {"float": plain} | {form: tools.quantise(plain, form, feeds) for form in forms}


@pytest.fixture(scope="module")
def bundle(make_bundle: Any) -> Any:
    return make_bundle([*PARTS], PARTS, n=40, scaling=40.0)


@pytest.fixture(scope="module")
def added(exact_delta: Any) -> Callable[..., np.ndarray]:
    """`added(bundle, x=X, ranges=RANGES)`: what the adapter adds to y, in float64."""

    def share(bundle: Any, x: np.ndarray = X, ranges: Any = RANGES) -> np.ndarray:
        y = np.zeros((*x.shape[:-1], 80))
        for name in bundle.spectra:
            start, stop = ranges[name]
            y[..., start:stop] = x.astype(float) @ exact_delta(bundle, name, (stop - start, 32)).T
        return y

    return share


def check(form: str, got: np.ndarray, base: np.ndarray, share: np.ndarray) -> None:
    """The base's own output plus the adapter's share; behind QDQ the sum is quantised again."""
    assert np.abs(share).max() > 0.5
    if form == "QDQ":
        assert np.median(np.abs(got - base - share)) < 0.05
    else:
        np.testing.assert_allclose(got, base + share, rtol=0, atol=2e-5)


def integers(path: Path) -> str:
    """The name of the packed weight."""
    graph = onnx.load(path).graph
    largest = max(graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    return str(largest.name)


@pytest.mark.parametrize(
    ("form", "mode"), [*((form, "unmerged") for form in FORMS), ("4 bit", "swappable")]
)
def test_each_part_gets_its_own_branch(
    form: str, mode: str, files: Files, bundle: Any, added: Any, tmp_path: Path, run: Run
) -> None:
    """By name; the weight stays as it is, and the bundle comes back out of the file."""
    out = tmp_path / "out.onnx"
    report = ff.apply_onnx(files[form], bundle, out, mode=mode)
    assert set(report.layers) == set(PARTS)
    assert any("3 layers are quantised" in note for note in report.notes)
    assert not any("no check" in note for note in report.notes)
    base, got = (run(path, {"x": X})["y"] for path in (files[form], out))
    check(form, got, base, added(bundle))
    before, after = (
        {t.name: t.SerializeToString() for t in onnx.load(path).graph.initializer}
        for path in (files[form], out)
    )
    assert before.items() <= after.items()
    assert ff.recover_onnx(out)["default"].to_bytes() == bundle.to_bytes()


@pytest.mark.parametrize("form", ["float", "4 bit", "QDQ", "dynamic int8"])
def test_a_bank_of_packed_layers(
    form: str, files: Files, make_bundle: Any, added: Any, tmp_path: Path, run: Run
) -> None:
    """Each row has its own adapter, one of which has a part of the layers only."""
    names = [*PARTS]
    bundles = {
        "a": make_bundle(names, PARTS, n=40, scaling=40.0),
        "b": make_bundle(names[1:], PARTS, n=30, seed=3, scaling=60.0),
    }
    out = tmp_path / "bank.onnx"
    ff.apply_onnx(files[form], bundles, out, mode="bank")
    base = run(files[form], {"x": X})["y"]
    want = np.stack([added(bundles["b"])[0], np.zeros((4, 80)), added(bundles["a"])[2]])
    check(form, run(out, {"x": X, "adapter_id": np.array([2, 0, 1])})["y"], base, want)


@pytest.mark.parametrize("form", ["4 bit asymmetric", "4 bit QDQ", "QDQ", "dynamic int8"])
def test_parts_without_names_are_found_by_content(
    form: str, files: Files, bundle: Any, tools: Any, tmp_path: Path, run: Run
) -> None:
    named, out = tmp_path / "named.onnx", tmp_path / "out.onnx"
    ff.apply_onnx(files[form], bundle, named, mode="swappable")
    ff.apply_onnx(
        tools.without_names(files[form], tmp_path / "in.onnx"), bundle, out, mode="swappable"
    )
    got, want = (run(path, {"x": X})["y"] for path in (out, named))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_parts_in_another_order_are_found_by_content(
    files: Files, make_bundle: Any, added: Any, tmp_path: Path, run: Run
) -> None:
    """The content decides, where the names q, k, v suggest another order."""
    swapped = {f"{ATTN}.k_proj": (64, 80), f"{ATTN}.v_proj": (48, 64)}
    weights = {name: PACKED[start:stop] for name, (start, stop) in swapped.items()}
    bundle, out = make_bundle([*weights], weights, n=40, scaling=40.0), tmp_path / "out.onnx"
    for form in ("float", "4 bit"):
        ff.apply_onnx(files[form], bundle, out, mode="swappable", force=True)
        base, got = (run(path, {"x": X})["y"] for path in (files[form], out))
        check(form, got, base, added(bundle, ranges=swapped))


@pytest.mark.parametrize("form", ["float", "4 bit", "dynamic int8"])
def test_parts_by_map(
    form: str, files: Files, make_bundle: Any, added: Any, tmp_path: Path, run: Run
) -> None:
    """An unbound adapter does not hold its layers' sizes: the caller must give them."""
    unbound, out = make_bundle([*PARTS], n=40, scaling=40.0), tmp_path / "out.onnx"
    name = integers(files[form])
    with pytest.raises(BaseMismatchError) as caught:
        ff.apply_onnx(files[form], unbound, out, mode="swappable")
    assert len(caught.value.offenders) == 3
    said = "".join(caught.value.offenders)
    assert f"{ATTN}.q_proj: packed in {name}" in said
    assert f"--map {ATTN}.q_proj={name}[START:STOP]" in said
    mapping = {layer: f"{name}[{start}:{stop}]" for layer, (start, stop) in RANGES.items()}
    ff.apply_onnx(files[form], unbound, out, mode="swappable", mapping=mapping)
    check(form, run(out, {"x": X})["y"], run(files[form], {"x": X})["y"], added(unbound))


def test_maps_that_cannot_be(
    files: Files, bundle: Any, make_bundle: Any, tools: Any, tmp_path: Path
) -> None:
    path, out = files["4 bit"], tmp_path / "out.onnx"
    name, q = integers(path), f"{ATTN}.q_proj"
    cases = {
        f"{name}[40:88]": "has no outputs 40 to 88",
        f"{name}[0:32]": "shape [48, 32] expected",
        name: f"name the layer's part: {name}[START:STOP]",
        f"{name}[20:68]": f"is found for {q}, too",
        "nothing": "no constant of the graph",
        "bias": "which is FLOAT [80], used by Add add: neither a matrix of floats",
    }
    for text, why in cases.items():
        with pytest.raises(BaseMismatchError) as caught:
            ff.apply_onnx(path, bundle, out, mode="unmerged", mapping={q: text})
        assert any(why in one for one in caught.value.offenders), (text, caught.value.offenders)
    assert not out.exists()
    other = make_bundle(["elsewhere"], {"elsewhere": PARTS[q]})
    with pytest.raises(BaseMismatchError) as caught:
        ff.apply_onnx(
            tools.without_names(path, tmp_path / "in.onnx"), make_bundle(["elsewhere"]), out
        )
    hint = f"candidates: {integers(tmp_path / 'in.onnx')} [80, 32] (MatMulNBits)"
    assert hint in caught.value.offenders[0]
    ff.apply_onnx(path, other, out, mode="unmerged")


def test_another_base_is_refused_unless_allowed(
    files: Files, make_bundle: Any, added: Any, tmp_path: Path, run: Run
) -> None:
    """By name a layer is found that holds another weight, as quantisers that calibrate make."""
    others = {name: weight[::-1].copy() for name, weight in PARTS.items()}
    bundle, out = make_bundle([*PARTS], others, n=40, scaling=40.0), tmp_path / "out.onnx"
    with pytest.raises(BaseMismatchError, match="allow-base-mismatch") as caught:
        ff.apply_onnx(files["4 bit"], bundle, out, mode="unmerged")
    assert len(caught.value.offenders) == 3
    assert f"{integers(files['4 bit'])}[48:64] [16, 32] (MatMulNBits)" in "".join(
        caught.value.offenders
    )
    ff.apply_onnx(files["4 bit"], bundle, out, mode="unmerged", allow_base_mismatch=True)
    check("4 bit", run(out, {"x": X})["y"], run(files["4 bit"], {"x": X})["y"], added(bundle))


def test_scales_per_block_in_external_data(
    files: Files, bundle: Any, added: Any, tmp_path: Path, run: Run
) -> None:
    """Four-bit integers that lie outside are read, and copied; nothing is merged into them."""
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    data = {"location": "weights", "size_threshold": 0}
    onnx.save_model(onnx.load(files["4 bit QDQ"]), path, save_as_external_data=True, **data)
    ff.apply_onnx(path, bundle, out, mode="unmerged")
    check("4 bit QDQ", run(out, {"x": X})["y"], run(path, {"x": X})["y"], added(bundle))
    with pytest.raises(BaseMismatchError, match="lose most of the adapter"):
        ff.apply_onnx(path, bundle, out, force=True)


@pytest.mark.parametrize("kind", ["subgraph", "QOperator"])
def test_quantised_products_that_take_no_adapter(
    kind: str, files: Files, bundle: Any, tmp_path: Path
) -> None:
    path = tmp_path / "in.onnx"
    model = onnx.load(files["4 bit" if kind == "subgraph" else kind])
    if kind == "subgraph":
        inner = helper.make_graph(list(model.graph.node), "inner", [], list(model.graph.output), [])
        del model.graph.node[:]
        yes = numpy_helper.from_array(np.array(True))
        model.graph.node.extend(
            [
                helper.make_node("Constant", [], ["yes"], value=yes),
                helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner),
            ]
        )
        why = "MatMulNBits in a subgraph, which sees no adapter"
    else:
        why = "QLinearMatMul, whose quantised form is not understood"
    onnx.save(model, path)
    with pytest.raises(BaseMismatchError) as caught:
        ff.apply_onnx(path, bundle, tmp_path / "out.onnx", mode="swappable")
    assert len(caught.value.offenders) == 3
    assert all(f"; or in {why}" in one for one in caught.value.offenders)
    mapping = {f"{ATTN}.q_proj": f"{integers(path)}[0:48]"}
    with pytest.raises(BaseMismatchError) as caught:
        ff.apply_onnx(path, bundle, tmp_path / "out.onnx", mode="swappable", mapping=mapping)
    assert any("of the main graph" in one for one in caught.value.offenders)


WHOLE = f"{ATTN}.qkv_proj"


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, write_onnx: Any, tools: Any) -> Files:
    """The same layer as three products, as onnxruntime-genai writes Phi-3."""
    names = {name: name.replace("self_attn", "attn") + ".MatMul" for name in PARTS}
    nodes = [
        ("MatMul", ["x", f"{to}.weight"], [name], {"name": f"/{to.replace('.', '/')}"})
        for name, to in names.items()
    ]
    nodes.append(("Concat", [*PARTS], ["y"], {"axis": -1}))
    folder = tmp_path_factory.mktemp("apart")
    constants = {f"{to}.weight": PARTS[name].T for name, to in names.items()}
    sizes = {"x": ["batch", 4, 32]}, {"y": ["batch", 4, 80]}
    plain = write_onnx(folder / "float.onnx", nodes, constants, *sizes)
    outside = {"save_as_external_data": True, "location": "w", "size_threshold": 0}
    return {
        "float": plain,
        "external": write_onnx(folder / "e.onnx", nodes, constants, *sizes, **outside),
    } | {form: tools.quantise(plain, form) for form in ("4 bit", "4 bit asymmetric")}


@pytest.mark.parametrize("by_map", [False, True])
@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("float", mode) for mode in ("merged", "unmerged", "swappable", "paired", "bank")),
        *(("external", mode) for mode in ("merged", "swappable")),
        *((form, mode) for form in ("4 bit", "4 bit asymmetric") for mode in ("unmerged", "bank")),
    ],
)
def test_a_layer_that_the_graph_has_in_parts(
    form: str,
    mode: str,
    by_map: bool,
    apart: Files,
    make_bundle: Any,
    added: Any,
    tools: Any,
    tmp_path: Path,
    run: Run,
) -> None:
    path, out, mapping = apart[form], tmp_path / "out.onnx", {}
    bundle = make_bundle([WHOLE], {WHOLE: PACKED}, n=40, scaling=40.0)
    if by_map and form != "external":
        products = [n.input[1] for n in onnx.load(path).graph.node if "MatMul" in n.op_type]
        held = {t.name: i for i, t in enumerate(onnx.load(path).graph.initializer)}
        path = tools.without_names(path, tmp_path / "in.onnx")
        mapping = {WHOLE: "+".join(f"c{held[name]}" for name in products)}
    report = ff.apply_onnx(path, bundle, out, mode=mode, mapping=mapping)
    assert f"parts of layers that the graph has apart are joined: {WHOLE}" in report.notes
    session, base = ff.AdapterSession(out), run(apart[form], {"x": X})["y"]
    adapter: Any = None
    if mode not in ("merged", "unmerged"):
        session.load("mine", bundle)
        adapter = ["mine"] * 3 if mode == "bank" else "mine"
    got = session.run({"x": X}, adapter=adapter)["y"]
    check(form, got, base, added(bundle, ranges={WHOLE: (0, 80)}))


def test_parts_that_are_none(apart: Files, make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle([WHOLE], {WHOLE: PACKED})
    with pytest.raises(UsageError, match="nothing, which is not the weight of one product"):
        ff.apply_onnx(apart["float"], bundle, tmp_path / "o.onnx", mapping={WHOLE: "nothing+b"})
