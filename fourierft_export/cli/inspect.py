"""inspect: what a bundle, adapter directory, checkpoint or ONNX file holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from .console import Outcome, size_text, verb
from .options import PATH

if TYPE_CHECKING:
    from rich.table import Table


@verb
@click.argument("path", type=PATH)
def inspect(path: str) -> Outcome:
    """Tell what PATH holds: a bundle, a PEFT adapter, a checkpoint or an ONNX file."""
    facts = describe(path)
    notes = facts.pop("notes", ())
    return Outcome({"inspect": facts}, _RENDERERS[facts["kind"]](facts), notes)


def describe(path: str) -> dict[str, Any]:
    """The facts of whatever lies at `path`; its kind is under "kind".

    Raises:
        FileAccessError: nothing there.
        BadInputError: none of the kinds that are known.
    """
    from ..bundle.describe import describe_adapter, describe_adapter_config, describe_bundle
    from ..bundle.file import Bundle
    from ..bundle.peft import CONFIG_FILE
    from ..errors import FileAccessError
    from ..files.container import read_header
    from ..models.base import describe_base

    if not os.path.lexists(path):
        raise FileAccessError(path, expected="a file or directory", found="nothing there")
    if os.path.isdir(path):
        holds_adapter = os.path.isfile(os.path.join(path, CONFIG_FILE)) or (
            not os.path.isfile(os.path.join(path, "config.json"))
            and any(os.path.isfile(os.path.join(e.path, CONFIG_FILE)) for e in os.scandir(path))
        )
        return describe_adapter(path) if holds_adapter else describe_base(path)
    if path.endswith(".onnx"):
        from ..onnx_graph.describe import describe_onnx

        return describe_onnx(path)
    if path.endswith(".json"):
        return describe_adapter_config(path)
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


def _adapter(facts: Mapping[str, Any]) -> list[str | Table]:
    config = facts["config"]
    return [
        f"{facts['path']}: PEFT FourierFT adapter"
        + (f", {size_text(facts['bytes'])} of tensors" if facts.get("bytes") else ", config only"),
        f"  seed {config.get('random_loc_seed', 777)}, scaling {config.get('scaling', 150.0)}, "
        f"n_frequency {config.get('n_frequency', 1000)}, "
        f"task {config.get('task_type') or 'unknown'}, "
        f"base {config.get('base_model_name_or_path') or 'unnamed'}",
        f"  target modules: {_listed(config.get('target_modules'))}",
        *_layers(facts),
    ]


def _listed(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _layers(facts: Mapping[str, Any]) -> list[str | Table]:
    """Tables of the layers and of the dense tensors."""
    from rich.table import Column, Table

    shown: list[str | Table] = []
    if facts.get("groups"):
        columns = ("count", "shape", "n_frequency", "dtype", "entry rule")
        table = Table(Column("layers", overflow="fold"), *columns)
        for group in facts["groups"]:
            shape = " x ".join(map(str, group["shape"])) if group["shape"] else "?"
            table.add_row(
                "\n".join(map(_plain, group["layers"])),
                str(group["count"]),
                shape + (" (stored transposed)" if group["fan_in_fan_out"] else ""),
                str(group["n_frequency"]),
                group["dtype"],
                group["entry_rule"] or "?",
            )
        shown.append(table)
    if facts.get("saved"):
        table = Table(Column("saved tensor", overflow="fold"), "shape", "dtype")
        for tensor in facts["saved"]:
            shape = " x ".join(map(str, tensor["shape"])) or "scalar"
            table.add_row(_plain(tensor["name"]), shape, tensor["dtype"])
        shown.append(table)
    return shown


def _plain(text: str) -> str:
    """Text that rich shows as it is: no markup, no control characters."""
    from rich.markup import escape

    from ..errors import printable

    return escape(printable(text))


def _checkpoint(facts: Mapping[str, Any]) -> list[str | Table]:
    dtypes = ", ".join(f"{count} {name}" for name, count in facts["dtypes"].items())
    kind = ", ".join(map(str, facts["architectures"])) or facts["model_type"] or "unknown model"
    files = "1 file" if facts["shards"] == 1 else f"{facts['shards']} shards"
    return [
        f"{facts['path']}: checkpoint, {kind}, {size_text(facts['bytes'])} in {files}",
        f"  {facts['parameters']:,} parameters in {facts['tensors']} tensors ({dtypes})",
    ]


def _onnx(facts: Mapping[str, Any]) -> list[str | Table]:
    from rich.table import Column, Table

    table = Table("", Column("name", overflow="fold"), "dtype", "shape")
    for side in ("inputs", "outputs"):
        for value in facts[side]:
            shape = " x ".join(map(str, value["shape"]))
            table.add_row(side[:-1], _plain(value["name"]), value["dtype"], _plain(shape))
    told = ["  no FourierFT adapter"]
    if facts["adapter"]:
        mode = facts["adapter"]["mode"]
        told = [
            f"  {mode}: adapter {one['name']}, {one['layers']} layers, seed {one['seed']}, "
            f"scaling {one['scaling']}, bundle {str(one['bundle_sha256'])[:12]}"
            for one in facts["adapter"]["adapters"]
        ] or [f"  {mode}: its inputs take an adapter, and it holds none"]
    given = facts["inputs_with_default"]
    if given:
        told.append(f"  {len(given)} inputs have a default, so that an adapter can be fed (--json)")
    return [
        f"{facts['path']}: ONNX, opset {facts['opset']}, {facts['nodes']} nodes, "
        f"{size_text(facts['bytes'])}",
        *told,
        table,
    ]


_RENDERERS = {
    "bundle": _bundle,
    "adapter": _adapter,
    "adapter-config": _adapter,
    "checkpoint": _checkpoint,
    "onnx": _onnx,
}
