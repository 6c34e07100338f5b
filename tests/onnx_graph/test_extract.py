"""Bundles come back out of the files that hold them, bit for bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import fourierft_export as ff
from fourierft_export.errors import BadInputError, UsageError

KEY = "fourierft_export"
Variant = Callable[[ff.Bundle], ff.Bundle]


def as_bfloat16(bundle: ff.Bundle) -> ff.Bundle:
    spectra = {name: s.astype(ml_dtypes.bfloat16) for name, s in bundle.spectra.items()}
    return ff.Bundle.build(bundle.spec, spectra, bundle.saved)


def as_explicit(bundle: ff.Bundle) -> ff.Bundle:
    """The same entries in another order, which no seed gives."""
    from fourierft_export.spectral.entries import entries_sha256

    entries = {layer.name: bundle.entries(layer.name)[::-1].copy() for layer in bundle.layers}
    layers = tuple(
        replace(m, entry_rule="explicit", entries_sha256=entries_sha256(entries[m.name]))
        for m in bundle.layers
    )
    spec = replace(bundle.spec, layers=layers)
    spectra = {name: s[::-1].copy() for name, s in bundle.spectra.items()}
    return ff.Bundle.build(spec, spectra, bundle.saved, entries)


VARIANTS: dict[str, Variant] = {
    "bound": lambda bundle: bundle,
    "bfloat16": as_bfloat16,
    "explicit": as_explicit,
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


SAVED = {
    "head.weight": np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32),
    "head.bias": np.arange(3, dtype=np.float32),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain export of `Small`, its head used as it is stored."""
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    torch.manual_seed(0)
    x = torch.zeros(2, 8)
    io = {"input_names": ["x"], "output_names": ["y"], "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Small().eval(), (x,), path, dynamo=True, dynamic_shapes={"x": {0: "batch"}}, **io
        )
    return path


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["unmerged", "swappable", "bank"])
def test_every_kind_of_bundle(
    mode: str, variant: str, exported: Path, make_bundle: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    small = Small()
    weights = {name: small.get_submodule(name).weight.detach().numpy() for name in "ab"}
    bundle = VARIANTS[variant](make_bundle(["a", "b"], weights))
    ff.apply_onnx(exported, bundle, tmp_path / "out.onnx", mode=mode)
    assert ff.recover_onnx(tmp_path / "out.onnx")["default"].to_bytes() == bundle.to_bytes()


@pytest.mark.parametrize("mode", ["unmerged", "swappable", "paired", "bank"])
def test_applied_bundles_with_heads(
    mode: str, exported: Path, make_bundle: Any, tmp_path: Path
) -> None:
    bundle, out = make_bundle(["a", "b"], saved=SAVED), tmp_path / "out.onnx"
    ff.apply_onnx(exported, {"tenant": bundle}, out, mode=mode, weights=[0.5])
    got = ff.recover_onnx(tmp_path / "out.expand.onnx" if mode == "paired" else out)
    assert got["tenant"].to_bytes() == bundle.to_bytes()
    assert not got["tenant"].is_bound
    if mode == "paired":
        with pytest.raises(UsageError, match=r"expand\.onnx"):
            ff.recover_onnx(out)
        return  # the expander has no head
    # The head is in the graph once; the metadata names its place.
    record = json.loads({p.key: p.value for p in onnx.load(out).metadata_props}[KEY])
    tensors = record["adapters"]["tenant"]["bundle"]["tensors"]
    assert all("initializer" in tensors[name] for name in SAVED)


@pytest.mark.parametrize("mode", ["bank", "unmerged"])
def test_several_unlike_adapters(
    mode: str, exported: Path, make_bundle: Any, tmp_path: Path
) -> None:
    """Adapters that differ in seed, n, layers and heads."""
    bundles = {
        "one": make_bundle(["a", "b"], saved=SAVED),
        "two": make_bundle(["a"], n=20, seed=9, saved={"head.bias": np.ones(3, np.float32)}),
        "three": make_bundle(["b"], n=5, seed=9, scaling=2),
    }
    if mode == "unmerged":
        bundles["two"] = make_bundle(["a"], n=20, seed=9)  # one head only
    weights = [2.0, -1.0, 1.0] if mode == "unmerged" else None
    out = tmp_path / "out.onnx"
    ff.apply_onnx(exported, bundles, out, mode=mode, weights=weights)
    got = ff.recover_onnx(out)
    assert {k: b.to_bytes() for k, b in got.items()} == {
        k: b.to_bytes() for k, b in bundles.items()
    }


def test_adapters_of_quantised_layers(make_bundle: Any, tmp_path: Path, write_onnx: Any) -> None:
    """A DequantizeLinear by hand; the adapter is constants of a float branch."""
    integers = np.random.default_rng(0).integers(-127, 128, (8, 6)).astype(np.int8)
    constants = {"w": integers, "s": np.float32(0.01), "z": np.int8(0)}
    nodes = [
        ("DequantizeLinear", ["w", "s", "z"], ["d"]),
        ("MatMul", ["x", "d"], ["y"], {"name": "/a/MatMul"}),
    ]
    write_onnx(tmp_path / "in.onnx", nodes, constants, {"x": [2, 8]}, {"y": [2, 6]})
    bundle = make_bundle(["a"])
    for mode in ("unmerged", "swappable"):
        out = tmp_path / f"{mode}.onnx"
        ff.apply_onnx(tmp_path / "in.onnx", bundle, out, mode=mode)
        assert ff.recover_onnx(out)["default"].to_bytes() == bundle.to_bytes()


def test_a_changed_or_damaged_file_is_an_error(
    exported: Path, make_bundle: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    ff.apply_onnx(exported, make_bundle(["a"]), out, mode="unmerged")
    model = onnx.load(out)
    (tensor,) = (t for t in model.graph.initializer if t.name == "a.spectrum")
    values = numpy_helper.to_array(tensor).copy()
    values[3] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(BadInputError, match="adapter default"):
        ff.recover_onnx(tmp_path / "changed.onnx")
    (entry,) = (p for p in model.metadata_props if p.key == KEY)
    good = json.loads(entry.value)
    record = good["adapters"]["default"]["bundle"]
    for damage in (
        {"header": ""},
        {"header": "{}"},
        {"header": record["header"].replace("12", "99")},
        {"tensors": {}},
        {"tensors": None},
        {"tensors": {"fourierft.spectrum.0": 5}},
        {"tensors": {"fourierft.spectrum.0": []}},
        *(
            {"tensors": {"fourierft.spectrum.0": [place]}}
            for place in (
                {"initializer": "absent", "offset": 0},
                {"initializer": "a.spectrum", "offset": -1},
                {"initializer": "a.spectrum", "offset": 10**9},
                {"initializer": "a.spectrum"},
                {"initializer": "a.spectrum", "offset": True},
                {"data": "?"},
                {"data": "AAAA"},
            )
        ),
        {"header": record["header"] + " "},
    ):
        adapters = {"default": good["adapters"]["default"] | {"bundle": record | damage}}
        entry.value = json.dumps(good | {"adapters": adapters})
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises(BadInputError):
            ff.recover_onnx(tmp_path / "changed.onnx")
    older = {"spectra": {"a": {"initializer": "a.spectrum"}}, **record}
    adapters = {"default": good["adapters"]["default"] | {"bundle": older}}
    entry.value = json.dumps(good | {"adapters": adapters})
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(BadInputError, match=r"made by an older version.*; export it again"):
        ff.recover_onnx(tmp_path / "changed.onnx")
    for text in ("", "[]", "{}", '{"adapters": 3}', "[" * 100_000):
        entry.value = text
        onnx.save(model, tmp_path / "changed.onnx")
        with pytest.raises((BadInputError, UsageError)):
            ff.recover_onnx(tmp_path / "changed.onnx")


def test_files_without_spectra_say_so(exported: Path, make_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this package wrote"):
        ff.recover_onnx(exported)
    ff.apply_onnx(exported, make_bundle(["a"]), tmp_path / "merged.onnx")
    with pytest.raises(UsageError, match="mode merged"):
        ff.recover_onnx(tmp_path / "merged.onnx")
