"""Ctrl-C in the middle of a run: the step is finished, what there is is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped a run between two steps; the message says what was kept."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """A question: was Ctrl-C pressed? A second one stops at once, as ever.

    Outside the main thread Ctrl-C never comes; the answer is no.
    """
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(number, frame)
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False  # somebody else decides what Ctrl-C does
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
