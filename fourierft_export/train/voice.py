"""An error that many processes meet is told once.

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
def one_voice() -> Iterator[bool]:
    """For whoever is about to tell of an error: whether this process is to do so.

    Of many processes the first that fails says why. Most of the others fail because of it; they
    wait until it is told, for torchrun ends all as soon as one has ended.
    """
    store = _store() if os.environ.get("WORLD_SIZE", "1") != "1" else None
    if store is None:
        yield True
        return
    from torch.distributed import DistError

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    asked, told = (f"fourierft_export/{attempt}/{what}" for what in ("asked", "told"))
    first = True
    with suppress(DistError):
        first = store.add(asked, 1) == 1
        if not first:
            store.wait([told], _PATIENCE)
    yield first
    if first:
        with suppress(DistError):
            store.set(told, "")


def _store() -> Any | None:
    """The store that torchrun keeps, which outlives any of its processes; None without one."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    try:
        return TCPStore(host, int(port), is_master=False, timeout=_PATIENCE, wait_for_workers=False)
    except (DistError, ValueError):
        return None
