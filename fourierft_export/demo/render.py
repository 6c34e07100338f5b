"""The demo's result for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .result import DemoResult

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(result: DemoResult) -> RenderableType:
    """Tables of accuracy, sizes and agreement, and where the files are, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    adapters = result.adapters
    copies = len(adapters) * result.base_bytes
    bundles = sum(adapter.bundle_bytes for adapter in adapters)
    sizes = (
        f"{len(adapters)} adapters: {_bytes(bundles)}; {len(adapters)} fine-tuned copies of the "
        f"model: {_bytes(copies)}, {copies / bundles:.0f} times as much"
    )
    where = f"{result.directory} ({result.seconds['total']:.0f} s)"
    return Group(
        Text(
            f"A vision transformer of {result.parameters:,} parameters, trained on "
            f"{result.images['train']:,} upright digits, reads {result.accuracy:.1%} of "
            f"{result.images['test']} test images."
        ),
        Text(""),
        _accuracy(result),
        Text(""),
        Text(sizes),
        Text(""),
        _agreement(result),
        Text(""),
        Text(where, style="bold", no_wrap=True, overflow="fold"),
        _files(result),
    )


def _accuracy(result: DemoResult) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("adapter for", "before", "after", "ONNX Runtime", "adapter", "model", "share"):
        table.add_column(name, justify="left" if name == "adapter for" else "right")
    for adapter in result.adapters:
        onnx = sorted({f"{value:.1%}" for value in adapter.accuracy_onnx.values()})
        table.add_row(
            f"{adapter.name} images",
            f"{adapter.accuracy_before:.1%}",
            f"[bold green]{adapter.accuracy_after:.1%}[/]",
            " / ".join(onnx),
            _bytes(adapter.bundle_bytes),
            _bytes(result.base_bytes),
            f"{adapter.bundle_bytes / result.base_bytes:.1%}",
        )
    return table


def _agreement(result: DemoResult) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("compared with PyTorch + bundle")
    table.add_column("max abs difference", justify="right")
    table.add_column("of logits up to", justify="right")
    for adapter in result.adapters:
        for artifact, difference in adapter.max_abs.items():
            name = f"{adapter.merged}/" if artifact == "merged" else artifact
            table.add_row(name, f"{difference:.1e}", f"{adapter.logits_scale:.1f}")
    return table


def _files(result: DemoResult) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("what")
    table.add_row(f"{result.base}/", _bytes(result.base_bytes), "the base checkpoint")
    for adapter in result.adapters:
        table.add_row(adapter.bundle, _bytes(adapter.bundle_bytes), "the adapter, packed")
        table.add_row(f"{adapter.merged}/", _bytes(result.base_bytes), "base + adapter")
        for file, size in adapter.onnx_bytes.items():
            table.add_row(file, _bytes(size), "base + adapter, for ONNX Runtime")
    if result.picture:
        table.add_row(result.picture, "", "a picture of it all")
    table.add_row("report.json", "", "these numbers")
    return table


def _bytes(count: int) -> str:
    if count < 1_000_000:
        return f"{count / 1000:.1f} KB"
    return f"{count / 1_000_000:.2f} MB"
