"""Type aliases that several rooms share, each defined once.

They are text, so that importing this module costs no import of numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape
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


def html_table(title: str, facts: Mapping[str, object], rows: Iterable[Iterable[object]]) -> str:
    """Makes what notebooks show of a result: a title, facts in one line, and a table."""
    line = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<b>{escape(title)}</b><br>{escape(line)}<table>{body}</table>"
