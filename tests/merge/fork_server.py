"""Runs the command line in forks of one warm process, and kills them on demand.

Reads lines of JSON, [words, seconds until SIGKILL or null]; prints the exit code of each, which is
negative for a signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import fourierft_export.bundle.peft
import fourierft_export.cli.main
import fourierft_export.cli.pack
import fourierft_export.merge.merge


def main() -> None:
    for line in sys.stdin:
        words, kill_after = json.loads(line)
        pid = os.fork()
        if pid == 0:
            devnull = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(devnull, fd)
            os._exit(fourierft_export.cli.main.run(words))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # it is still there, if only to be waited for
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
