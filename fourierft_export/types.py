"""Type aliases that several rooms share, each defined once.

They are text, so that importing this module costs no import of numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
"""A numpy array of any dtype and shape."""

Entries: TypeAlias = "npt.NDArray[np.int64]"
"""Positions in the spectrum, int64 (n, 2): row u and column v of each coefficient."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def byte_counter(what: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    """Make a function that adds up bytes and reports them to `progress`, of `total` in all."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(what, min(done, total), total)

    return count
