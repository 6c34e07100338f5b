"""Adapters with accelerate and a loop of one's own: states of kilobytes that resume exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError, FileAccessError, UsageError

CONFIG = ff.FourierFTConfig(
    n_frequency=25, scaling=30.0, target_modules=["0"], modules_to_save=["3"]
)
BUNDLE = "default.fourierft.safetensors"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate's settings are the process's: leave none behind."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 300), nn.ReLU(), nn.Dropout(0.2), nn.Linear(300, 4))


class Run:
    """A model, an optimizer and data, prepared as accelerate's guide does it."""

    def __init__(self, config: Any = CONFIG, seed: int = 0, precision: str = "no") -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = network(seed)
        torch.manual_seed(3)
        ff.inject(model, config)
        optimizer = torch.optim.AdamW(ff.parameter_groups(model, learning_rate=0.1))
        x = torch.rand((24, 16), generator=torch.Generator().manual_seed(2))
        loader = DataLoader(TensorDataset(x, x[:, :4].argmax(-1)), batch_size=8)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)

    def steps(self) -> list[float]:
        """One pass over the data: three losses."""
        found = []
        for x, labels in self.loader:
            loss = nn.functional.cross_entropy(self.model(x), labels)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(loss.item())
        return found

    def bundle(self) -> ff.Bundle:
        return ff.capture(self.accelerator.unwrap_model(self.model))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_state_is_the_adapter_and_goes_on_exactly(precision: str, tmp_path: Path) -> None:
    run = Run(precision=precision)
    ff.save_bundles(run.accelerator)
    first = run.steps()
    run.accelerator.save_state(str(tmp_path / "state"))
    stored = run.bundle()
    rest = run.steps()
    assert not np.allclose(first, rest)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "state").iterdir()}
    assert BUNDLE in sizes
    assert not [name for name in sizes if name.startswith(("model", "pytorch_model"))]
    learning = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert sizes[BUNDLE] < 4 * learning + 1500 < 4 * 16 * 300
    assert ff.Bundle.load(tmp_path / "state" / BUNDLE).to_bytes() == stored.to_bytes()

    again = Run(precision=precision)
    ff.save_bundles(again.accelerator)
    again.steps()  # so that it holds other numbers, and an optimizer with a state
    again.steps()
    kept = [id(p) for p in again.model.parameters()]
    again.accelerator.load_state(str(tmp_path / "state"))
    assert [id(p) for p in again.model.parameters()] == kept
    assert again.bundle().to_bytes() == stored.to_bytes()
    assert again.steps() == rest
    assert again.bundle().to_bytes() == run.bundle().to_bytes()


def test_models_without_the_adapter_are_saved_as_ever(tmp_path: Path) -> None:
    run = Run()
    registered = ff.save_bundles(run.accelerator)
    teacher = run.accelerator.prepare(nn.Linear(2, 2))
    before = teacher.weight.clone()
    run.accelerator.save_state(str(tmp_path / "both"))
    assert (tmp_path / "both" / "model.safetensors").stat().st_size < 200
    with torch.no_grad():
        teacher.weight.zero_()
    run.accelerator.load_state(str(tmp_path / "both"))
    assert torch.equal(teacher.weight, before)
    registered.remove()
    run.accelerator.save_state(str(tmp_path / "whole"))
    assert not (tmp_path / "whole" / BUNDLE).exists()
    assert (tmp_path / "whole" / "model.safetensors").stat().st_size > 4 * 16 * 300


def test_two_models_with_an_adapter_each(tmp_path: Path) -> None:
    run = Run()
    torch.manual_seed(7)
    other = ff.inject(
        nn.Sequential(nn.Linear(6, 5)), ff.FourierFTConfig(8, target_modules=["0"]), "b"
    )
    run.accelerator.prepare(other)
    run.accelerator.prepare(nn.Linear(2, 2))
    ff.save_bundles(run.accelerator)
    ff.save_bundles(run.accelerator, "b")
    stored = [run.bundle().to_bytes(), ff.capture(other, "b").to_bytes()]
    run.accelerator.save_state(str(tmp_path / "state"))
    assert (tmp_path / "state" / "model.safetensors").stat().st_size < 200  # the plain one
    run.steps()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    run.accelerator.load_state(str(tmp_path / "state"))
    assert [run.bundle().to_bytes(), ff.capture(other, "b").to_bytes()] == stored


def test_a_state_that_would_lose_something_is_not_written(tmp_path: Path) -> None:
    run = Run()
    ff.save_bundles(run.accelerator)
    run.model[0].base_layer.bias.requires_grad_(True)
    with pytest.raises(UsageError) as caught:
        run.accelerator.save_state(str(tmp_path))
    assert caught.value.offenders == ("0.base_layer.bias",)
    second = Run()
    run.accelerator._models.append(second.model)
    with pytest.raises(UsageError, match="one model with an adapter 'default', found 2"):
        run.accelerator.save_state(str(tmp_path))


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    run = Run()
    ff.save_bundles(run.accelerator)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileAccessError):
        run.accelerator.load_state(str(tmp_path / "empty"))
    run.accelerator.save_state(str(tmp_path / "state"))
    other = Run(seed=9)
    ff.save_bundles(other.accelerator)
    before = other.bundle().to_bytes()
    with pytest.raises(BaseMismatchError) as caught:
        other.accelerator.load_state(str(tmp_path / "state"))
    assert "base: other weights" in caught.value.summary or caught.value.offenders
    assert other.bundle().to_bytes() == before
