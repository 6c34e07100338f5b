"""An error that many processes meet is told once.

Imports torch only where there is an error and more than one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_PATIENCE = timedelta(seconds=5)


def is_one_of_many() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def one_voice() -> Iterator[None]:
    """For the body of a command: of many processes, the first that fails says why.

    The others, most of which fail because of the first, leave silently.

    Raises:
        SystemExit: in those others, with the exit code that their error asks for.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not is_one_of_many() or _is_first():
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        raise SystemExit(130 if interrupted else getattr(error, "exit_code", 1)) from None


def _is_first() -> bool:
    """Whether no other process has asked before; true where nobody can be asked."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    # torchrun keeps this store itself, so it outlives any of the processes.
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            str(address),
            int(port or ""),
            is_master=False,
            timeout=_PATIENCE,
            wait_for_workers=False,
        )
        return bool(store.add(f"fourierft_export/failed/{attempt}", 1) == 1)
    except (DistError, ValueError):
        return True
