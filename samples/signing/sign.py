"""Sign a bundle and a merged folder with OpenSSF model signing, and see what a change does.

    python samples/signing/sign.py [-o DIR]

It runs the commands of README.md. The base is two random matrices; no torch is needed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.numpy import save_file

import fourierft_export as ff

PEM = serialization.Encoding.PEM


def make_artifacts(folder: Path) -> tuple[Path, Path]:
    """A bundle, and the folder of a base with the bundle merged into it."""
    rng = np.random.default_rng(0)
    layers = ("encoder.query", "encoder.value")
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(exist_ok=True)
    weights = {f"{name}.weight": rng.normal(size=(64, 32)).astype(np.float32) for name in layers}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text("{}\n", "utf-8")
    spectra = {
        f"base_model.model.{name}.fourierft_spectrum": rng.normal(size=40).astype(np.float32)
        for name in layers
    }
    save_file(spectra, adapter / "adapter_model.safetensors")
    config = '{"peft_type": "FOURIERFT", "random_loc_seed": 777, "scaling": 150.0}\n'
    (adapter / "adapter_config.json").write_text(config, "utf-8")
    bundle = ff.from_peft(adapter, base).save(folder / "a.fourierft.safetensors", force=True)
    ff.merge_checkpoint(base, bundle, folder / "merged", force=True)
    return bundle, folder / "merged"


def make_keys(folder: Path) -> tuple[Path, Path]:
    """A private and a public key, as `openssl ecparam -name prime256v1 -genkey` makes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(PEM, form))
    return private, public


def model_signing(*words: object) -> bool:
    """Runs the command line of model-signing; returns whether it succeeded."""
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main(folder: Path) -> None:
    private, public = make_keys(folder)
    for artifact in make_artifacts(folder):
        signature = folder / f"{artifact.name}.sig"
        signed = model_signing(
            "sign", "key", artifact, "--private_key", private, "--signature", signature
        )
        check = ("verify", "key", artifact, "--signature", signature, "--public_key", public)
        print(f"{artifact.name}: signed {signed}, verified {model_signing(*check)}")
        file = artifact / "model.safetensors" if artifact.is_dir() else artifact
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit of the last value
        print(f"{artifact.name}: verified with one bit changed {model_signing(*check)}")
        file.write_bytes(good)
    report = ff.verify_merged(folder / "merged")
    print(f"verify merged: {report.ok}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
