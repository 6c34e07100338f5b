"""The files behind a session: external data that must not be read is refused at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import fourierft_export as ff
from fourierft_export.cli.main import run as run_command
from fourierft_export.errors import BadInputError, FileAccessError
from fourierft_export.onnx_graph.mode_names import expander_path
from fourierft_export.onnx_graph.runtime.exported_file import parameters_for

MODES = ("swappable", "paired", "bank")


def external(source: Path, target: Path) -> Path:
    """A copy of a model whose weights are in a file beside it."""
    onnx.save_model(
        onnx.load(source),
        target,
        save_as_external_data=True,
        location=f"{target.name}.bin",
        size_threshold=200,
    )
    return target.with_name(f"{target.name}.bin")


def hard_link(data: Path, elsewhere: Path) -> None:
    os.replace(data, elsewhere)
    os.link(elsewhere, data)


def link(data: Path, elsewhere: Path) -> None:
    os.replace(data, elsewhere)
    os.symlink(elsewhere, data)


def link_inside(data: Path, elsewhere: Path) -> None:
    inside = data.with_name("other.bin")
    os.replace(data, inside)
    os.symlink(inside.name, data)


def missing(data: Path, elsewhere: Path) -> None:
    os.replace(data, elsewhere)


def tampered(data: Path, elsewhere: Path) -> None:
    """The data ends early."""
    os.truncate(data, data.stat().st_size - 4)


@pytest.mark.parametrize("mode", MODES)
def test_external_data_serves_as_well(small_tenants: Any, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    external(small_tenants.file(mode), path)
    if mode == "paired":
        external(expander_path(small_tenants.file(mode)), expander_path(path))
    session = ff.AdapterSession(path)
    for name, bundle in small_tenants.bundles.items():
        session.load(name, bundle)
    for name in (None, "one", "two"):
        small_tenants.check(session.run(small_tenants.inputs, name)["output"], name)


@pytest.mark.parametrize("mode", [*MODES, "expander"])
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (hard_link, BadInputError, "hard link"),
        (link, BadInputError, "a link to"),
        (link_inside, BadInputError, "a link to"),
        (missing, FileAccessError, "external data"),
        (tampered, BadInputError, "bytes"),
    ],
)
def test_data_that_must_not_be_read(
    change: Callable[[Path, Path], None],
    error: type[Exception],
    says: str,
    mode: str,
    small_tenants: Any,
    tmp_path: Path,
) -> None:
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    file = small_tenants.file("paired" if mode == "expander" else mode)
    data = external(file, path)
    if mode in ("paired", "expander"):
        expanded = external(expander_path(file), expander_path(path))
        data = expanded if mode == "expander" else data
    change(data, tmp_path / "elsewhere")
    with pytest.raises(error, match=says):
        ff.AdapterSession(path)
    if mode != "bank":
        where = expander_path(path) if mode == "expander" else path
        with pytest.raises(error, match=says):
            parameters_for(where, small_tenants.bundles["one"])


def test_tensors_that_begin_at_one_place(small_tenants: Any, tmp_path: Path) -> None:
    """A shorter one of them is read to its own end."""
    path = tmp_path / "model.onnx"
    data = external(small_tenants.file("swappable"), path)
    model = onnx.load(path, load_external_data=False)
    (base,) = (t for t in model.graph.initializer if t.name == "fourierft.base.head.bias")
    longer = model.graph.initializer.add(name="longer", data_type=1, dims=[16], data_location=1)
    content = np.arange(16, dtype=np.float32)
    start = data.stat().st_size
    with data.open("ab") as file:
        file.write(content.tobytes())
    base.ClearField("raw_data")
    base.data_location = onnx.TensorProto.EXTERNAL
    for tensor in (base, longer):
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=data.name)
        tensor.external_data.add(key="offset", value=str(start))
    path.write_bytes(model.SerializeToString())
    bundle = small_tenants.bundles["one"]
    without = {name: array for name, array in bundle.saved.items() if name != "head.bias"}
    feeds = parameters_for(path, ff.Bundle(bundle.spec, bundle.spectra, without, {}))
    np.testing.assert_array_equal(feeds["head.bias"], content[:3])


@pytest.mark.parametrize("mode", MODES)
def test_links_within_the_folder_if_allowed(
    mode: str, small_tenants: Any, tmp_path: Path, capsys: Any
) -> None:
    """As from a store of models that keeps each content once; links that leave it stay refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    path, one = folder / "model.onnx", small_tenants.bundles["one"]
    link_inside(external(small_tenants.file(mode), path), tmp_path / "elsewhere")
    if mode == "paired":
        data = external(expander_path(small_tenants.file(mode)), expander_path(path))
        os.replace(data, folder / "expander.bin")
        data.symlink_to("expander.bin")
    session = ff.AdapterSession(path, allow_links=True)
    session.load("one", one)
    small_tenants.check(session.run(small_tenants.inputs, "one")["output"], "one")
    if mode != "bank":
        found = parameters_for(path, one, allow_links=True)
        np.testing.assert_array_equal(found["head.weight"], one.saved["head.weight"])
        arguments = ["pack", str(small_tenants.bundle_file("one")), "-o", str(tmp_path / "out")]
        arguments += ["--to", "onnx-adapter", "--onnx", str(path)]
        assert run_command(arguments) == 3
        assert "--allow-links" in capsys.readouterr().err
        assert run_command([*arguments, "--allow-links"]) == 0
    data = folder / "other.bin"
    link(data, tmp_path / "elsewhere")
    with pytest.raises(BadInputError):
        ff.AdapterSession(path, allow_links=True)
