"""The demo as one picture: what the model sees before and after, and how often it is right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .result import DemoResult
from .steps import Views

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and orange are told apart by everyone.
GOOD, BAD, QUIET = "#0969da", "#d4570a", "#8c959f"


def draw(result: DemoResult, views: Mapping[str, Views], labels: Tensor, path: Path) -> None:
    """Write a PNG: one test image of each digit in every kind, with predictions, and accuracies.

    Args:
        result: the numbers.
        views: by kind of image ("upright", "inverted", "rotated"): the test images and the
            classes that the base, and the base with its adapter, see in them.
        labels: (n,) true classes.
        path: the file.
    """
    # The figure is used without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    classes = [int(c) for c in labels.unique()]
    rows = [int((labels == c).nonzero()[0, 0]) for c in classes]
    figure = Figure(figsize=(12.6, 4.9), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    adapted = {adapter.name for adapter in result.adapters}
    grid = figure.add_gridspec(
        len(views), len(rows), left=0.055, right=0.67, top=0.82, bottom=0.06, hspace=0.5, wspace=0.1
    )
    for line, (kind, view) in enumerate(views.items()):
        for column, row in enumerate(rows):
            axes = figure.add_subplot(grid[line, column])
            axes.imshow(view.images[row].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color(QUIET)
            seen = int(view.before[row]), int(view.after[row])
            _predictions(axes, *seen, truth=int(labels[row]), adapted=kind in adapted)
            if column == 0:
                axes.set_ylabel(kind, fontsize=11)
    figure.suptitle(
        "FourierFT adapters on handwritten digits", x=0.012, ha="left", fontsize=14, weight="bold"
    )
    figure.text(
        0.012,
        0.885,
        "predicted digit: before → after the adapter",
        fontsize=10,
        color="#57606a",
    )
    _bars(figure.add_axes((0.72, 0.15, 0.265, 0.67)), result)
    figure.savefig(path, metadata={"Software": None})


def _predictions(axes: Axes, before: int, after: int, truth: int, adapted: bool) -> None:
    """Under an image: the class seen, or the classes seen before and after; right ones in blue."""

    def write(x: float, text: str, colour: str) -> None:
        axes.text(
            x, -0.09, text, transform=axes.transAxes, ha="center", va="top", color=colour,
            fontsize=11, weight="bold",
        )  # fmt: skip

    def colour(seen: int) -> str:
        return GOOD if seen == truth else BAD

    if not adapted:
        write(0.5, str(before), colour(before))
        return
    write(0.2, str(before), colour(before))
    write(0.5, "→", QUIET)
    write(0.8, str(after), colour(after))


def _bars(axes: Axes, result: DemoResult) -> None:
    """Accuracy on the test images, before and after."""
    axes.set_title("accuracy on test images, before and after", fontsize=11, loc="left", pad=12)
    axes.bar(0, result.accuracy, width=0.62, color=QUIET)
    bars = [(0.0, result.accuracy)]
    for place, adapter in enumerate(result.adapters, 1):
        pair = ((place - 0.17, adapter.accuracy_before), (place + 0.17, adapter.accuracy_after))
        for (x, value), colour in zip(pair, (BAD, GOOD), strict=True):
            axes.bar(x, value, width=0.3, color=colour)
        bars += pair
    for x, value in bars:
        axes.text(x, value + 0.012, f"{value:.1%}", ha="center", va="bottom", fontsize=9)
    names = ["upright\n(base alone)"]
    names += [f"{a.name}\n+ {a.bundle_bytes / 1000:.1f} KB" for a in result.adapters]
    axes.set_xticks(range(len(names)), names, fontsize=10)
    axes.set(ylim=(0, 1.08), yticks=[])
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
