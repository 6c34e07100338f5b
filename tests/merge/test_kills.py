"""SIGKILL at random moments: the output is absent or complete, and the next run cleans up."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FilesOf = Callable[[Path], dict[str, bytes]]


def content(path: Path, files_of: FilesOf) -> dict[str, bytes]:
    return files_of(path) if path.is_dir() else {"": path.read_bytes()}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def survive(
    runner: Any, words: list[Any], out: Path, kills: int, files_of: FilesOf, seed: int
) -> dict[str, int]:
    """Kill a verb this many times at random moments; returns how often what was seen."""
    out.parent.mkdir()
    words = [*words, "-o", out]
    moments = random.Random(seed)
    times = []
    for _ in range(3):
        remove(out)
        started = time.perf_counter()
        assert runner.run(words) == 0
        times.append(time.perf_counter() - started)
    whole, took = content(out, files_of), min(times)
    seen = {"killed": 0, "complete": 0, "absent": 0, "left over": 0, "taken over": 0}
    fresh = True
    while seen["killed"] < kills:
        if fresh:
            remove(out)
        code = runner.run(words, kill_after=moments.uniform(0.1, 1) * took)
        assert code in (0, -signal.SIGKILL)
        seen["killed"] += code != 0
        if out.exists():
            assert content(out, files_of) == whole
            seen["complete"] += code != 0
            fresh = True
        else:
            assert code != 0
            seen["absent"] += 1
            seen["left over"] += any(".partial-" in p.name for p in out.parent.iterdir())
            fresh = False
            if seen["absent"] % 6 == 0:  # now and then the next run is left alone
                assert runner.run(words) == 0
                assert content(out, files_of) == whole
                assert [p for p in out.parent.iterdir() if ".partial-" in p.name] == []
                seen["taken over"] += 1
                fresh = True
    if not out.exists():
        assert runner.run(words) == 0
    assert content(out, files_of) == whole
    # Refused, since the output exists; what a killed run left goes all the same.
    assert runner.run(words) == 2
    assert [p for p in out.parent.iterdir() if ".partial-" in p.name] == []
    return seen


@pytest.mark.parametrize(
    "kills", [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_merge_survives_kills(
    runner: Any, tmp_path: Path, make_base: Any, make_bundle: Any, files_of: FilesOf, kills: int
) -> None:
    base = make_base(tmp_path / "base", shards=4, size=64)
    modules = [f"layers.{number}.q" for number in range(4)]
    bundle = make_bundle(base, modules, n_frequency=50).save(tmp_path / "b")
    words = ["merge", "--base", base, "--bundle", bundle]
    seen = survive(runner, words, tmp_path / "outputs" / "out", kills, files_of, seed=1)
    assert seen["killed"] >= kills
    assert seen["taken over"] and seen["left over"], seen


@pytest.mark.parametrize(
    "kills", [100, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_pack_survives_kills(
    runner: Any, tmp_path: Path, stories_adapter: Path, stories260k: Path, files_of: FilesOf,
    kills: int,
) -> None:  # fmt: skip
    out = tmp_path / "outputs" / "b.fourierft.safetensors"
    words = ["pack", stories_adapter, "--base", stories260k]
    seen = survive(runner, words, out, kills, files_of, seed=2)
    assert seen["killed"] >= kills
    assert seen["absent"], seen


def test_recover_survives_kills(
    runner: Any, tmp_path: Path, make_base: Any, make_bundle: Any, files_of: FilesOf
) -> None:
    base = make_base(tmp_path / "base", shards=2, size=64)
    bundle = make_bundle(base, ["layers.0.q"]).save(tmp_path / "b")
    assert runner.merge(base, bundle, tmp_path / "merged") == 0
    words = ["recover", "--base", base, "--merged", tmp_path / "merged", "--like", bundle]
    seen = survive(runner, words, tmp_path / "outputs" / "r", 100, files_of, seed=3)
    assert seen["killed"] >= 100
