"""Bundles into real files: vision transformers that others exported, MiniLM."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError
from fourierft_export.onnx_graph.apply import apply_onnx

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]

# File -> accuracy of the base on the 242 images, blocks, and the number of the first weight.
VIT = {"ibp_3_3_8": (1.0, 3, 293, 17), "pgd_2_3_16": (144 / 242, 2, 209, 17)}


@pytest.fixture(scope="module")
def images(larger_data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """242 CIFAR-10 images, normalised, and their labels."""
    with np.load(larger_data_dir / "models/vit_cifar/cifar_242.npz") as file:
        arrays = {array.ndim: array for array in (file[name] for name in file.files)}
    mean, std = np.array([[0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]])[:, :, None, None]
    return ((arrays[4] / 255 - mean) / std).astype(np.float32), arrays[1]


def vit_layers(blocks: int) -> list[str]:
    return [f"1.{i}.0.fn.1.{kind}" for i in range(blocks) for kind in ("query", "value")]


@pytest.mark.data
@pytest.mark.parametrize("name", VIT)
def test_vision_transformers_by_others(
    name: str,
    larger_data_dir: Path,
    images: tuple[np.ndarray, np.ndarray],
    make_bundle: Any,
    exact_delta: Any,
    node_list: Any,
    tmp_path: Path,
    run: Run,
) -> None:
    """Anonymous weights, opset 9: outputs are those of W + delta_W computed in float64."""
    accuracy, blocks, first, step = VIT[name]
    path, out = larger_data_dir / "models/vit_cifar" / f"{name}.onnx", tmp_path / "out.onnx"
    pixels, labels = images
    before = run(path, {"input": pixels})["output"]
    assert (before.argmax(1) == labels).mean() == accuracy
    layers = vit_layers(blocks)
    bundle = make_bundle(layers, n=100, scaling=100.0)
    report = apply_onnx(path, bundle, out)
    assert set(report.layers) == set(layers)
    model, want = onnx.load(out), onnx.load(path)
    assert node_list(model) == node_list(want)
    # Query, key and value of a block have consecutive numbers; block by block.
    by_hand = {t.name: t for t in want.graph.initializer}
    for i, layer in enumerate(layers):
        tensor = by_hand[f"onnx::MatMul_{first + step * (i // 2) + 2 * (i % 2)}"]
        weight = numpy_helper.to_array(tensor).astype(np.float64)
        weight += exact_delta(bundle, layer, (48, 48)).T
        tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), tensor.name))
    got = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for tensor in want.graph.initializer:
        np.testing.assert_allclose(
            got[tensor.name], numpy_helper.to_array(tensor), rtol=1e-6, atol=1e-7
        )
    onnx.save(want, tmp_path / "want.onnx")
    after = run(out, {"input": pixels})["output"]
    expected = run(tmp_path / "want.onnx", {"input": pixels})["output"]
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert (after.argmax(1) == expected.argmax(1)).all()
    assert np.abs(after - before).max() > 0.05 * np.abs(before).max()
    assert (after.argmax(1) == labels).mean() != accuracy


@pytest.mark.data
def test_weights_without_node_names_are_told_by_biases_then_by_hand(
    larger_data_dir: Path, make_bundle: Any, tmp_path: Path
) -> None:
    path = larger_data_dir / "models/vit_cifar/pgd_2_3_16.onnx"
    layers = vit_layers(2)
    bundle = make_bundle(layers, n=100, scaling=100.0)
    apply_onnx(path, bundle, tmp_path / "names.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "unnamed.onnx")
    apply_onnx(tmp_path / "unnamed.onnx", bundle, tmp_path / "biases.onnx")
    for node in model.graph.node:
        node.input[:] = [n.replace(".bias", ".other") for n in node.input]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace(".bias", ".other")
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(BaseMismatchError) as caught:
        apply_onnx(tmp_path / "bare.onnx", bundle, tmp_path / "out.onnx")
    assert len(caught.value.offenders) == 4
    mapping = {
        layer: f"onnx::MatMul_{209 + 17 * (i // 2) + 2 * (i % 2)}" for i, layer in enumerate(layers)
    }
    apply_onnx(tmp_path / "bare.onnx", bundle, tmp_path / "mapped.onnx", mapping=mapping)
    contents = [
        {
            t.name: t.raw_data
            for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer
            if t.name.startswith("onnx::MatMul")
        }
        for name in ("names", "biases", "mapped")
    ]
    assert len(contents[0]) == 12
    assert contents[0] == contents[1] == contents[2]


@pytest.fixture(scope="module")
def minilm_export(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with a fresh head of two labels, by TorchScript's exporter."""
    from fourierft_export.models.load import load_model

    folder = tmp_path_factory.mktemp("minilm_exports")
    torch.manual_seed(0)
    head = {"classifier.weight", "classifier.bias"}
    model = load_model(minilm_dir, "text-classification", provided=head)
    model.classifier.bias.data.fill_(0.25)
    model.config.return_dict = False
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "sequence"} for name in names}
    inputs = {name: torch.ones(2, 16, dtype=torch.int64) for name in names}
    path = folder / "torchscript.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (), path, kwargs=inputs, input_names=names, output_names=["logits"],
            verbose=False, dynamo=False, dynamic_axes=axes,
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def int8(minilm_export: Path) -> Path:
    """The export with dynamic int8 weights, a scale for each channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = minilm_export.with_name("int8.onnx")
    logging.disable(logging.WARNING)
    quantize_dynamic(minilm_export, out, weight_type=QuantType.QInt8, per_channel=True)
    logging.disable(logging.NOTSET)
    return out


def test_minilm_equals_peft(
    minilm_export: Path,
    minilm_dir: Path,
    peft_minilm_adapter: Any,
    load_peft_minilm: Any,
    tokenize: Any,
    sst2_sentences: list[str],
    tmp_path: Path,
    run: Run,
) -> None:
    adapter = peft_minilm_adapter()
    model = load_peft_minilm(adapter)
    inputs = tokenize(sst2_sentences[:12])
    with torch.no_grad():
        want = model(**inputs).logits.numpy()
    base = run(minilm_export, inputs)["logits"]
    bundle = ff.from_peft(adapter, minilm_dir)
    for mode in ("merged", "unmerged"):
        out = tmp_path / f"{mode}.onnx"
        report = apply_onnx(minilm_export, bundle, out, mode=mode)
        assert len(report.layers) == 12
        assert report.notes == ()
        got = run(out, inputs)["logits"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
        assert (got.argmax(1) == want.argmax(1)).all()
        assert np.abs(got - base).max() > 1e-3


def test_quantised_minilm_follows_the_float_one(
    minilm_export: Path,
    int8: Path,
    minilm_dir: Path,
    peft_minilm_adapter: Any,
    tokenize: Any,
    sst2_sentences: list[str],
    tmp_path: Path,
    run: Run,
) -> None:
    """The adapter's effect survives where it could not be merged: beside dynamic int8 weights."""
    source, base = minilm_export, int8
    whole = ff.from_peft(peft_minilm_adapter(scaling=600.0), minilm_dir)
    bundle = ff.Bundle.build(whole.spec, whole.spectra)
    report = apply_onnx(base, bundle, tmp_path / "out.onnx", mode="unmerged")
    assert any("12 layers are quantised" in note for note in report.notes)
    apply_onnx(source, bundle, tmp_path / "float.onnx")
    inputs = tokenize(sst2_sentences[:12])
    exact, quantised, wanted, got = (
        run(path, inputs)["logits"]
        for path in (source, base, tmp_path / "float.onnx", tmp_path / "out.onnx")
    )
    noise, effect = np.abs(quantised - exact).mean(), np.abs(wanted - exact).mean()
    assert effect > 5 * noise
    assert np.abs(got - wanted).mean() < 1.5 * noise
    # With the adapter's own head, which the quantised one becomes.
    report = apply_onnx(base, whole, tmp_path / "head.onnx", mode="unmerged")
    assert any("classifier.weight" in note and "float here" in note for note in report.notes)
    apply_onnx(source, whole, tmp_path / "float_head.onnx")
    wanted, got = (
        run(path, inputs)["logits"]
        for path in (tmp_path / "float_head.onnx", tmp_path / "head.onnx")
    )
    assert np.abs(wanted - exact).mean() > 5 * noise
    assert np.abs(got - wanted).mean() < 1.5 * noise


@pytest.mark.parametrize("form", ["dynamic int8", "4 bit"])
def test_a_bank_beside_the_weights_of_a_quantised_minilm(
    form: str,
    minilm_export: Path,
    int8: Path,
    minilm_dir: Path,
    peft_minilm_adapter: Any,
    tokenize: Any,
    sst2_sentences: list[str],
    tmp_path: Path,
    run: Run,
) -> None:
    """A file whose shapes ONNX Runtime's operators hide; each row as its adapter gives it alone."""
    base, out = int8, tmp_path / "out.onnx"
    if form == "4 bit":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        base = tmp_path / "base.onnx"
        logging.disable(logging.WARNING)
        quantiser = MatMulNBitsQuantizer(onnx.load(minilm_export), bits=4, block_size=32)
        quantiser.process()
        quantiser.model.save_model_to_file(str(base))
        logging.disable(logging.NOTSET)
    adapters = {
        "one": peft_minilm_adapter(),
        "two": peft_minilm_adapter(7, random_loc_seed=99, n_frequency=300, scaling=110.0),
    }
    bundles = {name: ff.from_peft(path, minilm_dir) for name, path in adapters.items()}
    report = ff.apply_onnx(base, bundles, out, mode="bank")
    assert len(report.layers) == 12
    ids = [2, 0, 1]
    inputs = {name: value.numpy() for name, value in tokenize(sst2_sentences[:3]).items()}
    together = run(out, inputs | {"adapter_id": np.array(ids)})["logits"]
    files = [base]
    for name, bundle in bundles.items():
        files.append(tmp_path / f"{name}.onnx")
        ff.apply_onnx(base, bundle, files[-1], mode="unmerged")
    for row, number in enumerate(ids):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        want = run(files[number], one)["logits"]
        # Dynamic quantisation takes one range for the whole batch: there each row by itself.
        got = together[row : row + 1]
        if form == "dynamic int8":
            got = run(out, one | {"adapter_id": np.array([number])})["logits"]
        close = 1e-4 if number or form == "4 bit" else 0.03  # the base's head was dequantised
        np.testing.assert_allclose(got, want, rtol=0, atol=close * np.abs(want).max())
