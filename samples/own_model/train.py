"""FourierFT adapters on a torch model of one's own: train two, save, serve, export.

    python samples/own_model/train.py [-o DIR]

A small network reads scikit-learn's upright digits. Two adapters of about 3 KB teach its frozen
weights to read inverted and rotated ones. The model is nothing special: any module that has
nn.Linear layers (or GPT-2's Conv1D) works the same way.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

import fourierft_export as ff


class Reader(nn.Module):
    """8 x 8 pixels as a vector of 64 numbers -> scores of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 128)
        self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))
        self.head = nn.Linear(128, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = relu(self.embed(pixels))
        for block in self.blocks:
            hidden = hidden + relu(block(hidden))
        return self.head(hidden)


def fit(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """The usual loop: `inject` left only the adapter's parameters with requires_grad."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


def rotate(images: Tensor) -> Tensor:
    return images.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    train, test = torch.randperm(len(labels)).split((1400, 397))
    seen_by = {"inverted": 1 - images, "rotated": rotate(images)}

    model = Reader()
    fit(model, images[train], labels[train], epochs=15, rate=2e-3)
    base = copy.deepcopy(model.state_dict())  # yours would come from a file
    torch.save(base, folder / "base.pt")
    print(f"base on upright digits      {accuracy(model, images[test], labels[test]):6.1%}")

    # Train: one adapter at a time; the base stays frozen.
    config = ff.FourierFTConfig(
        n_frequency=150, scaling=100.0, target_modules="all-linear", init_weights=True
    )
    for name, pixels in seen_by.items():
        before = accuracy(model, pixels[test], labels[test])
        ff.inject(model, config, name)
        fit(model, pixels[train], labels[train], epochs=15, rate=2e-2)
        path = ff.capture(model, name).save(folder / f"{name}.fourierft.safetensors", force=True)
        after = accuracy(model, pixels[test], labels[test])
        print(f"{name + ' digits':18}{before:6.1%} -> {after:6.1%}   {path.stat().st_size:,} bytes")
        ff.detach(model)  # the original modules again

    # Serve, elsewhere: the base and the two files. Row i of a batch uses adapter names[i].
    served = Reader()
    served.load_state_dict(base)
    for name in seen_by:
        ff.attach(served, folder / f"{name}.fourierft.safetensors", name)
    rows = test[:3]
    batch = torch.stack(
        [seen_by["inverted"][rows[0]], seen_by["rotated"][rows[1]], images[rows[2]]]
    )
    with torch.no_grad(), ff.route(served, ["inverted", "rotated", None]):
        print("one adapter per row:", served(batch).argmax(-1).tolist(), labels[rows].tolist())
    with ff.disabled(served):
        print(f"adapters disabled           {accuracy(served, images[test], labels[test]):6.1%}")

    # Fuse: one adapter merged into the weights in memory, then the base back bit for bit.
    ff.fuse(served, "rotated")
    fused = accuracy(served, seen_by["rotated"][test], labels[test])
    print(f"fused, rotated digits       {fused:6.1%}")
    ff.restore(served)

    # Export the active adapter, and compare ONNX Runtime with torch.
    ff.activate(served, "rotated")
    example = seen_by["rotated"][test]
    ff.export_onnx(
        served, (example,), folder / "rotated.onnx",
        mode="unmerged", dynamic_shapes={"pixels": {0: "batch"}}, force=True,
    )  # fmt: skip
    session = ort.InferenceSession(folder / "rotated.onnx", providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"pixels": example.numpy()})
    with torch.no_grad():
        difference = np.abs(scores - served(example).numpy()).max()
    print(f"ONNX Runtime against torch, largest difference {difference:.1e}")

    ff.detach(served)
    restored = all(torch.equal(value, base[name]) for name, value in served.state_dict().items())
    print("base weights after detach equal, bit for bit:", restored)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
