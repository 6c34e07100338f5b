"""Threads for numpy work: its FFTs, products and casts release the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache


def default_threads() -> int:
    """`OMP_NUM_THREADS` where it is set, as numerical libraries do; else the usable cores."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdecimal() and int(setting) > 0:
        return int(setting)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_shares(work: Callable[[range], None], count: int, threads: int) -> None:
    """Call `work` once for each of at most `threads` interleaved shares of range(count)."""
    shares = [range(first, count, threads) for first in range(min(threads, count))]
    # The context holds numpy's error state, which the caller may have set.
    pending = [_pool(os.getpid()).submit(copy_context().run, work, share) for share in shares[1:]]
    try:
        for share in shares[:1]:
            work(share)
    finally:
        for future in pending:
            future.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a fork must not inherit the pool
    return ThreadPoolExecutor(thread_name_prefix="fourierft")
