"""Measure the toolkit against its peers: python samples/bench/run.py [NAME ...] [--json FILE].

Every file `bar_*.py` beside this one holds bars: a mapping BARS from name to a function that
yields `harness.Row`s. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import harness  # noqa: E402 - found through the line above

Bar = Callable[[], Iterator[harness.Row]]


def all_bars() -> dict[str, Bar]:
    bars: dict[str, Bar] = {}
    for path in sorted(HERE.glob("bar_*.py")):
        bars.update(importlib.import_module(path.stem).BARS)
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(description="Bars of speed, each against its peer.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="bars to run; by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    harness.set_threads()
    bars = all_bars()
    if options.list:
        print(*bars, sep="\n")
        return
    unknown = sorted(set(options.names) - set(bars))
    if unknown:
        parser.error(f"no such bar: {', '.join(unknown)}; there are: {', '.join(bars)}")
    rows: list[harness.Row] = []

    def measured() -> Iterator[harness.Row]:
        for name in options.names or bars:
            for row in bars[name]():
                rows.append(row)
                yield row

    start = time.perf_counter()
    for line in harness.show(measured()):
        print(line, flush=True)
    missed = sum(not row.met for row in rows)
    print(f"{len(rows)} rows, {missed} missed, {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
