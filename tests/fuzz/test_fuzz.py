"""Some mutants of each kind; `python tests/fuzz/run.py --minutes 10` opens more of them."""

from __future__ import annotations

import pytest

from tests.fuzz.run import fuzz


@pytest.mark.parametrize(
    ("kind", "cases"),
    [("bundle", 1500), ("peft", 300), ("index", 250), ("pool", 250), ("onnx", 200)],
)
def test_mutants_open_or_are_refused(kind: str, cases: int) -> None:
    found = fuzz(kind, seed=1, cases=cases, max_seconds=30)
    assert found.failures == {}
    outcomes = {outcome for _, outcome in found.outcomes}
    assert {"opened", "BadInputError"} <= outcomes
    assert found.outcomes.total() >= 0.9 * cases
