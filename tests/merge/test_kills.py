"""SIGKILL at random moments: the output is absent or complete, and the next run cleans up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fourierft_export.bundle.file import Bundle

FilesOf = Callable[[Path], dict[str, bytes]]
KILLS = 100


class Runner:
    """The command line in forks of one warm process, killed on demand."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        script = str(Path(__file__).parent / "fork_server.py")
        self._server = subprocess.Popen(
            [sys.executable, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=Path(__file__).parent.parent.parent,
        )

    def run(self, words: list[str], kill_after: float | None = None) -> int:
        """The exit code, negative for a signal."""
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps([words, kill_after]) + "\n")
        stdin.flush()
        return int(stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@pytest.fixture
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.close()


def content(path: Path, files_of: FilesOf) -> dict[str, bytes]:
    return files_of(path) if path.is_dir() else {"": path.read_bytes()}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def survive(
    runner: Runner, words: list[str], out: Path, kills: int, files_of: FilesOf, seed: int
) -> dict[str, int]:
    """Kill a verb this many times at random moments; says how often what was seen."""
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


def kill_merge(
    runner: Runner, tmp_path: Path, make_base: Callable[..., Path],
    make_bundle: Callable[..., Bundle], files_of: FilesOf, kills: int,
) -> dict[str, int]:  # fmt: skip
    base = make_base(tmp_path / "base", shards=5, size=256)
    modules = [f"layers.{number}.q" for number in range(5)]
    make_bundle(base, modules, n_frequency=100).save(tmp_path / "b")
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir()
    words = ["merge", "--base", str(base), "--bundle", str(tmp_path / "b"), "-o", str(out)]
    return survive(runner, words, out, kills, files_of, seed=1)


def kill_pack(
    runner: Runner, tmp_path: Path, adapter: Path, base: Path, files_of: FilesOf, kills: int
) -> dict[str, int]:
    out = tmp_path / "outputs" / "b.fourierft.safetensors"
    out.parent.mkdir()
    words = ["pack", str(adapter), "--base", str(base), "-o", str(out)]
    return survive(runner, words, out, kills, files_of, seed=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_merge_survives_a_hundred_kills(
    runner: Runner, tmp_path: Path, make_base: Callable[..., Path],
    make_bundle: Callable[..., Bundle], files_of: FilesOf,
) -> None:  # fmt: skip
    seen = kill_merge(runner, tmp_path, make_base, make_bundle, files_of, KILLS)
    assert seen["killed"] >= KILLS
    assert seen["taken over"] and seen["left over"], seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_pack_survives_a_hundred_kills(
    runner: Runner, tmp_path: Path, stories_adapter: Path, stories260k: Path, files_of: FilesOf
) -> None:
    seen = kill_pack(runner, tmp_path, stories_adapter, stories260k, files_of, KILLS)
    assert seen["killed"] >= KILLS
    assert seen["absent"], seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_merge_and_pack_survive_a_thousand_kills(
    runner: Runner, tmp_path: Path, make_base: Callable[..., Path], stories_adapter: Path,
    make_bundle: Callable[..., Bundle], stories260k: Path, files_of: FilesOf,
) -> None:  # fmt: skip
    for name in ("merge", "pack"):
        (tmp_path / name).mkdir()
    kill_merge(runner, tmp_path / "merge", make_base, make_bundle, files_of, 1000)
    kill_pack(runner, tmp_path / "pack", stories_adapter, stories260k, files_of, 1000)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_export_survives_kills(tmp_path: Path, stories_adapter: Path, stories260k: Path) -> None:
    out = tmp_path / "outputs" / "m.onnx"
    out.parent.mkdir()
    words = ["export", "--base", str(stories260k), "--bundle", str(stories_adapter), "-o", str(out)]
    command = [sys.executable, "-m", "fourierft_export", *words, "--mode", "merged"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    took = time.perf_counter() - started
    size = out.stat().st_size
    out.unlink()
    moments = random.Random(3)
    for _ in range(10):
        # The first half of such a run is spent on imports.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(took / 2, took))
        process.kill()
        process.wait()
        if out.exists():
            assert out.stat().st_size == size
            out.unlink()
    subprocess.run(command, check=True, capture_output=True)
    assert out.stat().st_size == size
    assert [p.name for p in out.parent.iterdir()] == ["m.onnx"]
