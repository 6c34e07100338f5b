"""Two seconds of the fuzzer that anyone can run for long (tests/fuzz_bundle.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_mutated_bundles_open_or_are_refused() -> None:
    path = Path(__file__).parent.parent / "fuzz_bundle.py"
    spec = importlib.util.spec_from_file_location("fuzz_bundle", path)
    assert spec is not None and spec.loader is not None
    fuzzer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzzer)
    outcomes = fuzzer.fuzz(2.0, seed=1, max_seconds=30)
    assert outcomes["opened"] >= 2  # the good files themselves
    assert outcomes["BadInputError"] >= 10
    assert set(outcomes) <= {"opened", "opened, entries refused", "BadInputError"}
