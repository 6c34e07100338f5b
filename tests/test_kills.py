"""SIGKILL at random moments: a few here; `python tests/kill.py --rounds 100` does more of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kill import Forks, kill_verb, make_inputs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    made.close()


@pytest.mark.parametrize("verb", ["pack", "unpack", "merge", "recover", "apply", "apply-paired"])
def test_a_verb_survives_kills(forks: Forks, inputs: Path, verb: str) -> None:
    seen = kill_verb(forks, verb, inputs, rounds=12)
    assert seen["killed"] == 12
    assert seen["absent"] + seen["old"], seen
