"""Sessions, readers and live models in eight threads and over a thousand rounds.

The long forms are marked slow: `pytest -m slow tests/onnx_graph/test_endurance.py`.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import fourierft_export as ff

THREADS = 8
GROWTH = 8 << 20  # bytes over a thousand rounds: allocators keep a few pages
LONG = pytest.mark.slow
Work = Callable[[], object]


def run_in_threads(work: Callable[[int], object], seconds: float) -> int:
    """Let every thread repeat its work for so long; returns how often it was done."""
    end = time.monotonic() + seconds

    def repeat(number: int) -> int:
        count = 0
        while time.monotonic() < end or not count:
            work(number)
            count += 1
        return count

    with ThreadPoolExecutor(THREADS) as threads:
        return sum(threads.map(repeat, range(THREADS)))


def grown(work: Work, rounds: int) -> int:
    """The resident bytes that `rounds` more rounds take, after a fifth of them."""

    def resident() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    for _ in range(rounds // 5):
        work()
    before = resident()
    for _ in range(rounds):
        work()
    return resident() - before


def opened(tenants: Any, mode: str) -> ff.AdapterSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ff.AdapterSession(tenants.file(mode), session_options=options)


@pytest.mark.parametrize("seconds", [0.3, pytest.param(60, marks=LONG)])
@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
def test_a_session_in_threads(small_tenants: Any, mode: str, seconds: float) -> None:
    """Outputs are, bit for bit, those of one thread, whatever is loaded meanwhile."""
    session = opened(small_tenants, mode)
    for name, bundle in small_tenants.bundles.items():
        session.load(name, bundle)
    names = ("one", "two", None)
    serial = {name: session.run(small_tenants.inputs, name)["output"] for name in names}
    for name in names:
        small_tenants.check(serial[name], name)

    def work(number: int) -> None:
        if number == 0:
            session.load("more", small_tenants.bundles["two"])
            more = session.run(small_tenants.inputs, "more")["output"]
            np.testing.assert_array_equal(more, serial["two"])
            session.unload("more")
        name = names[number % 3]
        got = session.run(small_tenants.inputs, name)["output"]
        np.testing.assert_array_equal(got, serial[name])

    assert run_in_threads(work, seconds) >= THREADS


@pytest.mark.parametrize("seconds", [0.3, pytest.param(60, marks=LONG)])
def test_readers_in_threads(small_tenants: Any, tmp_path: Path, seconds: float) -> None:
    """Bundles, PEFT folders and pools."""
    bundles = small_tenants.bundles
    pool = ff.Pool.create(tmp_path / "pool", bundles)
    ff.to_peft(bundles["two"], tmp_path / "peft")
    whole = {name: bundle.to_bytes() for name, bundle in bundles.items()}
    from_peft = ff.from_peft(tmp_path / "peft").to_bytes()

    def work(number: int) -> None:
        name = ("one", "two")[number % 2]
        assert ff.Bundle.load(small_tenants.bundle_file(name)).to_bytes() == whole[name]
        assert pool[name].to_bytes() == whole[name]
        assert ff.from_peft(tmp_path / "peft").to_bytes() == from_peft

    assert run_in_threads(work, seconds) >= THREADS


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("rounds", [60, pytest.param(1000, marks=LONG)])
@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
def test_loading_again_and_again_takes_no_memory(
    small_tenants: Any, mode: str, rounds: int
) -> None:
    session = opened(small_tenants, mode)

    def work() -> None:
        session.load("more", small_tenants.bundles["two"])
        session.run(small_tenants.inputs, "more")
        session.unload("more")

    assert grown(work, rounds) < GROWTH


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("rounds", [60, pytest.param(1000, marks=LONG)])
def test_attaching_again_and_again_takes_no_memory(rounds: int) -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 8)).eval()
    config = ff.FourierFTConfig(n_frequency=50, target_modules=["0"], modules_to_save=["1"])
    bundle = ff.capture(ff.inject(model, config))
    ff.detach(model)
    x, names = torch.ones(2, 256), [name for name, _ in model.named_modules()]

    def work() -> None:
        ff.attach(model, bundle, "more")
        with torch.no_grad():
            model(x)
        ff.detach(model)

    assert grown(work, rounds) < GROWTH
    assert [name for name, _ in model.named_modules()] == names
