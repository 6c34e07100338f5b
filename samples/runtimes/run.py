"""One small model in several modes, run by every runtime that is installed here.

    pip install openvino onnxruntime-genai     # both optional: without them ONNX Runtime alone runs
    python samples/runtimes/run.py [-o DIR]

Every result is compared with torch. README.md has the table of runtimes and modes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import fourierft_export as ff
from fourierft_export.cli.main import run as command

PROMPT = np.array([[1, 5, 9, 13, 17, 21]])
NEW_TOKENS = 20


def make_model_and_adapters(folder: Path) -> Path:
    """A causal model with random weights, and the bundles a and b; returns the base's folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for weight in (parameter for parameter in model.parameters() if parameter.ndim == 2):
        torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder / "base")
    adapter = ff.FourierFTConfig(n_frequency=60, scaling=60.0, target_modules=["q_proj", "v_proj"])
    for name in ("a", "b"):  # random coefficients stand for trained ones
        bundle = ff.capture(ff.inject(LlamaForCausalLM.from_pretrained(folder / "base"), adapter))
        bundle.bind(folder / "base").save(folder / f"{name}.fourierft.safetensors", force=True)
    return folder / "base"


@torch.no_grad()
def with_torch(base: Path, bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    """The adapted model's logits, and the tokens that it generates greedily."""
    model = ff.attach(LlamaForCausalLM.from_pretrained(base).eval(), ff.Bundle.load(bundle))
    logits, ids = model(input_ids=torch.from_numpy(PROMPT)).logits, torch.from_numpy(PROMPT)
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return logits.numpy(), ids[0].numpy()


def with_openvino(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import openvino

    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    known = {name for port in model.inputs for name in port.names}
    results = model({name: array for name, array in feeds.items() if name in known})
    return {next(iter(port.names)): np.array(results[port]) for port in model.outputs}


def with_onnxruntime(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    known = {value.name for value in session.get_inputs()}
    fed = {name: array for name, array in feeds.items() if name in known}
    return dict(zip(names, session.run(names, fed), strict=True))


def with_genai(folder: Path, adapter: Path | None, row: int | None) -> np.ndarray:
    """Tokens by genai's own loop, with an .onnx_adapter file or a row of a bank."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    params, length = og.GeneratorParams(model), PROMPT.size + NEW_TOKENS
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator, adapters = og.Generator(model, params), og.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "tenant")
        generator.set_active_adapter(adapters, "tenant")
    if row is not None:  # one id per row of the batch, and per beam
        generator.set_model_input("adapter_id", np.array([row], np.int64))
    generator.append_tokens(PROMPT.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return np.array(generator.get_sequence(0))


def pack(folder: Path, name: str, target: str, graph: Path, out: Path) -> Path:
    bundle = folder / f"{name}.fourierft.safetensors"
    words = ["pack", bundle, "--to", target, "--onnx", graph, "-o", out, "--force", "--json"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        failed = command([str(word) for word in words])
    if failed:
        raise SystemExit(printed.getvalue())
    return out


def main(folder: Path) -> None:
    base = make_model_and_adapters(folder)
    bundles = {name: folder / f"{name}.fourierft.safetensors" for name in ("a", "b")}
    wanted = {name: with_torch(base, bundle) for name, bundle in bundles.items()}
    inputs = {"input_ids": PROMPT, "attention_mask": np.ones_like(PROMPT)}
    modes: dict[str, dict[str, Any]] = {
        "unmerged": {"inline": True},
        "swappable": {"defaults": "required"},
        "paired": {"defaults": "required", "inline": True},
    }
    for mode, options in modes.items():
        path = folder / f"{mode}.onnx"
        ff.export_pretrained(base, bundles["a"], path, mode=mode, force=True, **options)
        for name in bundles if mode != "unmerged" else ["a"]:
            feeds: dict[str, np.ndarray] = dict(inputs)
            if mode != "unmerged":
                file = folder / f"{mode}.{name}.inputs.safetensors"
                feeds |= load_file(pack(folder, name, "onnx-inputs", path, file))
            for title, run in (("openvino", with_openvino), ("onnxruntime", with_onnxruntime)):
                if importlib.util.find_spec(title) is None:
                    print(f"{title:18} {mode:10} {name}  not installed")
                    continue
                weights = run(path.with_suffix(".expand.onnx"), feeds) if mode == "paired" else {}
                error = np.abs(run(path, feeds | weights)["logits"] - wanted[name][0]).max()
                print(f"{title:18} {mode:10} {name}  largest difference from torch {error:.1e}")

    for mode in ("swappable", "bank"):
        made = folder / f"genai-{mode}"
        made.mkdir(exist_ok=True)
        several = bundles if mode == "bank" else bundles["a"]
        graph = made / "model.onnx"
        ff.export_pretrained(base, several, graph, mode=mode, genai=True, force=True)
        for row, name in enumerate(bundles, 1):
            if importlib.util.find_spec("onnxruntime_genai") is None:
                print(f"onnxruntime-genai  {mode:10} {name}  not installed")
                continue
            if mode == "bank":
                tokens = with_genai(made, None, row)
            else:
                file = made / f"{name}.onnx_adapter"
                tokens = with_genai(made, pack(folder, name, "onnx-adapter", graph, file), None)
            same = int((tokens == wanted[name][1]).sum())
            print(
                f"onnxruntime-genai  {mode:10} {name}  {same} of {tokens.size} tokens are torch's"
            )


if __name__ == "__main__":
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
