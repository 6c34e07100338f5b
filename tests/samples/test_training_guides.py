"""The guides that train: a file of their own, so that another worker can run them meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.samples.test_guides import GUIDES, check_guide


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", [name for name in GUIDES if "training" in name])
def test_guide(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    check_guide(program, tmp_path, monkeypatch, capsys)
