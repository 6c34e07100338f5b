"""What the fuzzer opens: for each kind the good inputs, and the public doors that they go through.

An input is a folder: file name -> bytes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

import fourierft_export as ff
from fourierft_export.bundle.layer_templates import compress, expand
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.cli.main import run

from .mutations import (
    mutate_bundle,
    mutate_bytes,
    mutate_json_text,
    mutate_onnx,
    mutate_pool,
    mutate_safetensors,
)

Files = dict[str, bytes]
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MAX_ENTRIES_ELEMENTS = 1_000_000  # deriving the entries of very large layers takes seconds
MODES = ("merged", "unmerged", "swappable", "paired", "bank")
BUNDLE, POOL, PLAIN = "a.fourierft.safetensors", "a.fourierft.pool", "model.onnx"
EXPORTED, EXPANDER = "exported.onnx", "exported.expand.onnx"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
SHAPES = {"a": (8, 6), "b": (4, 8)}  # layer -> (out, in) of the base


class Case:
    """One input with its files on the disk, and where its output goes.

    Attributes:
        files: name -> bytes.
        shared: the folder with the good base and the good bundles.
        rng: for the options of a door.
    """

    def __init__(self, files: Files, place: Path, shared: Path, rng: random.Random) -> None:
        self.files, self.shared, self.rng, self._place = files, shared, rng, place

    def path(self, name: str = "") -> Path:
        """The path of a file, or of the folder; the files are written the first time."""
        folder = self._place / "in"
        if not folder.exists():
            folder.mkdir(parents=True)
            for one, data in self.files.items():
                (folder / one).write_bytes(data)
        return folder / name

    def out(self, name: str = "out") -> Path:
        """A path for an output, in a folder of its own."""
        (self._place / "out").mkdir(parents=True, exist_ok=True)
        return self._place / "out" / name

    def left_behind(self) -> list[str]:
        """What is on the disk that was not in the input."""
        found = list((self._place / "out").glob("*"))
        found += [path for path in (self._place / "in").glob("*") if path.name not in self.files]
        return [path.name for path in found]


class Door(NamedTuple):
    """One way to open an input: how often it is drawn, the file it needs, and the call."""

    name: str
    weight: int
    file: str
    open: Callable[[Case], object]


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind.

    Attributes:
        make: makes the good inputs; it also gets the folder with the shared files.
        doors: what they are opened with.
        seconds: of processor time that a case may take.
    """

    make: Callable[[Path], list[Files]]
    doors: tuple[Door, ...]
    seconds: float = 1.0


def mutate_files(files: Files, rng: random.Random, scratch: Path) -> Files:
    """The same files, with one of them changed, and now and then one removed or renamed."""
    out = dict(files)
    name = rng.choice(sorted(out))
    if len(out) > 1 and rng.random() < 0.03:
        data = out.pop(name)
        if rng.random() < 0.5:
            out[rng.choice(["x.safetensors", "config.json", "pytorch_model.bin"])] = data
        return out
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        out[name] = _mutate_file(name, out[name], rng, scratch)
    return out


def _mutate_file(name: str, data: bytes, rng: random.Random, scratch: Path) -> bytes:
    if name.endswith(".pool"):
        return mutate_pool(data, rng, scratch)
    if name.endswith(".onnx"):
        if rng.random() < 0.1:
            return mutate_bytes(data, rng)
        try:
            model = onnx.ModelProto.FromString(data)
            mutate_onnx(model, rng)
        except DecodeError:  # mutated before, or nested too deep
            return mutate_bytes(data, rng)
        return bytes(model.SerializeToString())
    for suffix, change in (
        (".fourierft.safetensors", mutate_bundle),
        (".safetensors", mutate_safetensors),
        (".json", mutate_json_text),
    ):
        if name.endswith(suffix):
            try:
                return change(data, rng)
            except (ValueError, LookupError, TypeError, RecursionError):  # mutated before
                break
    return mutate_bytes(data, rng)


def call_verb(*words: object) -> None:
    """Runs a verb in this process; checks its exit code and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, words)])
    lines = (out.getvalue() + err.getvalue()).splitlines()
    if code not in (0, 2, 3, 4, 6):
        raise AssertionError(f"exit code {code}: {err.getvalue()}")
    if not all(line.isprintable() for line in lines):
        raise AssertionError(f"what a terminal does not show as it is: {lines}")
    if code == 0:
        return
    said = err.getvalue().splitlines()
    if not said or not said[0].startswith("error: ") or len(said) > 21:
        raise AssertionError(f"no summary line, or too much: {said[:30]}")
    if "--json" in words and json.loads(out.getvalue())["ok"]:
        raise AssertionError("a failure that says ok")
    raise VerbRefusedError(code)


class VerbRefusedError(Exception):
    """A verb refused its input, as it should; the argument is its exit code."""


def inspect(case: Case, name: str = "") -> None:
    """`inspect`, for people or for programs."""
    call_verb("inspect", case.path(name), *(["--json"] if case.rng.random() < 0.5 else []))


# --- bundles -------------------------------------------------------------------------------------


def make_bundles(shared: Path) -> list[Files]:
    paths = [*sorted(GOLDEN.glob("*.fourierft.safetensors")), *sorted(shared.glob("*.fourierft.*"))]
    return [{BUNDLE: path.read_bytes()} for path in paths]


def open_bundle_bytes(case: Case) -> None:
    """A bundle must be the same once it is written again."""
    bundle = ff.Bundle.from_bytes(case.files[BUNDLE])
    again = bundle.to_bytes()
    if ff.Bundle.from_bytes(again).to_bytes() != again:
        raise AssertionError("a bundle that changes when it is written")
    names = [layer.name for layer in bundle.layers]
    if expand(compress(names)) != names:
        raise AssertionError("names that change when they are written")
    for layer in bundle.layers:
        if layer.shape is not None and prod(layer.shape) <= MAX_ENTRIES_ELEMENTS:
            bundle.entries(layer.name)


def unpack(case: Case) -> None:
    """What PEFT would read is the bundle."""
    bundle = ff.Bundle.load(case.path(BUNDLE))
    again = ff.from_peft(ff.to_peft(bundle, case.out()))
    _check_same(bundle, again)


def _check_same(bundle: ff.Bundle, again: ff.Bundle) -> None:
    for one, other in ((bundle.spectra, again.spectra), (bundle.saved, again.saved)):
        same = one.keys() == other.keys()
        if not same or any(one[name].tobytes() != other[name].tobytes() for name in one):
            raise AssertionError("tensors that change on the way to PEFT and back")


def merge(case: Case, *, base: str = "", bundle: str = "", dry_run: bool = True) -> None:
    """Merges a mutated bundle into the good base, or a good bundle into a mutated base."""
    base_path = case.path(base) if bundle == "" else case.shared / "base"
    bundle_path = case.shared / f"one.{BUNDLE[2:]}" if bundle == "" else case.path(bundle)
    out = case.out("out.safetensors" if base.endswith(".safetensors") else "out")
    ff.merge_checkpoint(base_path, bundle_path, out, dry_run=dry_run)
    if not dry_run:
        ff.verify_merged(out)


# --- PEFT folders --------------------------------------------------------------------------------


def make_adapters(shared: Path) -> list[Files]:
    made = []
    for path in sorted(shared.glob("*.fourierft.safetensors")):
        folder = ff.to_peft(path, shared / f"{path.name}.peft")
        made.append({name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})
    config = json.loads(made[0][CONFIG])
    changes = {"target_modules": ["a", "b"], "modules_to_save": ["head"], "bias": "fourier_only"}
    return [*made, {**made[0], CONFIG: json.dumps({**config, **changes}).encode()}]


def read_adapter(case: Case) -> None:
    """An adapter that is read gives a bundle, and the bundle this adapter."""
    bundle = ff.from_peft(case.path())
    if ff.Bundle.from_bytes(bundle.to_bytes()).to_bytes() != bundle.to_bytes():
        raise AssertionError("a bundle that changes when it is written")


def rewrite_adapter(case: Case) -> None:
    bundle = ff.from_peft(case.path())
    again = ff.from_peft(ff.to_peft(bundle, case.out()))
    _check_same(bundle, again)
    if dict(again.spec.peft_config) != dict(bundle.spec.peft_config):
        raise AssertionError("a config that changes on the way to PEFT and back")


# --- checkpoints ---------------------------------------------------------------------------------


def make_checkpoints(shared: Path) -> list[Files]:
    """The good base; transformers, which some mutants need, is imported before time is measured."""
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.conversion_mapping")
    return [{path.name: path.read_bytes() for path in sorted((shared / "base").iterdir())}]


def bind(case: Case) -> None:
    ff.Bundle.load(case.shared / f"unbound.{BUNDLE[2:]}").bind(case.path())


# --- pools ---------------------------------------------------------------------------------------


def make_pools(shared: Path) -> list[Files]:
    bundles = [ff.Bundle.load(shared / f"{name}.{BUNDLE[2:]}") for name in ("one", "two")]
    made = []
    for adapters in (dict(zip("uv", bundles, strict=True)), {"u": bundles[0]}):
        with ff.Pool.create(shared / POOL, adapters, force=True):
            made.append({POOL: (shared / POOL).read_bytes()})
    return made


def read_pool(case: Case) -> None:
    with ff.Pool(case.path(POOL)) as pool:
        if len(pool) < 100:
            for name in pool:
                ff.Bundle.from_bytes(pool[name].to_bytes())


def change_pool(case: Case) -> None:
    with ff.Pool(case.path(POOL)) as pool:
        bundle = ff.Bundle.load(case.shared / f"two.{BUNDLE[2:]}")
        pool.update({"w": bundle}, ["u"])
        if pool["w"].sha256 != bundle.sha256:
            raise AssertionError("another bundle than the one that was added")


# --- ONNX ----------------------------------------------------------------------------------------


def make_graphs(shared: Path) -> list[Files]:
    """Small graphs of every sort that `apply` knows, and what `apply` made of the first."""
    plain = [_float_graph(), _quantised_graph(), _function_graph(), _branched_graph()]
    made: list[Files] = [{PLAIN: model.SerializeToString()} for model in plain]
    made.append(_with_external_data(_float_graph(), shared))
    for mode in MODES:
        out = shared / mode / EXPORTED
        out.parent.mkdir()
        (shared / PLAIN).write_bytes(plain[0].SerializeToString())
        ff.apply_onnx(shared / PLAIN, shared / f"one.{BUNDLE[2:]}", out, mode=mode)
        made.append({path.name: path.read_bytes() for path in sorted(out.parent.iterdir())})
    return made


def _weights() -> dict[str, np.ndarray]:
    """The base: two layers with biases, and a head."""
    rng, out = np.random.default_rng(0), {}
    for name, shape in {**SHAPES, "head": (3, 4)}.items():
        out[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        out[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    return out


def _model(
    nodes: list[Any], constants: Mapping[str, np.ndarray], functions: list[Any] | None = None
) -> Any:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opsets = [helper.make_opsetid(domain, n) for domain, n in (("", 18), ("com.microsoft", 1))]
    if functions:
        opsets.append(helper.make_opsetid("own", 1))
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions or [])


_HEAD = [
    helper.make_node("Relu", ["b"], ["r"]),
    helper.make_node("Gemm", ["r", "head.weight", "head.bias"], ["y"], "/head/Gemm", transB=1),
]


def _float_graph() -> Any:
    weights = _weights()
    constants = {**weights, "a.weight": np.ascontiguousarray(weights["a.weight"].T)}
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["ax"], "/a/MatMul"),
        helper.make_node("Add", ["ax", "a.bias"], ["ay"], "/a/Add"),
        helper.make_node("Tanh", ["ay"], ["t"]),
        helper.make_node("Gemm", ["t", "b.weight", "b.bias"], ["b"], "/b/Gemm", transB=1),
    ]
    return _model([*nodes, *_HEAD], constants)


def _quantised_graph() -> Any:
    """Layer a as int8 behind DequantizeLinear, layer b as MatMulNBits."""
    weights, rng = _weights(), np.random.default_rng(1)
    constants = {
        "a.weight": rng.integers(-9, 9, (6, 8), np.int8),
        "a.scale": np.float32(0.1),
        "b.q": rng.integers(0, 255, (4, 1, 8), np.uint8),
        "b.scale": np.full((4, 1), 0.1, np.float32),
        **{name: value for name, value in weights.items() if name[:2] not in ("a.", "b.")},
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["a.weight", "a.scale"], ["aw"], "/a/Dequantize"),
        helper.make_node("MatMul", ["x", "aw"], ["ay"], "/a/MatMul"),
        helper.make_node(
            "MatMulNBits", ["ay", "b.q", "b.scale"], ["b"], "/b/MatMul", domain="com.microsoft",
            K=8, N=4, bits=4, block_size=16,
        ),
    ]  # fmt: skip
    return _model([*nodes, *_HEAD], constants)


def _function_graph() -> Any:
    """Layer a inside a function that holds its weight, layer b by an Einsum."""
    weights = _weights()
    opset = [helper.make_opsetid("", 18)]
    value = numpy_helper.from_array(np.ascontiguousarray(weights["a.weight"].T), "a.weight")
    body = [
        helper.make_node("Constant", [], ["a.weight"], value=value),
        helper.make_node("MatMul", ["i", "a.weight"], ["o"], "/a/MatMul"),
    ]
    function = helper.make_function("own", "layer", ["i"], ["o"], body, opset)
    nodes = [
        helper.make_node("layer", ["x"], ["ay"], "/a/layer", domain="own"),
        helper.make_node("Einsum", ["ay", "b.weight"], ["b"], "/b/Einsum", equation="xi,oi->xo"),
    ]
    kept = {name: value for name, value in weights.items() if not name.startswith("a.")}
    return _model([*nodes, *_HEAD], kept, [function])


def _branched_graph() -> Any:
    """Layer a within a branch of an If; sizes computed by Shape, Gather and Reshape before b."""
    weights = _weights()
    constants = {
        **weights,
        "a.weight": np.ascontiguousarray(weights["a.weight"].T),
        "yes": np.array(True),
        "zero": np.array([0], np.int64),
        "eight": np.array([8], np.int64),
    }
    made = helper.make_tensor_value_info("branch", TensorProto.FLOAT, None)
    product = helper.make_node("MatMul", ["x", "a.weight"], ["branch"], "/a/MatMul")
    then = helper.make_graph([product], "then", [], [made])
    nodes = [
        helper.make_node("If", ["yes"], ["ay"], "/a/If", then_branch=then, else_branch=then),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["rows"]),
        helper.make_node("Concat", ["rows", "eight"], ["shape"], axis=0),
        helper.make_node("Reshape", ["ay", "shape"], ["t"]),
        helper.make_node("Transpose", ["b.weight"], ["bt"], perm=[1, 0]),
        helper.make_node("MatMul", ["t", "bt"], ["b"], "/b/MatMul"),
    ]
    return _model([*nodes, *_HEAD], constants)


def _with_external_data(model: Any, shared: Path) -> Files:
    path = shared / "external" / PLAIN
    path.parent.mkdir()
    onnx.save_model(
        model, path, save_as_external_data=True, location="model.data", size_threshold=1
    )
    return {one.name: one.read_bytes() for one in sorted(path.parent.iterdir())}


def apply(case: Case, mode: str, name: str = PLAIN) -> None:
    """Applies a good bundle to a mutated graph; what is written holds that bundle."""
    rng = case.rng
    bundle = case.shared / f"{rng.choice(['one', 'two', 'unbound'])}.{BUNDLE[2:]}"
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        options["mapping"] = {"a": "a.weight"}
    if rng.random() < 0.2:
        options["base"] = case.shared / "base"
    if rng.random() < 0.1:
        options["opset"] = rng.choice([13, 19, 21])
    for option in ("inline", "partial", "allow_base_mismatch", "allow_links"):
        if rng.random() < 0.2:
            options[option] = True
    out = case.out("out.onnx")
    report = ff.apply_onnx(case.path(name), bundle, out, mode=mode, **options)
    if mode in ("unmerged", "swappable", "bank") and not report.notes:
        (found,) = ff.recover_onnx(out).values()
        given = ff.Bundle.load(bundle)
        if any(found.spectra[n].tobytes() != s.tobytes() for n, s in given.spectra.items()):
            raise AssertionError("another adapter in the file than the one applied")


def open_session(case: Case) -> None:
    """Opens an exported file for use; a model is a program, so it is not run."""
    session = ff.AdapterSession(case.path(EXPORTED))
    session.prepare(None) if session.mode not in ("merged", "unmerged") else None
    if session.mode in ("swappable", "paired", "bank"):
        session.load("mine", case.shared / f"two.{BUNDLE[2:]}")
        session.prepare("mine")


def make_inputs(case: Case) -> None:
    """The adapter's inputs for an exported graph as a file."""
    bundle, out = case.shared / f"two.{BUNDLE[2:]}", case.out("a.safetensors")
    call_verb("pack", bundle, "--to", "onnx-inputs", "--onnx", case.path(EXPORTED), "-o", out)


# --- the table -----------------------------------------------------------------------------------


def write_shared(folder: Path) -> None:
    """The good base and the good bundles that mutated inputs meet."""
    rng, weights = np.random.default_rng(2), _weights()
    base = folder / "base"
    base.mkdir(parents=True)
    shards = [("a.weight", "a.bias"), ("b.weight", "b.bias", "head.weight", "head.bias")]
    home = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        (base / file).write_bytes(save({n: weights[n] for n in names}, {"format": "pt"}))
        home |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": 4 * sum(map(np.size, weights.values()))},
        "weight_map": home,
    }
    (base / INDEX).write_text(json.dumps(index))
    config = {"architectures": ["Own"], "model_type": "own", "torch_dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    for number, name in enumerate(("unbound", "one", "two")):
        layers = tuple(LayerSpec(layer, 5 + number) for layer in SHAPES)
        spectra = {one.name: rng.standard_normal(one.n_frequency) for one in layers}
        floats = {layer: array.astype(np.float32) for layer, array in spectra.items()}
        saved = {"head.weight": weights["head.weight"] + 1, "a.bias": weights["a.bias"] + 1}
        bundle = ff.Bundle.build(AdapterSpec(number, 9.0, layers), floats, saved)
        bundle = bundle if name == "unbound" else bundle.bind(base)
        bundle.save(folder / f"{name}.{BUNDLE[2:]}")


def remove(place: Path) -> None:
    """Deletes the files of a case."""
    shutil.rmtree(place, ignore_errors=True)


KINDS: dict[str, Kind] = {
    "bundle": Kind(
        make_bundles,
        (
            Door("from_bytes", 40, BUNDLE, open_bundle_bytes),
            Door("load and unpack", 1, BUNDLE, unpack),
            Door("merge", 1, BUNDLE, partial(merge, bundle=BUNDLE, dry_run=False)),
            Door("inspect", 1, BUNDLE, partial(inspect, name=BUNDLE)),
        ),
    ),
    "peft": Kind(
        make_adapters,
        (
            Door("from_peft", 8, "", read_adapter),
            Door("from_peft and to_peft", 2, "", rewrite_adapter),
            Door("merge --dry-run", 2, "", partial(merge, bundle=".")),
            Door("inspect", 1, "", inspect),
        ),
    ),
    "index": Kind(
        make_checkpoints,
        (
            Door("merge --dry-run", 6, "", merge),
            Door("merge", 1, "", partial(merge, dry_run=False)),
            Door("bind", 2, "", bind),
            Door("inspect", 1, "", inspect),
        ),
    ),
    "onnx": Kind(
        make_graphs,
        (
            *(Door(f"apply {mode}", 4, PLAIN, partial(apply, mode=mode)) for mode in MODES),
            Door("inspect", 2, PLAIN, partial(inspect, name=PLAIN)),
            Door("inspect", 2, EXPORTED, partial(inspect, name=EXPORTED)),
            Door("recover", 6, EXPORTED, lambda case: ff.recover_onnx(case.path(EXPORTED))),
            Door("AdapterSession", 6, EXPORTED, open_session),
            Door("pack --onnx", 2, EXPORTED, make_inputs),
            Door("apply", 2, EXPORTED, partial(apply, mode="merged", name=EXPORTED)),
        ),
        seconds=2.0,
    ),
    "pool": Kind(
        make_pools,
        (
            Door("Pool", 6, POOL, read_pool),
            Door("update", 2, POOL, change_pool),
            Door("inspect", 1, POOL, partial(inspect, name=POOL)),
        ),
    ),
}
