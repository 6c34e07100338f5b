"""Small models, and ONNX Runtime to run what was exported of them."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest


def run_onnx(path: Path, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Outputs by name, from ONNX Runtime on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), quiet_options(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def quiet_options() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Else int8 sums saturate on x86-64 CPUs without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


@pytest.fixture(scope="session")
def write_onnx() -> Callable[..., Path]:
    """`write(path, nodes, constants, inputs, outputs, dtype, **saving)`: an ONNX file.

    Nodes are the arguments of `helper.make_node`, its attributes last; constants arrays by name;
    inputs and outputs shapes by name, all of one dtype.
    """
    from onnx import helper, numpy_helper

    def write(
        path: Path,
        nodes: list[tuple[Any, ...]],
        constants: dict[str, Any],
        inputs: dict[str, Any],
        outputs: dict[str, Any],
        dtype: int = onnx.TensorProto.FLOAT,
        **saving: Any,
    ) -> Path:
        made = [helper.make_node(*one[:3], **dict(*one[3:])) for one in nodes]
        tensors = [numpy_helper.from_array(np.array(a, order="C"), n) for n, a in constants.items()]
        values = [
            [helper.make_tensor_value_info(name, dtype, shape) for name, shape in named.items()]
            for named in (inputs, outputs)
        ]
        graph = helper.make_graph(made, "g", *values, tensors)
        others = {node.domain for node in made} - {""}
        opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(one, 1) for one in others)]
        model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
        onnx.save_model(model, path, **saving)
        return path

    return write


@pytest.fixture(scope="session")
def run() -> Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]:
    return run_onnx


def quantise(plain: Path, form: str, feeds: list[dict[str, np.ndarray]] | None = None) -> Path:
    """What onnxruntime's own quantisers make of a file, as a file beside it.

    Args:
        plain: the float model.
        form: "dynamic int8", "QDQ" or "QOperator" (measured on `feeds`), "4 bit" or "8 bit";
            with "per channel", "asymmetric" or "4 bit QDQ"; or "Cast and Mul", weights only.
        feeds: rows for the ranges of activations.
    """
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    class Rows(tools.CalibrationDataReader):
        rows = iter(feeds or [])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    out = plain.with_name(f"{form}.onnx")
    if form == "Cast and Mul":
        onnx.save(_cast_and_mul(onnx.load(plain)), out)
        return out
    logging.disable(logging.WARNING)
    if form.startswith("dynamic"):
        kind = tools.QuantType.QInt8
        tools.quantize_dynamic(plain, out, weight_type=kind, per_channel="channel" in form)
    elif form in ("QDQ", "QOperator"):
        layout = tools.QuantFormat[form]
        tools.quantize_static(plain, out, Rows(), quant_format=layout, per_channel=form == "QDQ")
    else:
        quantiser = MatMulNBitsQuantizer(
            onnx.load(plain),
            bits=int(form[0]),
            block_size=16,
            is_symmetric="asymmetric" not in form,
            quant_format=tools.QuantFormat["QDQ" if "QDQ" in form else "QOperator"],
        )
        quantiser.process()
        quantiser.model.save_model_to_file(str(out))
    logging.disable(logging.NOTSET)
    return out


def _cast_and_mul(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every matrix as 8-bit integers, cast and multiplied; the second one with a zero point."""
    from onnx import helper, numpy_helper

    matrices = [t for t in model.graph.initializer if len(t.dims) == 2]
    for number, tensor in enumerate(matrices):
        name, weight = tensor.name, numpy_helper.to_array(tensor)
        scale = np.abs(weight).max(0, keepdims=True) / 120
        zero = 5 if number == 1 else 0
        parts = {"q": np.round(weight / scale + zero).astype(np.int8), "scale": scale}
        parts |= {"zero": np.array(zero, np.float32)} if zero else {}
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(
            numpy_helper.from_array(array, f"{name}_{part}") for part, array in parts.items()
        )
        nodes = [helper.make_node("Cast", [f"{name}_q"], [f"{name}_f"], to=1)]
        if zero:
            nodes.append(helper.make_node("Sub", [f"{name}_f", f"{name}_zero"], [f"{name}_s"]))
        last = nodes[-1].output[0]
        nodes.append(helper.make_node("Mul", [last, f"{name}_scale"], [name]))
        for at, one in enumerate(nodes):
            model.graph.node.insert(at, one)
    return model


def torchscript(model: Any, x: np.ndarray, path: Path, axes: dict[int, str] | None = None) -> Path:
    """`model` through torch's older exporter: x [batch, ...] to y [batch, ...]."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.from_numpy(x),),
            path,
            input_names=["x"],
            output_names=["y"],
            dynamo=False,
            verbose=False,
            opset_version=18,
            dynamic_axes={"x": axes or {0: "batch"}, "y": {0: "batch"}},
        )
    return path


def without_names(path: Path, out: Path) -> Path:
    """The model without a name that says anything of a module."""
    model = onnx.load(path)
    new = {tensor.name: f"c{i}" for i, tensor in enumerate(model.graph.initializer)}
    for tensor in model.graph.initializer:
        tensor.name = new[tensor.name]
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
        node.input[:] = [new.get(name, name) for name in node.input]
    onnx.save(model, out)
    return out


@pytest.fixture(scope="session")
def cut_stories(
    stories260k: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Path]:
    """`cut_stories(layers)`: stories260k with its first layers only, which is exported sooner."""

    def cut(layers: int) -> Path:
        folder = tmp_path_factory.mktemp("stories")
        config = json.loads((stories260k / "config.json").read_text("utf-8"))
        text = json.dumps(config | {"num_hidden_layers": layers})
        (folder / "config.json").write_text(text, "utf-8")
        shutil.copy(stories260k / "model.safetensors", folder)
        return folder

    return cut


@pytest.fixture(scope="session")
def tools() -> Any:
    """`tools.quantise`, `tools.torchscript`, `tools.without_names`, `tools.random_adapters`."""
    each = (quantise, torchscript, without_names, random_adapters)
    return SimpleNamespace(**{function.__name__: function for function in each})


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], onnx.ModelProto]:
    """`folded(path)`: the model as ONNX Runtime has it once it is loaded."""
    import onnxruntime as ort

    def load(path: Path) -> onnx.ModelProto:
        options = quiet_options()
        out = tmp_path_factory.mktemp("folded") / "model.onnx"
        options.optimized_model_filepath = str(out)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(out)

    return load


@pytest.fixture(scope="session")
def node_list() -> Callable[[onnx.ModelProto], list[tuple[object, ...]]]:
    """`node_list(model)`: every node with all that it has, but what its weights are called."""

    def nodes(model: onnx.ModelProto) -> list[tuple[object, ...]]:
        constants = {tensor.name for tensor in model.graph.initializer}
        return [
            (
                node.domain,
                node.op_type,
                node.name,
                tuple("*" if name in constants else name for name in node.input),
                tuple(node.output),
                tuple(attribute.SerializeToString() for attribute in node.attribute),
            )
            for node in model.graph.node
        ]

    return nodes


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Any]:
    """`make(layers, weights=None, saved=None, n=12, seed=7, scaling=9.0)`: random-normal spectra.

    With `weights` (layer -> (out, in) array) the bundle is bound to them, otherwise unbound.
    """
    from fourierft_export.bundle.bundle import Bundle
    from fourierft_export.bundle.fingerprint import fingerprint
    from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
    from fourierft_export.spectral.entries import entries_sha256, spectral_entries

    def make(
        layers: list[str],
        weights: dict[str, np.ndarray] | None = None,
        saved: dict[str, np.ndarray] | None = None,
        n: int = 12,
        seed: int = 7,
        scaling: float = 9.0,
    ) -> Bundle:
        rng = np.random.default_rng(seed)
        specs = []
        for name in layers:
            if weights is None:
                specs.append(LayerSpec(name, n))
                continue
            shape = weights[name].shape
            digest = entries_sha256(spectral_entries(seed, shape, n, "small"))
            mark = fingerprint(weights[name])
            specs.append(LayerSpec(name, n, shape, False, "small", digest, mark))
        spectra = {name: rng.standard_normal(n).astype(np.float32) for name in layers}
        return Bundle.build(AdapterSpec(seed, scaling, tuple(specs)), spectra, saved)

    return make


@pytest.fixture(scope="session")
def exact_delta() -> Callable[..., np.ndarray]:
    """`delta(bundle, layer, shape)`: delta_W in float64, straight from its definition."""
    from fourierft_export.spectral.delta import reference_delta
    from fourierft_export.spectral.entries import spectral_entries

    def delta(bundle: Any, layer: str, shape: tuple[int, int]) -> np.ndarray:
        spectrum = bundle.spectra[layer]
        entries = spectral_entries(bundle.spec.entry_seed, shape, len(spectrum), "small")
        return reference_delta(spectrum, entries, shape, bundle.spec.scaling)

    return delta


def random_adapters(
    net: Any, x: Any, configs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str | None, np.ndarray]]:
    """Random-normal adapters of these configurations, as bundles, and what the model gives.

    The outputs are under the adapters' names, the base's under None; `net` ends without adapters.
    """
    import torch

    import fourierft_export as ff

    bundles: dict[str, Any] = {}
    want: dict[str | None, np.ndarray] = {}
    with torch.no_grad():
        want[None] = net(x).numpy()
        for name, config in configs.items():
            for parameter in ff.inject(net, config).parameters():
                if parameter.requires_grad:
                    parameter.data.normal_()
            bundles[name] = ff.capture(net)
            want[name] = net(x).numpy()
            ff.detach(net)
    return bundles, want


class Tenants:
    """A base with two adapters that differ in seed, n, scaling and head, exported in each mode.

    Attributes:
        folder: where the files are.
        bundles: adapter name -> bundle.
        inputs: by name.
        want: adapter name, or None for the base -> the model's output in PyTorch.
        output: its name.
        reports: mode -> what its export said.
    """

    def __init__(
        self,
        folder: Path,
        bundles: dict[str, Any],
        inputs: dict[str, np.ndarray],
        want: dict[str | None, np.ndarray],
        output: str,
        export: Callable[..., Any],
    ) -> None:
        self.reports: dict[str, Any] = {}
        self.folder, self.bundles, self.inputs = folder, bundles, inputs
        self.want, self.output = want, output
        self.export = export
        for name, bundle in bundles.items():
            bundle.save(self.bundle_file(name))

    def bundle_file(self, name: str) -> Path:
        return self.folder / f"{name}.fourierft.safetensors"

    def file(self, mode: str) -> Path:
        """The model in this mode, exported with the first adapter (a bank: with all)."""
        path = self.folder / f"{mode}.onnx"
        if not path.exists():
            self.reports[mode] = self.export(mode, path)
        return path

    def check(self, got: np.ndarray, name: str | None, rows: Any = slice(None)) -> None:
        """The bar: 1e-4 of the output's scale, and the same argmax."""
        want = self.want[name][rows]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(self.want[name]).max())
        np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.fixture(scope="session")
def small_tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    """Three layers in two groups, one of them without a bias, and a head that the base has, too."""
    import torch
    from torch import nn

    import fourierft_export as ff

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 12)
            self.c, self.head = nn.Linear(12, 20, bias=False), nn.Linear(20, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.head(torch.tanh(self.c(inner)).mean(1))

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(5, 4, 12)
    configs = {
        name: ff.FourierFTConfig(
            n_frequency=n,
            scaling=scaling,
            random_loc_seed=seed,
            target_modules=["a", "b", "c"],
            modules_to_save=["head"],
            n_frequency_pattern={"b": n - 5},
            bias="fourier_only",
        )
        for name, seed, n, scaling in (("one", 1, 40, 30.0), ("two", 2, 25, 50.0))
    }
    bundles, want = random_adapters(net, x, configs)

    def export(mode: str, path: Path, **options: Any) -> Any:
        for name, bundle in bundles.items():
            if mode == "bank" or name == "one":
                ff.attach(net, bundle, name)
        axes = {"x": {0: "batch", 1: "tokens"}}
        report = ff.export_onnx(net, {"x": x[:2]}, path, mode=mode, dynamic_shapes=axes, **options)
        ff.detach(net)
        return report

    folder = tmp_path_factory.mktemp("small_tenants")
    return Tenants(folder, bundles, {"x": x.numpy()}, want, "output", export)


@pytest.fixture(scope="session")
def minilm_tenants(
    minilm_dir: Path,
    peft_minilm_adapter: Any,
    load_peft_minilm: Any,
    tokenize: Any,
    sst2_sentences: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Tenants:
    """MiniLM on real sentences with two of PEFT's adapters; the base has no head of its own."""
    import torch

    import fourierft_export as ff

    inputs = tokenize(sst2_sentences[:12])
    directories = {
        "one": peft_minilm_adapter(),
        "two": peft_minilm_adapter(7, random_loc_seed=99, n_frequency=300, scaling=110.0),
    }
    want = {}
    for name, directory in directories.items():
        with torch.no_grad():
            want[name] = load_peft_minilm(directory)(**inputs).logits.numpy()
    bundles = {name: ff.from_peft(path, minilm_dir) for name, path in directories.items()}

    def export(mode: str, path: Path) -> Any:
        given = bundles if mode == "bank" else bundles["one"]
        return ff.export_pretrained(minilm_dir, given, path, mode=mode)

    folder = tmp_path_factory.mktemp("minilm_tenants")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return Tenants(folder, bundles, arrays, want, "logits", export)
