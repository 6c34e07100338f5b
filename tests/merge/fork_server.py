"""Runs the command line in forks of one warm process, and kills them on demand.

Reads lines of JSON: words, seconds until SIGKILL or null, [a signal, the number of weight files
after which the fork sends it to itself] or null, and the file for its stderr. Prints the exit code
of each, which is negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import fourierft_export.bundle.peft
import fourierft_export.cli.main
import fourierft_export.cli.pack
import fourierft_export.merge.merge
from fourierft_export.merge import run


def signal_after(number: int, count: int) -> None:
    """Send this process a signal when so many weight files are finished."""
    record, recorded = run.record_finished, []

    def record_and_signal(*shard: Any) -> None:
        record(*shard)
        recorded.append(shard)
        if len(recorded) == count:
            os.kill(os.getpid(), number)
            time.sleep(20)  # for Ctrl-C to arrive

    run.record_finished = record_and_signal


def main() -> None:
    for line in sys.stdin:
        words, kill_after, at_shard, stderr = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd, name in enumerate((os.devnull, os.devnull, stderr)):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
            if at_shard:
                signal_after(*at_shard)
            os._exit(fourierft_export.cli.main.run(words))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # it is still there, if only to be waited for
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
