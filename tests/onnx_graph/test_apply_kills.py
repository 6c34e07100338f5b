"""SIGKILL at random moments of apply: the model is absent or complete, with its own data."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

KILLS = 100
WARM = (
    "import runpy, sys, onnx, onnx_ir, fourierft_export.onnx_graph.apply;"
    "runpy.run_path(sys.argv[1], run_name='__main__')"
)

Runner = Callable[..., int]


@pytest.fixture
def runner() -> Iterator[Runner]:
    """`run(words, kill_after=None)`: the command line in forks of one warm process."""
    script = Path(__file__).parent.parent / "merge" / "fork_server.py"
    server = subprocess.Popen(
        [sys.executable, "-c", WARM, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent.parent,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(words: list[str], kill_after: float | None = None) -> int:
        server.stdin.write(json.dumps([words, kill_after, None, os.devnull]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_apply_survives_a_hundred_kills(
    runner: Runner, make_bundle: Any, tmp_path: Path, write_onnx: Any
) -> None:
    names = [f"l{i}" for i in range(8)]
    rng = np.random.default_rng(0)
    path = write_onnx(
        tmp_path / "in.onnx",
        [("MatMul", [f"x{i}", f"{name}.weight"], [f"x{i + 1}"]) for i, name in enumerate(names)],
        {f"{name}.weight": rng.standard_normal((384, 384), dtype=np.float32) for name in names},
        {"x0": ["n", 384]},
        {"x8": ["n", 384]},
        save_as_external_data=True,
        location="weights",
    )
    make_bundle(names[:4], n=200).save(tmp_path / "b")
    folder = tmp_path / "outputs"
    folder.mkdir()
    out, data = folder / "out.onnx", folder / "out.onnx.data"
    words = ["apply", "--onnx", str(path), "--bundle", str(tmp_path / "b"), "--mode", "merged"]
    words += ["-o", str(out)]

    def content() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def remove() -> None:
        for file in (out, data):
            file.unlink(missing_ok=True)

    times = []
    for _ in range(3):
        remove()
        started = time.perf_counter()
        assert runner(words) == 0
        times.append(time.perf_counter() - started)
    whole, took = content(), min(times)
    assert sorted(whole) == ["out.onnx", "out.onnx.data"]
    moments = random.Random(0)
    killed = absent = 0
    while killed < KILLS:
        if out.exists():
            remove()
        code = runner(words, kill_after=moments.uniform(0.1, 1) * took)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if out.exists():
            assert content() == whole
        else:
            assert code != 0
            absent += 1
    assert absent > 0
    # The next run takes over whatever the killed ones left.
    if not out.exists():
        assert runner(words) == 0
    assert content() == whole
    assert sorted(p.name for p in folder.iterdir()) == ["out.onnx", "out.onnx.data"]


def test_data_whose_model_never_came_is_replaced(
    make_bundle: Any, tmp_path: Path, write_onnx: Any
) -> None:
    """A run killed between its two renames leaves the data, and the model in its work folder."""
    from fourierft_export.errors import UsageError
    from fourierft_export.onnx_graph.apply import apply_onnx

    write_onnx(
        tmp_path / "in.onnx",
        [("MatMul", ["x", "a.weight"], ["y"])],
        {"a.weight": np.ones((8, 8), np.float32)},
        {"x": ["n", 8]},
        {"y": ["n", 8]},
        save_as_external_data=True,
        location="weights",
        size_threshold=0,
    )
    out = tmp_path / "out.onnx"
    data = tmp_path / "out.onnx.data"
    data.write_bytes(b"somebody's own")
    with pytest.raises(UsageError, match=r"out\.onnx\.data"):
        apply_onnx(tmp_path / "in.onnx", make_bundle(["a"]), out)
    assert data.read_bytes() == b"somebody's own"
    left = tmp_path / "out.onnx.partial-1"
    left.mkdir()
    (left / "out.onnx").write_bytes(b"a model that is not in its place")
    apply_onnx(tmp_path / "in.onnx", make_bundle(["a"]), out)
    assert data.stat().st_size == 256
    onnx.load(out)
