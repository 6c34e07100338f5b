"""Models quantised by onnxruntime's own tools: the weights stay, the adapter is a float branch."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from torch import nn

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError, UsageError
from fourierft_export.onnx_graph.apply import apply_onnx
from fourierft_export.proof.graphs import Graph

FORMS = ("dynamic int8", "dynamic int8 per channel", "QDQ", "4 bit", "8 bit", "4 bit asymmetric")
Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]
LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 6, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def files(
    model: nn.Module, x: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The float export, and what onnxruntime's quantisers make of it."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    folder = tmp_path_factory.mktemp("quantised")
    plain = folder / "float.onnx"

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            # With room for what an adapter adds: static ranges clip what goes beyond them.
            self.rows: Iterator[dict[str, np.ndarray]] = iter([{"x": x}, {"x": 1.5 * x}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        torch.onnx.export(
            model,
            (torch.from_numpy(x),),
            plain,
            input_names=["x"],
            output_names=["y"],
            dynamo=False,
            verbose=False,
            opset_version=18,
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )
        out = {form: folder / f"{form}.onnx" for form in FORMS}
        quantize_dynamic(plain, out["dynamic int8"], weight_type=QuantType.QInt8)
        quantize_dynamic(
            plain, out["dynamic int8 per channel"], weight_type=QuantType.QInt8, per_channel=True
        )
        quantize_static(plain, out["QDQ"], Rows(), quant_format=QuantFormat.QDQ, per_channel=True)
        for form in ("4 bit", "8 bit", "4 bit asymmetric"):
            quantiser = MatMulNBitsQuantizer(
                onnx.load(plain),
                bits=int(form[0]),
                block_size=16,
                is_symmetric="asymmetric" not in form,
            )
            quantiser.process()
            quantiser.model.save_model_to_file(str(out[form]))
        logging.disable(logging.NOTSET)
    return {"float": plain, **out}


def changed(model: nn.Module, bundle: Any, delta: Any) -> nn.Module:
    """The model with W + delta_W, in float64."""
    new = copy.deepcopy(model).double()
    for name in bundle.spectra:
        weight = new.get_submodule(name).weight
        weight.data += torch.from_numpy(delta(bundle, name, tuple(weight.shape)))
    return new


def bound(model: nn.Module, make_bundle: Any, layers: list[str] = LAYERS, **options: Any) -> Any:
    weights = {name: model.get_submodule(name).weight.detach().numpy() for name in layers}
    return make_bundle(layers, weights, **({"n": 40, "scaling": 150.0} | options))


@pytest.mark.parametrize("mode", ["unmerged", "swappable"])
@pytest.mark.parametrize("form", FORMS)
def test_the_adapter_is_a_float_branch(
    form: str,
    mode: str,
    files: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    exact_delta: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """About as far from W + delta_W as the quantised base is from W, and its weights untouched."""
    bundle = bound(model, make_bundle, scaling=25.0)
    out = tmp_path / "out.onnx"
    report = apply_onnx(files[form], bundle, out, mode=mode)
    assert set(report.layers) == set(LAYERS)
    assert any("4 layers are quantised" in note for note in report.notes)
    assert not any("no check" in note for note in report.notes)
    base, got = (run(path, {"x": x})["y"] for path in (files[form], out))
    exact_base = model.double()(torch.from_numpy(x).double()).detach().numpy()
    model.float()
    want = changed(model, bundle, exact_delta)(torch.from_numpy(x).double()).detach().numpy()
    noise = np.sqrt(np.mean((base - exact_base) ** 2))
    effect = np.sqrt(np.mean((want - exact_base) ** 2))
    assert np.sqrt(np.mean((got - want) ** 2)) < 2 * noise
    assert effect > 5 * noise
    before, after = (
        {t.name: t.SerializeToString() for t in onnx.load(path).graph.initializer}
        for path in (files[form], out)
    )
    assert before.items() <= after.items()


@pytest.mark.parametrize("form", FORMS)
def test_exactly_the_dequantised_base_plus_the_adapter(
    form: str,
    files: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    exact_delta: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """The last layer's input does not change with its own adapter: y + x delta_W^T to float32."""
    bundle = bound(model, make_bundle, ["blocks.1.down"])
    quantised = onnx.load(files[form])
    # Its input, the tanh of the block before it, as one more output of the base.
    (tanh,) = (n for n in quantised.graph.node if n.op_type == "Tanh" and "blocks.1" in n.name)
    quantised.graph.output.append(
        onnx.helper.make_tensor_value_info(tanh.output[0], onnx.TensorProto.FLOAT, None)
    )
    onnx.save(quantised, tmp_path / "base.onnx")
    base = run(tmp_path / "base.onnx", {"x": x})
    inner = base[tanh.output[0]].astype(np.float64)
    for mode in ("unmerged", "swappable"):
        out = tmp_path / f"{mode}.onnx"
        apply_onnx(files[form], bundle, out, mode=mode)
        got = run(out, {"x": x})["y"]
        share = inner @ exact_delta(bundle, "blocks.1.down", (32, 64)).T
        assert np.abs(share).max() > 0.5
        if form != "QDQ":  # there the sum behind it is quantised again
            np.testing.assert_allclose(got, base["y"] + share, rtol=0, atol=2e-5)
        else:
            error = np.abs(got - base["y"] - share)
            assert np.median(error) < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_merging_is_refused(
    form: str, files: dict[str, Path], model: nn.Module, make_bundle: Any, tmp_path: Path
) -> None:
    with pytest.raises(BaseMismatchError, match="--mode unmerged") as caught:
        apply_onnx(files[form], bound(model, make_bundle), tmp_path / "out.onnx")
    assert len(caught.value.offenders) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_another_base_is_told_through_the_quantisation(
    form: str, files: dict[str, Path], make_bundle: Any, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = bound(Model().eval(), make_bundle)
    with pytest.raises(BaseMismatchError, match="allow-base-mismatch") as caught:
        apply_onnx(files[form], other, tmp_path / "out.onnx", mode="unmerged")
    assert len(caught.value.offenders) == 4
    apply_onnx(files[form], other, tmp_path / "out.onnx", mode="unmerged", allow_base_mismatch=True)


@pytest.mark.parametrize("form", FORMS)
def test_anonymous_quantised_weights_are_found_by_content(
    form: str,
    files: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """The same output when neither nodes nor biases have names."""
    named, path = tmp_path / "named.onnx", tmp_path / "in.onnx"
    bundle = bound(model, make_bundle)
    apply_onnx(files[form], bundle, named, mode="unmerged")
    anonymous = onnx.load(files[form])
    new = {tensor.name: f"c{i}" for i, tensor in enumerate(anonymous.graph.initializer)}
    for tensor in anonymous.graph.initializer:
        tensor.name = new[tensor.name]
    for number, node in enumerate(anonymous.graph.node):
        node.name = f"n{number}"
        node.input[:] = [new.get(name, name) for name in node.input]
    onnx.save(anonymous, path)
    apply_onnx(path, bundle, tmp_path / "out.onnx", mode="unmerged")
    got, want = (run(p, {"x": x})["y"] for p in (tmp_path / "out.onnx", named))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_several_adapters_and_old_opsets_are_refused(
    files: dict[str, Path], model: nn.Module, make_bundle: Any, tmp_path: Path
) -> None:
    bundle, out = bound(model, make_bundle), tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="--mode bank"):
        apply_onnx(files["4 bit"], [bundle, bundle], out, mode="unmerged")
    old = onnx.load(files["4 bit"])
    next(o for o in old.opset_import if o.domain in ("", "ai.onnx")).version = 17
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(UsageError, match="opset 18 or newer"):
        apply_onnx(tmp_path / "old.onnx", bundle, out, mode="unmerged")


@pytest.mark.parametrize("form", ["float", "4 bit", "dynamic int8"])
def test_a_bank(
    form: str,
    files: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    x: np.ndarray,
    tmp_path: Path,
    run: Run,
) -> None:
    """Each row has its own adapter, 0 is the base; as if each had been applied alone."""
    bundles = [bound(model, make_bundle, seed=seed) for seed in (7, 8)]
    alone = [run(files[form], {"x": x})["y"]]
    for i, bundle in enumerate(bundles):
        apply_onnx(files[form], bundle, tmp_path / f"{i}.onnx", mode="unmerged")
        alone.append(run(tmp_path / f"{i}.onnx", {"x": x})["y"])
    out = tmp_path / "bank.onnx"
    report = apply_onnx(files[form], dict(zip("ab", bundles, strict=True)), out, mode="bank")
    assert "adapter_id" in report.inputs
    ids = np.array([2, 0, 1, 2])
    got = run(out, {"x": x, "adapter_id": ids})["y"]
    want = np.stack([alone[i][row] for row, i in enumerate(ids)])
    # Dynamic quantisation takes one range for the whole batch, other rows' adapters in it.
    tolerance = 0.1 if form == "dynamic int8" else 1e-4
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    assert np.abs(alone[1] - alone[2]).max() > 0.5


@pytest.mark.parametrize("form", ["dynamic int8", "QDQ"])
def test_sessions_compute_int8_products_without_saturation(
    form: str,
    files: dict[str, Path],
    model: nn.Module,
    make_bundle: Any,
    x: np.ndarray,
    tmp_path: Path,
) -> None:
    """AdapterSession and validate's graphs agree with onnx's reference evaluator on every CPU."""
    out = tmp_path / "out.onnx"
    bundle = bound(model, make_bundle, scaling=0.0)
    apply_onnx(files[form], bundle, out, mode="swappable")
    base = onnx.load(files[form])
    base.opset_import[0].version = 19  # the first whose DequantizeLinear the evaluator has
    (want,) = onnx.reference.ReferenceEvaluator(base).run(None, {"x": x})
    tolerance = 0.02 * np.abs(want).max()
    for got in (ff.AdapterSession(out).run({"x": x})["y"], Graph(out).run({"x": x})["y"]):
        assert np.sqrt(np.mean((got - want) ** 2)) < 0.005 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_a_users_own_precision_mode_stays(
    files: dict[str, Path], model: nn.Module, make_bundle: Any, tmp_path: Path
) -> None:
    """The session option that avoids saturation is added only where the user gave none."""
    import onnxruntime as ort

    out, entry = tmp_path / "out.onnx", "session.x64quantprecision"
    apply_onnx(files["dynamic int8"], bound(model, make_bundle), out, mode="swappable")
    for given, want in (("0", "0"), ("1", "1"), (None, "1")):
        options = ort.SessionOptions()
        if given is not None:
            options.add_session_config_entry(entry, given)
        ff.AdapterSession(out, session_options=options)
        assert options.get_session_config_entry(entry) == want
