"""diff: says how two adapters, checkpoints or ONNX files differ."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import Outcome, verb
from .inspect import make_table, open_adapter

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..proof.diff import Weights


@verb(
    examples=(
        "diff a.fourierft.safetensors b.fourierft.safetensors",
        "diff a.fourierft.safetensors unmerged.onnx --json",
        "diff base merged",
    )
)
@click.argument("left", type=options.PATH)
@click.argument("right", type=options.PATH)
@options.base_option
def diff(left: str, right: str, base: str | None) -> Outcome:
    """Say how two adapters, checkpoints or ONNX files differ.

    LEFT and RIGHT are bundles, PEFT adapter directories or ONNX files that hold an adapter; or two
    model directories; or two other ONNX files. Norms of delta_W need layer shapes: give --base for
    unbound adapters.
    """
    from ..bundle.bundle import Bundle
    from ..errors import UsageError
    from ..proof.diff import compare_adapters, compare_weights

    titles: tuple[str, ...]
    notes = []
    a, b = _open_both(left, right, base)
    if isinstance(a, Bundle) and isinstance(b, Bundle):
        facts = compare_adapters(a, b)
        titles = ("layer", "same entries", "norm left", "norm right", "distance", "cosine")
        rows = [
            (x["name"], x["same_entries"], *x["norms"], x["distance"], x["cosine"])
            for x in facts["layers"]
        ]
        changed = [name for name, distance in facts["saved"].items() if distance != 0]
        lines = [
            f"seed {facts['seed'][0]} and {facts['seed'][1]}, scaling {facts['scaling'][0]:g} and "
            f"{facts['scaling'][1]:g}; saved tensors that differ: {', '.join(changed) or 'none'}"
        ]
        if not (a.is_bound and b.is_bound):
            notes = ["an adapter is unbound: give --base to compare entries, norms and delta_W"]
    elif not isinstance(a, Bundle) and not isinstance(b, Bundle):
        facts = compare_weights(a, b)
        titles = ("tensor", "norm of the difference")
        rows = [*facts["tensors"].items()]
        lines = [f"{len(rows)} tensors differ, {facts['same']} are the same"]
    else:
        expected, found = (
            "two adapters, two model directories or two ONNX files",
            f"{left} and {right}",
        )
        raise UsageError("diff", expected=expected, found=found)
    for side, name in ((left, "only_left"), (right, "only_right")):
        lines += [f"only in {side}: {', '.join(facts[name])}"] if facts[name] else []
    table = [make_table(titles, [[_text(cell) for cell in row] for row in rows])] if rows else []
    return Outcome({"diff": {"left": left, "right": right, **facts}}, [*lines, *table], notes)


def _open_both(
    left: str, right: str, base: str | None
) -> tuple[Bundle | Weights, Bundle | Weights]:
    """Opens both sides; two ONNX files of which one holds no single adapter as their weights."""
    from ..errors import UsageError

    try:
        return _open(left, base), _open(right, base)
    except UsageError:
        if not (left.endswith(".onnx") and right.endswith(".onnx")):
            raise
    return _read_graph(left), _read_graph(right)


def _read_graph(path: str) -> Weights:
    """The initializers of an ONNX file."""
    from ..onnx_graph.graph.source import open_onnx
    from ..proof.diff import Weights

    source = open_onnx(path)
    values = source.model.graph.initializers.items()
    held = {name: value.const_value for name, value in values if value.const_value is not None}
    return Weights(held, lambda name: source.read(held[name]))


def _open(path: str, base: str | None) -> Bundle | Weights:
    """Opens an adapter, bound to `base` where it is not bound, or a checkpoint."""
    from ..bundle.peft import CONFIG_FILE, open_bundle
    from ..files.checkpoint import Checkpoint
    from ..proof.diff import Weights

    is_model = os.path.isfile(os.path.join(path, "config.json"))
    if is_model and not os.path.isfile(os.path.join(path, CONFIG_FILE)):
        checkpoint = Checkpoint.open(path)
        return Weights(checkpoint.tensors, checkpoint.read)
    if base is None or path.endswith(".onnx"):
        return open_adapter(path)
    bundle = open_bundle(path)
    return bundle if bundle.is_bound else bundle.bind(base)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if type(value) is float else str(value)
