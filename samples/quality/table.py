"""The results as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from methods import METHODS
from numpy.typing import NDArray

Results = dict[str, dict[str, Any]]
REFERENCE = "lora8"


def finals(found: Results, task: str, method: str) -> list[dict[str, Any]]:
    """The final results of one method on one task, one per seed."""
    return [
        r for r in found.values() if (r["task"], r["method"], r["part"]) == (task, method, "final")
    ]


def average(found: Results, tasks: Sequence[str], method: str) -> float:
    """Mean over tasks of the means over seeds, in per cent."""
    return 100 * mean(mean(r["score"] for r in finals(found, task, method)) for task in tasks)


def markdown(found: Results, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """Accuracy in per cent: mean (least to most over the seeds); then what it costs."""
    head = ["method", *tasks, "average", f"against {METHODS[REFERENCE].title}"]
    head += ["parameters", "with head", "bytes", "s/step"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in methods:
        rows = {task: finals(found, task, method) for task in tasks}
        every = [r for part in rows.values() for r in part]
        fields = [
            METHODS[method].title,
            *(spread([100 * r["score"] for r in part]) for part in rows.values()),
            f"{average(found, tasks, method):.1f}",
            difference(found, tasks, method),
            span([r["parameters"] for r in every]),
            span([r["parameters"] + r["head_parameters"] for r in every]),
            span([r["bytes"] for r in every]),
            f"{median(r['seconds_per_step'] for r in every):.3f}",
        ]
        lines.append("| " + " | ".join(fields) + " |")
    rates = ["", "Learning rates:", ""]
    for method in methods:
        if finals(found, tasks[0], method)[0]["rate"] is not None:
            chosen = ", ".join(f"{t} {finals(found, t, method)[0]['rate']:g}" for t in tasks)
            rates.append(f"- {METHODS[method].title}: {chosen}")
    return "\n".join(lines + rates) + "\n"


def difference(found: Results, tasks: Sequence[str], method: str) -> str:
    """How far a method's average is from the reference's, with the interval that holds 95 %."""
    gaps = [paired_gaps(found, task, method) for task in tasks]
    if method == REFERENCE or not all(map(len, gaps)):
        return ""
    low, high = interval(gaps)
    return f"{100 * mean(gap.mean() for gap in gaps):+.1f} ({low:+.1f} to {high:+.1f})"


def paired_gaps(found: Results, task: str, method: str) -> NDArray[np.float64]:
    """(seeds, rows): 1 where the method alone is right, -1 where the reference alone is."""
    right = {name: right_rows(finals(found, task, name)) for name in (method, REFERENCE)}
    seeds = sorted(right[method].keys() & right[REFERENCE].keys())
    return np.array([right[method][seed] - right[REFERENCE][seed] for seed in seeds])


def right_rows(results: Sequence[dict[str, Any]]) -> dict[int, NDArray[np.float64]]:
    """Seed -> (rows,): 1.0 where the label was right."""
    found = {}
    for r in results:
        packed = np.frombuffer(bytes.fromhex(r["right"]), np.uint8)
        found[r["seed"]] = np.unpackbits(packed, count=r["scored"]).astype(np.float64)
    return found


def interval(gaps: Sequence[NDArray[np.float64]], draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval, in per cent, of the mean over tasks: seeds and rows drawn anew."""
    generator = np.random.default_rng(0)
    means = []
    for _ in range(draws):
        drawn = []
        for gap in gaps:
            seeds, rows = (generator.integers(0, size, size) for size in gap.shape)
            drawn.append(gap[seeds].mean(axis=0)[rows].mean())
        means.append(100 * mean(drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def draw(found: Results, tasks: Sequence[str], methods: Sequence[str], path: Path) -> None:
    """Score against the adapter's bytes, a line from the lowest to the highest seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method in methods:
        by_seed: dict[int, list[float]] = {}
        for task in tasks:
            for r in finals(found, task, method):
                by_seed.setdefault(r["seed"], []).append(100 * r["score"])
        scores = [mean(values) for values in by_seed.values()]
        sizes = [r["bytes"] for task in tasks for r in finals(found, task, method)]
        middle = mean(scores)
        below, above = middle - min(scores), max(scores) - middle
        axes.errorbar(
            mean(sizes),
            middle,
            [[below], [above]],
            marker="o",
            capsize=4,
            label=METHODS[method].title,
        )
    axes.set_xscale("log")
    axes.set_xlabel("bytes of the adapter's files, head included (mean over the tasks)")
    axes.set_ylabel("accuracy in %, mean over the tasks")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
