"""Put a FourierFT adapter into ONNX files that other tools made.

    python samples/foreign_onnx/adapt.py [-o DIR]

torch's exporters and ONNX Runtime's quantisers write the files; apply needs only onnx and numpy.
Every adapted file is run and compared with the same model in torch.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor, nn

import fourierft_export as ff

SIZE = 64


class Block(nn.Module):
    """Attention with one head and no biases: all its weights have one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(SIZE, SIZE, bias=False)
        self.key = nn.Linear(SIZE, SIZE, bias=False)
        self.value = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return x + (scores / SIZE**0.5).softmax(-1) @ self.value(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Exact 8-bit products on CPUs without VNNI, where ONNX Runtime's own choice saturates.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Root mean square of the difference, as a share of the values' own."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def remove_names(source: Path, target: Path) -> None:
    """What some converters leave: weights and nodes without the names of the model's layers."""
    model = onnx.load(source)
    new = {weight.name: f"w{i}" for i, weight in enumerate(model.graph.initializer)}
    for weight in model.graph.initializer:
        weight.name = new[weight.name]
    for node in model.graph.node:
        node.name = ""
        del node.metadata_props[:]
        node.input[:] = [new.get(name, name) for name in node.input]
    onnx.save(model, target)


def make_files(model: nn.Module, x: Tensor, folder: Path) -> None:
    """The base as six tools would write it."""
    shapes = {"x": {0: "batch", 1: "tokens"}}
    common = {"input_names": ["x"], "output_names": ["y"], "external_data": False}
    torch.onnx.export(
        model, (x,), folder / "torchscript.onnx", dynamo=False, dynamic_axes=shapes, **common
    )
    torch.onnx.export(
        model, (x,), folder / "dynamo.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False,
        **common,
    )  # fmt: skip
    remove_names(folder / "torchscript.onnx", folder / "anonymous.onnx")
    onnx.save(
        onnx.load(folder / "torchscript.onnx"), folder / "external.onnx",
        save_as_external_data=True, location="external.onnx.data", size_threshold=0,
    )  # fmt: skip
    quantize_dynamic(folder / "torchscript.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)
    four_bits = MatMulNBitsQuantizer(onnx.load(folder / "torchscript.onnx"), block_size=32)
    four_bits.process()
    four_bits.model.save_model_to_file(str(folder / "int4.onnx"))


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(4, 6, SIZE)
    make_files(model, x, folder)
    plain = model(x).numpy()

    config = ff.FourierFTConfig(n_frequency=100, scaling=50.0, target_modules=["query", "value"])
    bundle = ff.capture(ff.inject(model, config))  # random coefficients stand for trained ones
    bundle.save(folder / "adapter.fourierft.safetensors", force=True)
    adapted = model(x).numpy()
    print(f"the adapter changes outputs by up to {np.abs(adapted - plain).max():.2f}")

    # Found by the names of nodes, by exporter's scopes, by content; weights inside or outside.
    for name in ("torchscript", "dynamo", "anonymous", "external"):
        for mode in ("merged", "unmerged"):
            out = folder / f"{name}.{mode}.onnx"
            ff.apply_onnx(folder / f"{name}.onnx", bundle, out, mode=mode, force=True)
            error = np.abs(run(out, x.numpy()) - adapted).max()
            print(f"{name:12}{mode:10} largest difference from torch {error:.1e}")

    # Quantised weights stay as they are; the adapter becomes a float branch.
    try:
        ff.apply_onnx(folder / "int8.onnx", bundle, folder / "refused.onnx", mode="merged")
    except ff.errors.FourierFTError as error:
        print("merged into int8: refused:", str(error).splitlines()[0])
    for name in ("int8", "int4"):
        out = folder / f"{name}.unmerged.onnx"
        ff.apply_onnx(folder / f"{name}.onnx", bundle, out, mode="unmerged", force=True)
        before = relative(run(folder / f"{name}.onnx", x.numpy()), plain)
        after = relative(run(out, x.numpy()), adapted)
        print(f"{name:12}unmerged   error of the base {before:.2%}, with the adapter {after:.2%}")

    # Names are gone, and an unbound bundle knows no weights: the error lists what could be meant.
    ff.to_peft(bundle, folder / "adapter", force=True)
    unbound = ff.from_peft(folder / "adapter")
    out = folder / "mapped.onnx"
    try:
        ff.apply_onnx(folder / "anonymous.onnx", unbound, out, force=True)
    except ff.errors.BaseMismatchError as error:
        print("without names:", error)
    mapping = {
        "blocks.0.query": "w0", "blocks.0.value": "w2",
        "blocks.1.query": "w3", "blocks.1.value": "w5",
    }  # fmt: skip
    ff.apply_onnx(folder / "anonymous.onnx", unbound, out, mapping=mapping, force=True)
    error = np.abs(run(out, x.numpy()) - adapted).max()
    print(f"mapped by hand: largest difference from torch {error:.1e}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # torch's exporter and the quantisers speak of themselves
    logging.getLogger().setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
