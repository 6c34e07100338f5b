"""What users see, pinned: JSON of the verbs, exit codes, bytes of files, node lists of graphs.

Each of `RECORDERS` has a golden file in tests/golden/contract, first written by version 0.1. After
a change that is meant, write them again, and read the difference before committing it:

    python tests/test_contract.py

The wording of notes and errors is not pinned. Numbers that depend on how a CPU rounds are replaced
by the word "measured". Merged weights are pinned byte by byte for layers of 4 x 4, whose cosines
are 0, 1 and -1: there every CPU gets the same sums.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

DATA = Path(__file__).resolve().parent / "data"
GOLDEN = Path(__file__).resolve().parent / "golden" / "contract"
MODES = ("merged", "unmerged", "swappable", "paired", "bank")
MEASURED = {
    "seconds", "memory_bytes", "disk_bytes", "difference", "allowed_abs", "allowed_rms",
    "resolution", "error", "residual", "uncertainty", "survival",
}  # fmt: skip


def run_verb(command: str) -> tuple[int, Any]:
    """Runs `fourierft-export COMMAND --json`: the exit code, and the object that it printed."""
    from fourierft_export.cli.main import run

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = run([*command.split(), "--json"])
    return code, json.loads(out.getvalue())


def output_of(command: str) -> Any:
    """The object that a verb prints when it succeeds, made stable."""
    code, found = run_verb(command)
    assert code == 0, found
    return stable(found)


def stable(value: Any, key: str = "") -> Any:
    """`value` without what differs between machines and versions; of notes, how many."""
    if key in MEASURED or key == "versions":
        return "measured" if key in MEASURED else "version"
    if key == "notes":
        return len(value)
    if isinstance(value, Mapping):
        return {name: stable(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [stable(one) for one in value]
    return value.replace(os.getcwd() + os.sep, "") if isinstance(value, str) else value


def hashes(path: str) -> dict[str, str]:
    """The sha256 of a file, or of every file in a folder, by name."""
    files = sorted(Path(path).iterdir()) if os.path.isdir(path) else [Path(path)]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def graph_of(path: str) -> dict[str, Any]:
    """Nodes, functions, inputs, outputs and initializers of an ONNX file, without their values."""
    model = onnx.load(path)

    def typed(name: str, dtype: int, shape: list[Any]) -> str:
        return f"{name} {TensorProto.DataType.Name(dtype)} {shape}"

    def values(stored: Any) -> list[str]:
        kinds = [(one.name, one.type.tensor_type) for one in stored]
        return [
            typed(name, kind.elem_type, [dim.dim_param or dim.dim_value for dim in kind.shape.dim])
            for name, kind in kinds
        ]

    def nodes(stored: Any) -> list[str]:
        return [f"{one.domain or 'onnx'}.{one.op_type} {one.name}".rstrip() for one in stored]

    weights = [typed(one.name, one.data_type, list(one.dims)) for one in model.graph.initializer]
    return {
        "nodes": nodes(model.graph.node),
        "functions": {one.name: nodes(one.node) for one in model.functions},
        "inputs": values(model.graph.input),
        "outputs": values(model.graph.output),
        "initializers": sorted(weights),
        "opsets": {one.domain or "onnx": one.version for one in model.opset_import},
        "metadata": sorted(one.key for one in model.metadata_props),
    }


def numbers(*shape: int, start: int = 0) -> np.ndarray:
    """Multiples of 1/64 between -1 and 1, as float32."""
    count = np.arange(start, start + int(np.prod(shape, dtype=int)))
    return ((count * 37 % 127 - 63) / 64).astype(np.float32).reshape(shape)


def write_adapter(folder: str, layers: list[str], n: int, *saved: str, **more: Any) -> None:
    """Writes a PEFT adapter with `n` coefficients a layer; `more` are fields of its config.

    Each of `saved` is the name of a dense tensor and, after a space, its shape as in 3x8.
    """
    published = DATA / "published" / "llama-3.2-3B-default.adapter_config.json"
    config = json.loads(published.read_text("utf-8")) | {"n_frequency": n, "scaling": 8.0}
    config |= {"target_modules": sorted({name.rpartition(".")[2] for name in layers})} | more
    spectra = [f"{name}.fourierft_spectrum {n}" for name in layers]
    tensors = {}
    for i, (name, shape) in enumerate(text.split() for text in [*spectra, *saved]):
        tensors[f"base_model.model.{name}"] = numbers(*map(int, shape.split("x")), start=9 * i)
    os.mkdir(folder)
    Path(folder, "adapter_config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})


EXACT = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


def write_exact_base(folder: str) -> None:
    """Writes a checkpoint in two shards whose adapted weights are 4 x 4."""
    os.mkdir(folder)
    index: dict[str, str] = {}
    for i in range(2):
        tensors = {f"{name}.weight": numbers(4, 4, start=i) for name in EXACT if f".{i}." in name}
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = numbers(6, 4, start=i)
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(tensors, f"{folder}/{file}", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    Path(folder, "model.safetensors.index.json").write_text(text, "utf-8")


def write_vision_base(folder: str) -> None:
    """Writes a vision transformer of one layer."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "intermediate_size": 12, "image_size": 8, "patch_size": 4}
    config = ViTConfig(num_hidden_layers=1, num_attention_heads=2, num_labels=3, **sizes)
    model = ViTForImageClassification(config)
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if "layernorm" not in name:
            tensor.copy_(torch.from_numpy(numbers(*tensor.shape, start=i) / 4))
    model.save_pretrained(folder)


ENDS = (("x", 4), ("y", 2))


def write_graph(path: str, *, quantised: bool = False) -> None:
    """Writes an ONNX file as TorchScript's exporter does: scopes as names, anonymous weights."""
    tensors = {"first.weight": numbers(8, 4), "first.bias": numbers(8)}
    tensors |= {"onnx::MatMul_12": numbers(8, 8, start=3), "second.bias": numbers(8, start=5)}
    tensors["score.weight"] = numbers(2, 8)
    node = helper.make_node
    nodes = [
        node("Gemm", ["x", "first.weight", "first.bias"], ["h"], name="/first/Gemm", transB=1),
        node("Relu", ["h"], ["r"], name="/Relu"),
        node("MatMul", ["r", "onnx::MatMul_12"], ["p"], name="/second/MatMul"),
        node("Add", ["second.bias", "p"], ["s"], name="/second/Add"),
        node("Gemm", ["s", "score.weight"], ["y"], name="/score/Gemm", transB=1),
    ]
    if quantised:
        tensors["onnx::MatMul_12"] = (numbers(8, 8, start=3) * 64).astype(np.int8)
        tensors |= {"scale": np.full(1, 1 / 64, np.float32), "zero": np.zeros(1, np.int8)}
        nodes[2].input[1] = "w"
        inputs = ["onnx::MatMul_12", "scale", "zero"]
        nodes.insert(0, node("DequantizeLinear", inputs, ["w"], name="/second/DequantizeLinear"))
    ends = [helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in ENDS]
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "main_graph", ends[:1], ends[1:], stored)
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[opset]), path)


@cache
def write_inputs() -> None:
    """Writes bases, adapters, graphs and arrays into the current folder."""
    shutil.copytree(DATA / "stories260k", "stories")
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(5)]
    write_adapter("stories_peft", [*layers, "model.layers.0.self_attn.v_proj"], 100)
    write_exact_base("exact")
    write_adapter("exact_peft", EXACT, 12, random_loc_seed=12)
    write_adapter("other_peft", EXACT, 9, random_loc_seed=9)
    write_vision_base("vision")
    layers = ["vit.layers.0.attention.q_proj", "vit.layers.0.mlp.fc1"]
    head = ["classifier.weight 3x8", "classifier.bias 3"]
    write_adapter("vision_peft", layers, 20, *head, modules_to_save=["classifier"])
    head = ["score.weight 2x8"]
    write_adapter("graph_peft", ["first", "second"], 10, *head, modules_to_save=["score"])
    write_graph("graph.onnx")
    write_graph("quantised.onnx", quantised=True)
    np.savez("images.npz", pixel_values=numbers(5, 3, 8, 8))


@cache
def record_bundles() -> dict[str, Any]:
    """pack, unpack and inspect, and the bytes of what they write."""
    write_inputs()
    found = {}
    for name in ("stories", "exact", "other", "vision", "graph"):
        base = {"graph": "", "other": "--base exact"}.get(name, f"--base {name}")
        found[f"pack {name}"] = output_of(f"pack {name}_peft {base} -o {name}.bundle")
        found[f"inspect {name}"] = output_of(f"inspect {name}.bundle")
        found[f"unpack {name}"] = output_of(f"unpack {name}.bundle -o {name}_unpacked")
        found[f"bytes {name}"] = hashes(f"{name}.bundle") | hashes(f"{name}_unpacked")
    paths = "stories exact vision_peft vision_peft/adapter_config.json graph.onnx"
    found |= {f"inspect {path}": output_of(f"inspect {path}") for path in paths.split()}
    return found


@cache
def record_merges() -> dict[str, Any]:
    """merge, verify, recover from a checkpoint, and the bytes of merged weights."""
    record_bundles()
    found = {}
    both = "merge --base exact --bundle exact.bundle --bundle other.bundle --weight 1 --weight 0.5"
    found["dry run"] = output_of(f"{both} -o none --dry-run")
    assert not os.path.exists("none")
    for dtype in ("keep", "bfloat16", "float16"):
        out = f"exact_{dtype}"
        found[f"merge {dtype}"] = output_of(f"{both} --dtype {dtype} -o {out}")
        found[f"bytes {dtype}"] = hashes(out)
        found[f"bytes {dtype}"].pop("manifest.json")  # it holds versions and measured numbers
        manifest = json.loads(Path(out, "manifest.json").read_text("utf-8"))
        found[f"manifest {dtype}"] = stable(manifest)
        found[f"verify {dtype}"] = output_of(f"verify {out}")
        found[f"inspect {dtype}"] = output_of(f"inspect {out}")
    vision = "merge --base vision --bundle vision.bundle --label a --label b --label c"
    found["merge vision"] = merged = output_of(f"{vision} -o vision_merged")
    merged["merge"]["shards"] = "measured"  # sums of cosines, which CPUs round as they like
    output_of("merge --base exact --bundle exact.bundle -o exact_alone")
    recover = "recover --base exact --merged exact_alone --force -o back.bundle"
    by_hand = "--seed 12 --n-frequency 12 --scaling 8 --targets q_proj --targets v_proj"
    found["recover like"] = output_of(f"{recover} --like exact.bundle")
    found["recover by hand"] = output_of(f"{recover} {by_hand}")
    return found


def record_modes(name: str, verb: str, modes: tuple[str, ...]) -> dict[str, Any]:
    """Runs export or apply in each mode: what it prints, its graphs, and the bundle recovered."""
    found = {}
    for mode in modes:
        out, expander = f"{name}_{mode}.onnx", f"{name}_{mode}.expand.onnx"
        found[f"made {out}"] = made = output_of(f"{verb} --mode {mode} -o {out}")
        found[f"inspect {out}"] = inspected = output_of(f"inspect {out}")
        made[verb.split()[0]]["bytes"] = inspected["inspect"]["bytes"] = "measured"
        paired = os.path.exists(expander)
        found |= {f"graph {file}": graph_of(file) for file in [out, expander][: 1 + paired]}
        if mode != "merged":
            holder = expander if paired else out
            found[f"recover {out}"] = output_of(f"recover --onnx {holder} -o {out}.bundle")
            found[f"bytes {out}.bundle"] = hashes(f"{out}.bundle")
    return found


@cache
def record_exports() -> dict[str, Any]:
    """export in every mode."""
    record_bundles()
    return record_modes("vision", "export --base vision --bundle vision.bundle", MODES)


@cache
def record_applies() -> dict[str, Any]:
    """apply in every mode, on float weights and on quantised ones."""
    record_bundles()
    verb = "apply --bundle graph.bundle --onnx "
    branches = ("unmerged", "swappable", "bank")
    quantised = record_modes("quantised", verb + "quantised.onnx", branches)
    return record_modes("graph", verb + "graph.onnx", MODES) | quantised


@cache
def record_validation() -> dict[str, Any]:
    """validate, on everything that export and merge made."""
    record_merges()
    record_exports()
    files = " ".join(f"--onnx vision_{mode}.onnx" for mode in MODES)
    vision = "--base vision --bundle vision.bundle --merged vision_merged --inputs images.npz"
    return {"validate": output_of(f"validate {vision} {files}")}


@cache
def record_failures() -> dict[str, Any]:
    """Exit code and kind of error of each command in the golden file."""
    record_merges()
    whole = Path("exact.bundle").read_bytes()
    Path("empty.bundle").touch()
    Path("short.bundle").write_bytes(whole[:-1])
    Path("damaged.bundle").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    Path("pickle.bundle").write_bytes(b"\x80\x04K\x01.")
    write_adapter("too_many", EXACT, 17)
    write_adapter("not_finite", EXACT, 5)
    spectra = load_file("not_finite/adapter_model.safetensors")
    save_file({k: v + np.inf for k, v in spectra.items()}, "not_finite/adapter_model.safetensors")
    for name in ("escaping", "changed"):
        shutil.copytree("exact", f"exact_{name}")
    index = Path("exact_escaping/model.safetensors.index.json")
    index.write_text(index.read_text("utf-8").replace("model-00001", "../model-00001"), "utf-8")
    shard = "exact_changed/model-00001-of-00002.safetensors"
    save_file({name: array * 2 for name, array in load_file(shard).items()}, shard)
    shutil.copytree("exact_keep", "exact_tampered")
    Path("exact_tampered/config.json").write_text("{}", "utf-8")
    found = {}
    for command in json.loads((GOLDEN / "failures.json").read_text("utf-8")):
        code, printed = run_verb(command)
        assert not os.path.lexists("absent"), command
        assert (printed["ok"], printed["error"]["code"]) == (False, code)
        assert printed["error"].keys() >= {"where", "expected", "found", "remedy", "offenders"}
        found[command] = f"{code} {printed['error']['kind']}"
    return found


RECORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "bundles": record_bundles, "merges": record_merges, "exports": record_exports,
    "applies": record_applies, "validation": record_validation, "failures": record_failures,
}  # fmt: skip


@pytest.fixture(scope="module")
def work_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.mark.parametrize("section", RECORDERS)
def test_what_users_see(section: str, work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work_folder)
    found = RECORDERS[section]()
    golden = json.loads((GOLDEN / f"{section}.json").read_text("utf-8"))
    for name, expected in golden.items():
        assert found[name] == expected, name
    assert found.keys() == golden.keys()


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    for section, record in RECORDERS.items():
        text = json.dumps(record(), indent=1, ensure_ascii=False) + "\n"
        (GOLDEN / f"{section}.json").write_text(text, "utf-8")
