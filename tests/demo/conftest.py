"""One short demo, made once: fewer epochs than a user gets, everything else the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fourierft_export.demo.run import DemoResult, run_demo


@dataclass(frozen=True)
class Made:
    """A demo's result, what it reported on its way, and whether it left torch's generator alone."""

    result: DemoResult
    reported: tuple[tuple[str, int, int], ...]
    generator_untouched: bool

    @property
    def folder(self) -> Path:
        return self.result.directory


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("demo") / "out"
    reported: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    result = run_demo(
        folder,
        seed=3,
        base_epochs=8,
        adapter_epochs=5,
        progress=lambda *step: reported.append(step),
    )
    return Made(result, tuple(reported), torch.equal(state, torch.get_rng_state()))
