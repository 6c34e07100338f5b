"""inspect: describes a bundle, PEFT adapter, checkpoint or ONNX file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import options
from .console import Outcome, size_text, verb

if TYPE_CHECKING:
    from rich.table import Table

    from ..bundle.bundle import Bundle


@verb(
    examples=("inspect a.fourierft.safetensors", "inspect adapter", "inspect unmerged.onnx --json")
)
@click.argument("path", type=options.PATH)
@options.output_section(
    "--plot",
    type=options.PATH,
    metavar="FILE.png",
    help="Draw a bundle or PEFT adapter: coefficients, norms by layer, entries, delta_W.",
)
@options.force_option
def inspect(path: str, plot: str | None, force: bool) -> Outcome:
    """Describe a bundle, PEFT adapter, checkpoint or ONNX file."""
    from ..files.staging import check_output, staged_file

    if plot:
        check_output(plot, force=force, inputs=(path,))
    facts = describe(path)
    notes = facts.pop("notes", ())
    shown = [*_RENDERERS[facts["kind"]](facts)]
    if plot:
        from ..proof.plot_adapter import draw_bundle

        picture = draw_bundle(open_adapter(path))
        with staged_file(plot, force=force) as partial:
            partial.write_bytes(picture)
        shown.append(f"picture: {plot}")
    return Outcome({"inspect": facts}, shown, notes)


def open_adapter(path: str) -> Bundle:
    """Opens a bundle, a PEFT adapter directory, POOL#NAME, or an ONNX file that holds one adapter.

    A directory is bound to the base that its config names, if that is there.
    """
    from ..bundle.peft import open_bundle
    from ..errors import UsageError

    if not path.endswith(".onnx"):
        return open_bundle(path, bind=True)
    from ..recover.from_onnx import recover_onnx

    bundles = [*recover_onnx(path).values()]
    if len(bundles) != 1:
        raise UsageError(path, expected="one adapter in the file", found=str(len(bundles)))
    return bundles[0]


def describe(path: str) -> dict[str, Any]:
    """Describes the file or directory at `path`; the entry "kind" names its kind.

    Raises:
        FileAccessError: there is no such path.
        BadInputError: it is none of the known kinds, or damaged.
    """
    from ..bundle.bundle import Bundle
    from ..bundle.describe import (
        describe_adapter,
        describe_adapter_config,
        describe_bundle,
        describe_pool,
    )
    from ..bundle.peft import CONFIG_FILE
    from ..bundle.pool import is_pool, open_from_pool
    from ..errors import FileAccessError
    from ..files.hub import local_adapter
    from ..files.safetensors_reader import read_header
    from ..models.base_tensors import describe_base

    path = os.fspath(local_adapter(path))
    if not os.path.lexists(path):
        bundle = open_from_pool(path)  # POOL#NAME
        if bundle is not None:
            return {**describe_bundle(bundle), "path": path}
        raise FileAccessError(path, expected="a file or directory", found="no such path")
    if os.path.isdir(path):
        holds_adapter = os.path.isfile(os.path.join(path, CONFIG_FILE)) or (
            not os.path.isfile(os.path.join(path, "config.json"))
            and any(os.path.isfile(os.path.join(e.path, CONFIG_FILE)) for e in os.scandir(path))
        )
        return describe_adapter(path) if holds_adapter else describe_base(path)
    if path.endswith((".onnx", ".onnx_adapter")):
        from ..onnx_graph.describe import describe_adapter_file, describe_onnx

        return (describe_onnx if path.endswith(".onnx") else describe_adapter_file)(path)
    if path.endswith(".json"):
        return describe_adapter_config(path)
    if is_pool(path):
        return describe_pool(path)
    if "fourierft" in read_header(path).metadata:
        return describe_bundle(Bundle.load(path), path)
    return describe_base(path)


def _bundle(facts: Mapping[str, Any]) -> list[str | Table]:
    state = "bound to its base" if facts["bound"] else "unbound: it holds no layer shapes"
    return [
        f"{facts['path']}: FourierFT bundle, {size_text(facts['bytes'])}, {state}",
        f"  seed {facts['seed']}, scaling {facts['scaling']}, "
        f"task {facts['task_type'] or 'unknown'}, base {facts['base_model'] or 'unnamed'}",
        f"  sha256 {facts['sha256']}",
        *_layers(facts),
    ]


def _pool(facts: Mapping[str, Any]) -> list[str | Table]:
    return [
        f"{facts['path']}: pool of {facts['adapters']} FourierFT adapters, "
        f"{size_text(facts['bytes'])}, base {facts['base_model'] or 'unnamed'}",
        make_table(("adapter", "sha256"), [(name, digest[:16]) for name, digest in facts["first"]]),
        *_layers(facts),
    ]


def _adapter(facts: Mapping[str, Any]) -> list[str | Table]:
    config = facts["config"]
    size = f", {size_text(facts['bytes'])} of tensors" if facts.get("bytes") else ", config only"
    targets = config.get("target_modules")
    shown = ", ".join(map(str, targets)) if isinstance(targets, list) else str(targets)
    return [
        f"{facts['path']}: PEFT FourierFT adapter{size}",
        f"  seed {config.get('random_loc_seed', 777)}, scaling {config.get('scaling', 150.0)}, "
        f"n_frequency {config.get('n_frequency', 1000)}, "
        f"task {config.get('task_type') or 'unknown'}, "
        f"base {config.get('base_model_name_or_path') or 'unnamed'}",
        f"  target modules: {shown}",
        *_layers(facts),
    ]


def _layers(facts: Mapping[str, Any]) -> list[str | Table]:
    """Makes tables of the layers and of the dense tensors."""
    groups = [
        (
            "\n".join(group["layers"]),
            group["count"],
            (" x ".join(map(str, group["shape"])) if group["shape"] else "?")
            + (" (stored transposed)" if group["fan_in_fan_out"] else ""),
            group["n_frequency"],
            group["dtype"],
            group["entry_rule"] or "?",
        )
        for group in facts.get("groups", ())
    ]
    saved = [
        (tensor["name"], " x ".join(map(str, tensor["shape"])) or "scalar", tensor["dtype"])
        for tensor in facts.get("saved", ())
    ]
    titles = "layers", "count", "shape", "n_frequency", "dtype", "entry rule"
    shown: list[str | Table] = [make_table(titles, groups)] if groups else []
    return [*shown, *([make_table(("saved tensor", "shape", "dtype"), saved)] if saved else [])]


def make_table(titles: Sequence[str], rows: Sequence[Sequence[object]], fold: int = 0) -> Table:
    """Makes a table; cells of column `fold` may take several lines."""
    from rich.markup import escape
    from rich.table import Column, Table

    from ..errors import printable

    columns = [
        Column(t, overflow="fold" if i == fold else "ellipsis") for i, t in enumerate(titles)
    ]
    table = Table(*columns)
    for row in rows:
        # No markup and no control characters from a file reach the terminal.
        lines = [[escape(printable(line)) for line in str(cell).split("\n")] for cell in row]
        table.add_row(*map("\n".join, lines))
    return table


def _checkpoint(facts: Mapping[str, Any]) -> list[str | Table]:
    dtypes = ", ".join(f"{count} {name}" for name, count in facts["dtypes"].items())
    kind = ", ".join(map(str, facts["architectures"])) or facts["model_type"] or "unknown model"
    files = "1 file" if facts["shards"] == 1 else f"{facts['shards']} shards"
    return [
        f"{facts['path']}: checkpoint, {kind}, {size_text(facts['bytes'])} in {files}",
        f"  {facts['parameters']:,} parameters in {facts['tensors']} tensors ({dtypes})",
    ]


def _onnx(facts: Mapping[str, Any]) -> list[str | Table]:
    lines = ["  no FourierFT adapter"]
    if facts["adapter"]:
        mode = facts["adapter"]["mode"]
        lines = [
            f"  {mode}: adapter {one['name']}, {one['layers']} layers, seed {one['seed']}, "
            f"scaling {one['scaling']}, bundle {str(one['bundle_sha256'])[:12]}"
            for one in facts["adapter"]["adapters"]
        ] or [f"  {mode}: takes an adapter as inputs and holds none itself"]
    given = facts["inputs_with_default"]
    if given:
        lines.append(f"  {len(given)} more inputs, for an adapter, have defaults (see --json)")
    values = [
        (side[:-1], value["name"], value["dtype"], " x ".join(map(str, value["shape"])))
        for side in ("inputs", "outputs")
        for value in facts[side]
    ]
    return [
        f"{facts['path']}: ONNX, opset {facts['opset']}, {facts['nodes']} nodes, "
        f"{size_text(facts['bytes'])}",
        *lines,
        make_table(("", "name", "dtype", "shape"), values, fold=1),
    ]


def _onnx_adapter(facts: Mapping[str, Any]) -> list[str | Table]:
    values = [(v["name"], v["dtype"], " x ".join(map(str, v["shape"]))) for v in facts["inputs"]]
    return [
        f"{facts['path']}: adapter for ONNX Runtime, {size_text(facts['bytes'])}, of the inputs",
        make_table(("name", "dtype", "shape"), values),
    ]


_RENDERERS = {
    "bundle": _bundle,
    "pool": _pool,
    "adapter": _adapter,
    "adapter-config": _adapter,
    "checkpoint": _checkpoint,
    "onnx": _onnx,
    "onnx-adapter": _onnx_adapter,
}
