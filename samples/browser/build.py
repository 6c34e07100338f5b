"""Builds the page that swaps adapters in the browser, as a folder of static files.

    npm install --ignore-scripts     # in this folder, once: onnxruntime-web, as pinned
    python build.py -o site          # a minute: trains the demo's model and adapters first
    python -m http.server -d site    # then open the address that it prints

The page needs no other server and no network. With `--demo DIR` the model and the adapters come
from a folder that `fourierft-export demo -o DIR` wrote.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fourierft_export as ff

HERE = Path(__file__).resolve().parent
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
TENANTS = ("inverted", "rotated")


def main(site: Path, demo: Path | None) -> None:
    runtime = HERE / "node_modules/onnxruntime-web/dist"
    if not runtime.is_dir():
        sys.exit(f"{runtime} is missing: run npm install --ignore-scripts in {HERE}")
    if demo is None:
        demo = site.with_name(f"{site.name}.demo")
        command("demo", "-o", demo, "--force")
    shutil.copytree(HERE / "page", site, dirs_exist_ok=True)
    for name in RUNTIME:
        shutil.copy(runtime / name, site / name)
    bundles = {name: demo / f"{name}.fourierft.safetensors" for name in TENANTS}
    graph = site / "model.onnx"
    # A browser cannot feed inputs that have defaults, so this file has none; functions that the
    # graph defines for itself are inlined, so that any runtime reads it.
    ff.export_pretrained(
        demo / "base", bundles["inverted"], graph,
        mode="swappable", defaults="required", inline=True, force=True,
    )  # fmt: skip
    tenants = []
    for name, bundle in bundles.items():
        inputs = site / f"{name}.inputs.safetensors"
        command("pack", bundle, "--to", "onnx-inputs", "--onnx", graph, "-o", inputs, "--force")
        tenants.append({"name": name, "file": inputs.name, "bundle_bytes": bundle.stat().st_size})
    (site / "tenants.json").write_text(json.dumps(tenants, indent=2) + "\n", "utf-8")
    print(f"{site}: model {graph.stat().st_size:,} bytes, {len(tenants)} adapters")
    print(f"python -m http.server -d {site}")


def command(*words: object) -> None:
    """Runs a command line of this toolkit."""
    subprocess.run([sys.executable, "-m", "fourierft_export", *map(str, words)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("site"), help="folder of the site")
    parser.add_argument("--demo", type=Path, help="a folder of `fourierft-export demo`")
    words = parser.parse_args()
    main(words.out, words.demo)
