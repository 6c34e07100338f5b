"""Where the shards of a merge are written: in processes of this machine, or by a Dask cluster.

One task is one shard: a function and its arguments, all of which pickle, so that any
`concurrent.futures.Executor` can run it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, as_completed
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from ..errors import FileAccessError, first_line, missing_extra
from ..spectral.thread_pool import default_threads

T = TypeVar("T")
OpenExecutor = Callable[[], AbstractContextManager[Executor]]
ATTEMPTS = 5
CONNECT_SECONDS = 20
# By name: distributed may not be installed.
_WORKER_DIED = {"KilledWorker", "FutureCancelledError", "CommClosedError"}


def run_tasks(
    task: Callable[..., T],
    arguments: Mapping[int, tuple[Any, ...]],
    open_executor: OpenExecutor,
    done: Callable[[int, T], None],
) -> None:
    """Run `task(*arguments[number])` for every number; those whose worker died are run again.

    `done` is called in this thread with every number and result, as they come.
    """
    left = dict(sorted(arguments.items()))
    for _ in range(ATTEMPTS if left else 0):
        with open_executor() as executor:
            futures = {executor.submit(task, *given): number for number, given in left.items()}
            for future in as_completed(futures):
                error = CancelledError() if future.cancelled() else future.exception()
                if error is None:
                    del left[futures[future]]
                    done(futures[future], future.result())
                elif not isinstance(error, (BrokenExecutor, CancelledError)) and not (
                    _WORKER_DIED & {kind.__name__ for kind in type(error).__mro__}
                ):
                    raise error
        if not left:
            return
    if left:
        raise FileAccessError(
            f"tasks {', '.join(map(str, left))}",
            expected="workers that finish them",
            found=f"workers that died, {ATTEMPTS} times",
            remedy="they may lack memory: use fewer workers",
        )


@contextmanager
def start_processes(workers: int) -> Iterator[Executor]:
    """Start `workers` processes on this machine; they die with this one, whatever kills it."""
    from concurrent.futures import ProcessPoolExecutor

    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(max(default_threads() // workers, 1),),
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.kill()
            process.join()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    """Leave interrupts to the parent, end when it ends, and use its share of the cores."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def connect_dask(address: str) -> Iterator[Executor]:
    """Connect to the workers of a Dask scheduler; they see this file system, with this package."""
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise missing_extra("distributed", "dask", "--scheduler") from None
    try:
        client = Client(address, set_as_default=False, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise FileAccessError(
            address,
            expected="the address of a Dask scheduler",
            found=first_line(error),
            remedy="start one (dask scheduler), or check the address",
        ) from None
    try:
        yield client.get_executor(pure=False)
    finally:
        client.close()
