"""Of many processes that train together, one prints the error.

Imports torch only where there is an error and more than one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

_PATIENCE = timedelta(seconds=5)


@contextmanager
def report_once() -> Iterator[bool]:
    """Yields whether this process is the one that prints the error it has met.

    Of many processes the first that fails says why. Most of the others fail because of it; they
    wait until it is printed, for torchrun ends all as soon as one has ended.
    """
    store = _store() if os.environ.get("WORLD_SIZE", "1") != "1" else None
    if store is None:
        yield True
        return
    from torch.distributed import DistError

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    failed, printed = (f"fourierft_export/{attempt}/{what}" for what in ("failed", "printed"))
    first = True
    with suppress(DistError):
        first = store.add(failed, 1) == 1
        if not first:
            store.wait([printed], _PATIENCE)
    yield first
    if first:
        with suppress(DistError):
            store.set(printed, "")


def _store() -> Any | None:
    """The store that torchrun keeps, which outlives any of its processes; None without one."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        return TCPStore(host, int(port), is_master=False, timeout=_PATIENCE, wait_for_workers=False)
    except (DistError, ValueError):
        return None
