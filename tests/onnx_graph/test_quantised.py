"""Models quantised by onnxruntime's own tools: the weights stay, the adapter is a float branch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from torch import nn

import fourierft_export as ff
from fourierft_export.errors import BadInputError, BaseMismatchError, UsageError

INT8 = ("dynamic int8", "dynamic int8 per channel", "QDQ", "Cast and Mul")
FORMS = (*INT8, "4 bit", "8 bit", "4 bit asymmetric")
LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
X = np.random.default_rng(0).standard_normal((4, 6, 32)).astype(np.float32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Quantised:
    """The model, its export, and the same quantised in every form.

    Attributes:
        files: "float" or form -> file.
    """

    def __init__(self, folder: Path, tools: Any, make_bundle: Any, exact_delta: Any) -> None:
        self.model, self.make_bundle, self.exact_delta = Model().eval(), make_bundle, exact_delta
        plain = tools.torchscript(self.model, X, folder / "float.onnx")
        # With room for what an adapter adds: static ranges clip what goes beyond them.
        feeds = [{"x": X}, {"x": 1.5 * X}]
        self.files = {form: tools.quantise(plain, form, feeds) for form in FORMS}
        self.files["float"] = plain

    def bundle(self, layers: list[str] = LAYERS, model: Any = None, **options: Any) -> ff.Bundle:
        model = model or self.model
        weights = {name: model.get_submodule(name).weight.detach().numpy() for name in layers}
        bundle = self.make_bundle(layers, weights, **({"n": 40, "scaling": 150.0} | options))
        assert isinstance(bundle, ff.Bundle)
        return bundle

    def exact(self, bundle: ff.Bundle | None = None) -> np.ndarray:
        """The float model's output with W + delta_W, in float64."""
        new = copy.deepcopy(self.model).double()
        for name in bundle.spectra if bundle else ():
            weight = new.get_submodule(name).weight
            weight.data += torch.from_numpy(self.exact_delta(bundle, name, tuple(weight.shape)))
        return np.asarray(new(torch.from_numpy(X).double()).detach().numpy())


@pytest.fixture(scope="module")
def q(
    tmp_path_factory: pytest.TempPathFactory, tools: Any, make_bundle: Any, exact_delta: Any
) -> Quantised:
    return Quantised(tmp_path_factory.mktemp("quantised"), tools, make_bundle, exact_delta)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


@pytest.mark.parametrize("mode", ["unmerged", "swappable"])
@pytest.mark.parametrize("form", FORMS)
def test_the_adapter_is_a_float_branch(
    form: str, mode: str, q: Quantised, tmp_path: Path, run: Any
) -> None:
    """About as far from W + delta_W as the quantised base is from W, and its weights untouched."""
    bundle, out = q.bundle(scaling=25.0), tmp_path / "out.onnx"
    report = ff.apply_onnx(q.files[form], bundle, out, mode=mode)
    assert set(report.layers) == set(LAYERS)
    assert any("4 layers are quantised" in note for note in report.notes)
    assert not any("no check" in note for note in report.notes)
    base, got = (run(path, {"x": X})["y"] for path in (q.files[form], out))
    exact, want = q.exact(), q.exact(bundle)
    noise = distance(base, exact)
    assert distance(got, want) < 2 * noise
    assert distance(want, exact) > 5 * noise
    before, after = (
        {t.name: t.SerializeToString() for t in onnx.load(path).graph.initializer}
        for path in (q.files[form], out)
    )
    assert before.items() <= after.items()


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_dequantised_base_plus_the_adapter(
    form: str, q: Quantised, tmp_path: Path, run: Any
) -> None:
    """The last layer's input does not change with its own adapter: y + x delta_W^T to float32."""
    bundle = q.bundle(["blocks.1.down"])
    quantised = onnx.load(q.files[form])
    # Its input, the tanh of the block before it, as one more output of the base.
    (tanh,) = (n for n in quantised.graph.node if n.op_type == "Tanh" and "blocks.1" in n.name)
    quantised.graph.output.append(
        onnx.helper.make_tensor_value_info(tanh.output[0], onnx.TensorProto.FLOAT, None)
    )
    onnx.save(quantised, tmp_path / "base.onnx")
    base = run(tmp_path / "base.onnx", {"x": X})
    inner = base[tanh.output[0]].astype(np.float64)
    share = inner @ q.exact_delta(bundle, "blocks.1.down", (32, 64)).T
    assert np.abs(share).max() > 0.5
    for mode in ("unmerged", "swappable"):
        out = tmp_path / f"{mode}.onnx"
        ff.apply_onnx(q.files[form], bundle, out, mode=mode)
        got = run(out, {"x": X})["y"]
        if form != "QDQ":  # there the sum behind it is quantised again
            np.testing.assert_allclose(got, base["y"] + share, rtol=0, atol=2e-5)
        else:
            assert np.median(np.abs(got - base["y"] - share)) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_what_is_refused(form: str, q: Quantised, tmp_path: Path) -> None:
    """Merging into integers; and the adapter of another base, seen through the quantisation."""
    out, path = tmp_path / "out.onnx", q.files[form]
    with pytest.raises(BaseMismatchError, match="--mode unmerged") as caught:
        ff.apply_onnx(path, q.bundle(), out)
    assert len(caught.value.offenders) == 4
    other = q.bundle(model=Model(seed=1))
    with pytest.raises(BaseMismatchError, match="allow-base-mismatch") as caught:
        ff.apply_onnx(path, other, out, mode="unmerged")
    assert len(caught.value.offenders) == 4
    assert list(tmp_path.iterdir()) == []
    ff.apply_onnx(path, other, out, mode="unmerged", allow_base_mismatch=True)


@pytest.mark.parametrize("size", [0, 8, 32])
def test_parts_of_a_weight_that_do_not_fit_it(size: int, q: Quantised, tmp_path: Path) -> None:
    model = onnx.load(q.files["4 bit"])
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "block_size":
                assert attribute.i == 16
                attribute.i = size
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BadInputError, match="scales and zero points that fit"):
        ff.apply_onnx(tmp_path / "m.onnx", q.bundle(), tmp_path / "out.onnx", mode="unmerged")


def test_a_packed_weight_of_floats_is_bad_input(q: Quantised, tmp_path: Path) -> None:
    model = onnx.load(q.files["4 bit"])
    packed = {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}
    for tensor in model.graph.initializer:
        if tensor.name in packed:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BadInputError, match="fit the quantised weight"):
        ff.apply_onnx(tmp_path / "m.onnx", q.bundle(), tmp_path / "out.onnx", mode="unmerged")


def test_several_adapters_and_old_opsets_are_refused(q: Quantised, tmp_path: Path) -> None:
    bundle, out = q.bundle(), tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="--mode bank"):
        ff.apply_onnx(q.files["4 bit"], [bundle, bundle], out, mode="unmerged")
    old = onnx.load(q.files["4 bit"])
    next(o for o in old.opset_import if o.domain in ("", "ai.onnx")).version = 15
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(UsageError, match="opset 16 or newer"):
        ff.apply_onnx(tmp_path / "old.onnx", bundle, out, mode="unmerged")


@pytest.mark.parametrize("form", FORMS)
def test_anonymous_weights_are_found_by_content(
    form: str, q: Quantised, tools: Any, tmp_path: Path, run: Any
) -> None:
    """The same output when neither nodes nor biases have names."""
    bundle, named, out = q.bundle(), tmp_path / "named.onnx", tmp_path / "out.onnx"
    ff.apply_onnx(q.files[form], bundle, named, mode="unmerged")
    anonymous = tools.without_names(q.files[form], tmp_path / "in.onnx")
    ff.apply_onnx(anonymous, bundle, out, mode="unmerged")
    got, want = (run(path, {"x": X})["y"] for path in (out, named))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["float", "4 bit", "dynamic int8"])
def test_a_bank(form: str, q: Quantised, tmp_path: Path, run: Any) -> None:
    """Each row has its own adapter, 0 is the base; as if each had been applied alone."""
    bundles = {name: q.bundle(seed=seed) for name, seed in (("a", 7), ("b", 8))}
    alone = [run(q.files[form], {"x": X})["y"]]
    for name, bundle in bundles.items():
        ff.apply_onnx(q.files[form], bundle, tmp_path / f"{name}.onnx", mode="unmerged")
        alone.append(run(tmp_path / f"{name}.onnx", {"x": X})["y"])
    out, ids = tmp_path / "bank.onnx", np.array([2, 0, 1, 2])
    report = ff.apply_onnx(q.files[form], bundles, out, mode="bank")
    assert "adapter_id" in report.inputs
    got = run(out, {"x": X, "adapter_id": ids})["y"]
    want = np.stack([alone[i][row] for row, i in enumerate(ids)])
    # Dynamic quantisation takes one range for the whole batch, other rows' adapters in it.
    np.testing.assert_allclose(got, want, rtol=0, atol=0.1 if "int8" in form else 1e-4)
    assert np.abs(alone[1] - alone[2]).max() > 0.5


@pytest.mark.parametrize("form", ["dynamic int8", "QDQ"])
def test_int8_products_do_not_saturate(form: str, q: Quantised, tmp_path: Path) -> None:
    """AdapterSession and validate's graphs agree with onnx's reference evaluator on every CPU."""
    from fourierft_export.proof.graphs import Graph

    out = tmp_path / "out.onnx"
    ff.apply_onnx(q.files[form], q.bundle(scaling=0.0), out, mode="swappable")
    base = onnx.load(q.files[form])
    base.opset_import[0].version = 19  # the first whose DequantizeLinear the evaluator has
    (want,) = onnx.reference.ReferenceEvaluator(base).run(None, {"x": X})
    for got in (ff.AdapterSession(out).run({"x": X})["y"], Graph(out).run({"x": X})["y"]):
        assert distance(got, want) < 0.005 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())
