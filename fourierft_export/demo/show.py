"""The demo's result for a terminal, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .run import DemoResult

GOOD, BAD, QUIET = "#0969da", "#d4570a", "#8c959f"  # also distinct to colour-blind readers


def render(result: DemoResult) -> RenderableType:
    """Tables of accuracy, sizes and agreement, and where the files are, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    adapters, base_bytes = result.adapters, result.base_bytes
    copies, bundles = len(adapters) * base_bytes, sum(a["bundle_bytes"] for a in adapters)
    accuracy, files = [], [[f"{result.base}/", _bytes(base_bytes), "the base checkpoint", ""]]
    for a in adapters:
        onnx = sorted({f"{value:.1%}" for value in a["accuracy_onnx"].values()})
        after, share = f"{a['accuracy_after']:.1%}", f"{a['bundle_bytes'] / base_bytes:.1%}"
        before = f"{a['accuracy_before']:.1%}"
        accuracy.append([f"{a['name']} images", before, after, " / ".join(onnx), share])
        files.append([a["bundle"], _bytes(a["bundle_bytes"]), "the adapter, packed", ""])
        sizes = {"merged": base_bytes, **a["onnx_bytes"]}
        for file, size in sizes.items():
            name = f"{a['merged']}/" if file == "merged" else file
            difference = f"{a['max_abs'][file]:.1e} of {a['logits_scale']:.1f}"
            files.append([name, _bytes(size), "base + adapter", difference])
    files += [[result.picture, "", "a picture of it all", ""]] if result.picture else []
    files.append(["report.json", "", "these numbers", ""])
    where = f"{result.directory} ({result.seconds['total']:.0f} s)"
    heads = ("accuracy on", "before", "after", "ONNX Runtime", "adapter's share of the model")
    return Group(
        f"A vision transformer of {result.parameters:,} parameters, trained on "
        f"{result.images['train']:,} upright digits, reads {result.accuracy:.1%} of "
        f"{result.images['test']} test images.\n",
        _table(heads, accuracy),
        f"\n{len(adapters)} adapters: {_bytes(bundles)}; {len(adapters)} fine-tuned copies of the "
        f"model: {_bytes(copies)}, {copies / bundles:.0f} times as much\n",
        Text(where, style="bold", no_wrap=True, overflow="fold"),
        _table(("file", "size", "what it is", "logits differ from PyTorch by"), files),
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for place, head in enumerate(heads):
        left = place == 0 or head == "what it is"
        table.add_column(head, justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _bytes(count: int) -> str:
    return f"{count / 1000:.1f} KB" if count < 1_000_000 else f"{count / 1_000_000:.2f} MB"


def draw(result: DemoResult, views: Mapping[str, Any], labels: Any, path: Path) -> None:
    """Write a PNG: a test image of each digit in every kind, the classes seen, and accuracies."""
    # The figure is used without pyplot, which would choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [int((labels == c).nonzero()[0, 0]) for c in labels.unique()]
    figure = Figure(figsize=(12.6, 4.9), dpi=140, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(views), len(rows), left=0.055, right=0.67, top=0.82, bottom=0.06, hspace=0.5, wspace=0.1
    )
    for line, (kind, (images, before, after)) in enumerate(views.items()):
        for column, row in enumerate(rows):
            axes = figure.add_subplot(grid[line, column])
            axes.imshow(images[row, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[], ylabel=kind if column == 0 else "")
            for seen, x in ((before, 0.2), (after, 0.8)):
                right = int(seen[row]) == int(labels[row])
                axes.text(
                    x, -0.09, str(int(seen[row])), transform=axes.transAxes, ha="center", va="top",
                    color=GOOD if right else BAD, fontsize=11, weight="bold",
                )  # fmt: skip
    title = "FourierFT adapters on handwritten digits"
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, weight="bold")
    figure.text(0.012, 0.885, "predicted digit, before and after the adapter", fontsize=10)
    bars = figure.add_axes((0.72, 0.15, 0.265, 0.67))
    bars.set_title("accuracy on test images, before and after", fontsize=11, loc="left", pad=12)
    heights = [(0.0, result.accuracy, QUIET)]
    for place, a in enumerate(result.adapters, 1):
        heights.append((place - 0.17, a["accuracy_before"], BAD))
        heights.append((place + 0.17, a["accuracy_after"], GOOD))
    for x, value, colour in heights:
        bars.bar(x, value, width=0.3, color=colour)
        bars.text(x, value + 0.012, f"{value:.1%}", ha="center", va="bottom", fontsize=9)
    names = [f"{a['name']}\n+ {a['bundle_bytes'] / 1000:.1f} KB" for a in result.adapters]
    bars.set_xticks(range(len(names) + 1), ["upright\n(base alone)", *names], fontsize=10)
    bars.set(ylim=(0, 1.08), yticks=[])
    bars.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
