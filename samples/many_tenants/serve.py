"""Three tenants' adapters on one base in ONNX Runtime, in all three modes that swap them.

    python samples/many_tenants/serve.py [-o DIR]

The base is a small BERT with random weights, and so are the adapters: any Hugging Face model and
bundles of it go the same way. The last lines come from swap.py, which does not import this toolkit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import fourierft_export as ff

# Adapters of one file may differ in everything: seed, coefficients per layer, scaling.
TENANTS = {
    "tenant-a": {"random_loc_seed": 1, "n_frequency": 300, "scaling": 50.0},
    "tenant-b": {"random_loc_seed": 2, "n_frequency": 100, "scaling": 90.0},
    "tenant-c": {"random_loc_seed": 1, "n_frequency": 300, "scaling": 20.0},
}
ROWS = ["tenant-a", "tenant-b", None, "tenant-c"]  # None is the base without an adapter


def make_base_and_bundles(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A classifier's directory, and a bundle per tenant with a head of its own."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        vocab_size=500, num_labels=3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    base, paths = folder / "base", {}
    model.save_pretrained(base)
    for name, fields in TENANTS.items():
        ff.inject(model, ff.FourierFTConfig(task_type="SEQ_CLS", **fields), name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "classifier" in key and parameter.requires_grad:
                    parameter.normal_()
        path = folder / f"{name}.fourierft.safetensors"
        paths[name] = ff.capture(model, name).save(path, force=True)
        ff.detach(model)
    return base, paths


def command(*words: object) -> str:
    """Runs a command line and returns what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main(folder: Path) -> None:
    base, bundles = make_base_and_bundles(folder)
    ids = np.random.default_rng(0).integers(1, 500, (len(ROWS), 16))
    inputs = {
        "input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids),
    }  # fmt: skip

    example = ff.Bundle.load(bundles["tenant-a"])
    logits = {}
    for mode in ("swappable", "paired", "bank"):
        # One adapter shows the shapes; its values are the default of the inputs.
        path = folder / f"{mode}.onnx"
        # node, web and OpenVINO need inputs without defaults; see README.md.
        defaults = "required" if mode == "paired" else "bundle"
        ff.export_pretrained(base, example, path, mode=mode, defaults=defaults, force=True)
        session = ff.AdapterSession(path)
        for name, bundle in bundles.items():
            session.load(name, bundle)  # refused if it belongs to another base
        # One name for the whole batch, or one per row.
        alone = session.run(inputs, adapter="tenant-a")["logits"]
        logits[mode] = session.run(inputs, adapter=ROWS)["logits"]
        assert np.allclose(alone[0], logits[mode][0], atol=1e-5)
        session.unload("tenant-c")
        print(f"{mode:10} {path.stat().st_size:>10,} bytes   loaded: {', '.join(session.adapters)}")
    for name, row in zip(ROWS, logits["bank"], strict=True):
        print(f"{name or 'base':10} logits {np.round(row, 4)}")
    for mode in ("paired", "bank"):
        print(f"{mode} against swappable: {np.abs(logits[mode] - logits['swappable']).max():.1e}")
    np.savez(folder / "served.npz", logits=logits["bank"], **inputs)

    # The same without this toolkit: write each adapter as a file of inputs, then run swap.py.
    swap = Path(__file__).with_name("swap.py")
    for mode, target, suffix in (
        ("swappable", "onnx-adapter", "onnx_adapter"),
        ("paired", "onnx-inputs", "inputs.safetensors"),
    ):
        graph, files = folder / f"{mode}.onnx", []
        for name in ("tenant-a", "tenant-b"):
            files.append(folder / f"{name}.{suffix}")
            command(
                "-m", "fourierft_export", "pack", bundles[name],
                "--to", target, "--onnx", graph, "-o", files[-1], "--force",
            )  # fmt: skip
        print(command(swap, *(["--paired"] if mode == "paired" else []), graph, *files), end="")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
