"""diff: says how two adapters or two checkpoints differ."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import Outcome, verb
from .inspect import make_table

if TYPE_CHECKING:
    from ..bundle.file import Bundle
    from ..files.checkpoint import Checkpoint


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
    """Say how two adapters or two checkpoints differ.

    LEFT and RIGHT are bundles, PEFT adapter directories or ONNX files that hold an adapter; or two
    model directories. Norms of delta_W need layer shapes: give --base for unbound adapters.
    """
    from ..bundle.file import Bundle
    from ..errors import UsageError
    from ..files.checkpoint import Checkpoint
    from ..proof.difference import compare_adapters, compare_checkpoints

    titles: tuple[str, ...]
    a, b = (_open(path, base) for path in (left, right))
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
    elif isinstance(a, Checkpoint) and isinstance(b, Checkpoint):
        facts = compare_checkpoints(a, b)
        titles = ("tensor", "norm of the difference")
        rows = [*facts["tensors"].items()]
        lines = [f"{len(rows)} tensors differ"]
    else:
        found = f"{left} and {right}"
        raise UsageError("diff", expected="two adapters or two model directories", found=found)
    for side, name in ((left, "only_left"), (right, "only_right")):
        lines += [f"only in {side}: {', '.join(facts[name])}"] if facts[name] else []
    table = make_table(titles, [[_text(cell) for cell in row] for row in rows])
    return Outcome({"diff": {"left": left, "right": right, **facts}}, [*lines, table])


def _open(path: str, base: str | None) -> Bundle | Checkpoint:
    """Opens an adapter, bound to `base` where it is not bound, or a checkpoint."""
    from ..bundle.peft import CONFIG_FILE, open_bundle
    from ..errors import UsageError
    from ..files.checkpoint import Checkpoint
    from ..recover.from_onnx import recover_onnx

    is_model = os.path.isfile(os.path.join(path, "config.json"))
    if is_model and not os.path.isfile(os.path.join(path, CONFIG_FILE)):
        return Checkpoint.open(path)
    if path.endswith(".onnx"):
        bundles = [*recover_onnx(path).values()]
        if len(bundles) != 1:
            raise UsageError(path, expected="one adapter in the file", found=str(len(bundles)))
        return bundles[0]
    bundle = open_bundle(path)
    return bundle if bundle.is_bound or base is None else bundle.bind(base)


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if type(value) is float else str(value)
