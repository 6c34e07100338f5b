"""Shards written by other processes and by a Dask cluster: the same bytes, whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import fourierft_export as ff
from fourierft_export.errors import BadInputError, FileAccessError, UsageError
from fourierft_export.merge import executors
from fourierft_export.merge.executors import ATTEMPTS, run_tasks
from fourierft_export.spectral.thread_pool import default_threads
from tests.kill import files_in

Bundles = list[ff.Bundle]
SHARDS = 8


@pytest.fixture
def base(tmp_path: Path, make_base: Callable[..., Path]) -> Path:
    return make_base(tmp_path / "base", shards=SHARDS)


@pytest.fixture
def bundles(base: Path, make_bundle: Callable[..., ff.Bundle]) -> list[ff.Bundle]:
    """One bound bundle with a head, and one unbound."""
    modules = [f"layers.{number}.q" for number in range(SHARDS)]
    saved = {"score.weight": np.ones((2, 128), np.float32)}
    return [
        make_bundle(base, modules, saved=saved),
        make_bundle(base, modules[:3], seed=5, numpy_seed=2, bound=False),
    ]


@pytest.fixture
def whole(base: Path, bundles: Bundles, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    ff.merge_checkpoint(base, bundles, tmp_path / "whole", weights=[1, 0.5])
    return files_in(tmp_path / "whole")


class KillOne:
    """Progress that kills a process once the first shard is done."""

    def __init__(self, pids: Callable[[], list[int]]) -> None:
        self._pids = pids
        self.killed = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "merging" and not self.killed:
            self.killed = self._pids()[0]
            os.kill(self.killed, signal.SIGKILL)


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


@pytest.mark.parametrize("kill", [False, True])
def test_processes_write_what_one_process_writes(
    base: Path, bundles: Bundles, tmp_path: Path, whole: dict[str, bytes], kill: bool
) -> None:
    progress = KillOne(children)
    report = ff.merge_checkpoint(
        base, bundles, tmp_path / "out", weights=[1, 0.5], workers=2,
        progress=progress if kill else None,
    )  # fmt: skip
    assert files_in(tmp_path / "out") == whole
    assert bool(progress.killed) == kill
    assert len(report.shards) == SHARDS
    assert not list(tmp_path.glob("*.partial-*"))


def test_a_dask_cluster_writes_what_one_process_writes(
    base: Path, bundles: Bundles, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    from distributed import Client, LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
        local_directory=str(tmp_path / "dask"),
    ) as cluster, Client(cluster) as client:  # fmt: skip
        progress = KillOne(lambda: list(client.run(os.getpid).values()))
        for out, called in (("a", None), ("b", progress)):
            ff.merge_checkpoint(
                base, bundles, tmp_path / out, weights=[1, 0.5], progress=called,
                scheduler=cluster.scheduler_address,
            )  # fmt: skip
            assert files_in(tmp_path / out) == whole
    assert progress.killed
    assert not list(tmp_path.glob("*.partial-*"))


def test_an_error_of_a_worker_is_the_callers(
    base: Path, make_bundle: Callable[..., ff.Bundle], tmp_path: Path
) -> None:
    bundle = make_bundle(base, ["layers.3.q"], scaling=1e9)
    with pytest.raises(BadInputError, match=r"tensor layers\.3\.q\.weight") as caught:
        ff.merge_checkpoint(base, bundle, tmp_path / "out", dtype="float16", workers=2)
    assert "bfloat16" in caught.value.remedy
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    assert children() == []


def test_an_address_without_a_scheduler_is_an_error(
    base: Path, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.5)
    address = "tcp://127.0.0.1:1"
    with pytest.raises(FileAccessError, match="expected the address of a Dask scheduler"):
        ff.merge_checkpoint(base, bundles, tmp_path / "out", scheduler=address)
    with pytest.raises(UsageError, match="a number of processes, or a scheduler"):
        ff.merge_checkpoint(base, bundles, tmp_path / "out", scheduler=address, workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_tasks_whose_workers_always_die_end_with_an_error() -> None:
    tries: list[int] = []

    def task(number: int) -> int:
        tries.append(number)
        if number == 2:
            raise BrokenProcessPool("gone")
        return number * 10

    @contextmanager
    def opened() -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(1) as executor:
            yield executor

    done: dict[int, int] = {}
    with pytest.raises(FileAccessError, match="tasks 2: expected workers that finish them"):
        run_tasks(task, {n: (n,) for n in (1, 2, 3)}, opened, done.__setitem__)
    assert done == {1: 10, 3: 30}
    assert sorted(tries) == [1, *[2] * ATTEMPTS, 3]


@pytest.mark.parametrize(("cores", "expected"), [("8", 4), ("1", 1)])
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", cores)
    with executors.start_processes(2) as pool:
        assert pool.submit(default_threads).result() == expected
