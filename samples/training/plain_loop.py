"""Train a FourierFT adapter in a plain torch loop, pack it, and load it into another model.

    python samples/training/plain_loop.py [-o DIR]

A small network learns scikit-learn's upright digits. Then its digits are inverted (black on white),
which it cannot read; an adapter of 3 KB on its frozen weights learns to. Nothing here is
special to this model: any module with nn.Linear layers works the same.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fourierft_export as ff


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 64) in 0..1 and labels, for training and for testing."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> None:
    """The plain loop: whatever parameters ask for gradients learn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batches = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=batches).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


def main(folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    inverted, test_inverted = 1 - images, 1 - test_images

    base = network()
    train(base, images, labels, epochs=15, lr=2e-3)
    base_weights = copy.deepcopy(base.state_dict())
    results = {
        "base, upright": accuracy(base, test_images, test_labels),
        "base, inverted": accuracy(base, test_inverted, test_labels),
    }

    config = ff.FourierFTConfig(
        n_frequency=150, scaling=100.0, target_modules="all-linear", init_weights=True
    )
    model = ff.inject(base, config, "inverted")
    train(model, inverted, labels, epochs=15, lr=2e-2)
    results["adapter, inverted"] = accuracy(model, test_inverted, test_labels)

    path = ff.capture(model, "inverted").save(folder / "inverted.fourierft.safetensors", force=True)
    results["bytes of the bundle"] = path.stat().st_size

    # Elsewhere: the same base, and the bundle.
    served = network()
    served.load_state_dict(base_weights)
    ff.attach(served, ff.Bundle.load(path))
    results["reloaded, inverted"] = accuracy(served, test_inverted, test_labels)
    ff.fuse(served)
    results["fused, inverted"] = accuracy(served, test_inverted, test_labels)
    ff.restore(served)
    ff.detach(served)
    results["detached, upright"] = accuracy(served, test_images, test_labels)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="folder to keep the bundle in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in main(folder).items():
            print(f"{name:22}{value:8.3f}" if "bytes" not in name else f"{name:22}{value:8}")
