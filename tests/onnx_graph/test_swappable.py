"""Mode swappable: one graph, any adapter, fed by name or through ONNX Runtime's adapter API."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import fourierft_export as ff
from fourierft_export.cli.main import run as run_command
from fourierft_export.errors import BadInputError, BaseMismatchError, UsageError
from fourierft_export.onnx_graph.runtime.adapter_file import read_adapter, write_adapter
from fourierft_export.onnx_graph.runtime.exported_file import parameters_for
from fourierft_export.spectral.entries import entries_sha256


def by_hand(bundle: ff.Bundle) -> dict[str, np.ndarray]:
    """What FORMAT.md says the small model is fed: groups in the order of their first layers."""
    groups: dict[Any, list[str]] = {}
    for layer in bundle.layers:
        groups.setdefault((layer.shape, layer.n_frequency), []).append(layer.name)
    feeds: dict[str, np.ndarray] = dict(bundle.saved)
    for i, names in enumerate(groups.values()):
        feeds[f"fourierft.spectrum.{i}"] = np.stack([bundle.spectra[name] for name in names])
        feeds[f"fourierft.entries.{i}"] = bundle.entries(names[0])
        feeds[f"fourierft.scaling.{i}"] = np.full(len(names), bundle.spec.scaling, np.float32)
    return feeds


def test_inputs_mirror_the_bundles_groups(small_tenants: Any) -> None:
    model = onnx.load(small_tenants.file("swappable"))
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in model.graph.input
    }
    assert shapes == {
        "x": ["batch", "tokens", 12],
        "a.bias": [20],
        "b.bias": [12],
        "head.bias": [3],
        "head.weight": [3, 20],
        "fourierft.spectrum.0": [2, "fourierft.n.0"],
        "fourierft.entries.0": ["fourierft.n.0", 2],
        "fourierft.scaling.0": [2],
        "fourierft.spectrum.1": [1, "fourierft.n.1"],
        "fourierft.entries.1": ["fourierft.n.1", 2],
        "fourierft.scaling.1": [1],
    }
    assert model.ir_version >= 4
    assert not model.functions


@pytest.mark.parametrize("evaluator", ["ort", "reference"])
def test_two_adapters_fed_by_hand(small_tenants: Any, run: Any, evaluator: str) -> None:
    path = small_tenants.file("swappable")

    def output(feeds: dict[str, np.ndarray]) -> np.ndarray:
        if evaluator == "ort":
            return run(path, feeds)["output"]
        return ReferenceEvaluator(str(path)).run(None, feeds)[0]

    feeds = small_tenants.inputs
    for name, bundle in small_tenants.bundles.items():
        small_tenants.check(output({**feeds, **by_hand(bundle)}), name)
    if evaluator == "ort":
        small_tenants.check(output(feeds), "one")


@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
def test_inputs_that_must_be_fed(small_tenants: Any, mode: str, tmp_path: Path) -> None:
    """For runtimes that cannot feed inputs with a default, such as onnxruntime-node."""
    path = tmp_path / "required.onnx"
    small_tenants.export(mode, path, defaults="required")
    model = onnx.load(path)
    assert not {v.name for v in model.graph.input} & {t.name for t in model.graph.initializer}
    session = ff.AdapterSession(path)
    session.load("two", small_tenants.bundles["two"])
    for name in (None, "two"):
        small_tenants.check(session.run(small_tenants.inputs, name)["output"], name)


def test_onnx_adapter_files_through_onnx_runtimes_own_api(
    minilm_tenants: Any, tmp_path: Path
) -> None:
    """Without this package: a session, an adapter file, run options."""
    path = minilm_tenants.file("swappable")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for name in minilm_tenants.bundles:
        out = tmp_path / f"{name}.onnx_adapter"
        source = str(minilm_tenants.bundle_file(name))
        arguments = ["--to", "onnx-adapter", "--onnx", str(path), "-o", str(out)]
        assert run_command(["pack", source, *arguments]) == 0
        adapter = ort.LoraAdapter()
        adapter.Load(str(out))
        run_options = ort.RunOptions()
        run_options.add_active_adapter(adapter)
        (got,) = session.run(None, minilm_tenants.inputs, run_options)
        minilm_tenants.check(got, name)
        parameters = read_adapter(out)
        assert {a.dtype.name for a in parameters.values()} == {"float32", "int64"}


def test_several_active_adapters_do_not_fit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    for name in "ab":
        ff.inject(model, ff.FourierFTConfig(n_frequency=9, target_modules=["0"]), name)
    ff.activate(model, ["a", "b"])
    with pytest.raises(UsageError, match="expected one adapter, found a, b"):
        ff.export_onnx(model, torch.zeros(2, 6), tmp_path / "m.onnx", mode="swappable")
    assert list(tmp_path.iterdir()) == []


def test_layers_of_several_seeds_share_one_graph(small_tenants: Any, run: Any) -> None:
    """Layers whose entries differ where the graph has one group: zeros fill what is not theirs."""
    bundle = small_tenants.bundles["two"]
    other = {"c": np.array([[0, 1], [5, 7], [19, 11]])}
    layers = tuple(
        replace(
            layer, n_frequency=3, entry_rule="explicit", entries_sha256=entries_sha256(other["c"])
        )
        if layer.name == "c"
        else layer
        for layer in bundle.layers
    )
    spectra = {**bundle.spectra, "c": np.zeros(3, np.float32)}
    mixed = ff.Bundle.build(replace(bundle.spec, layers=layers), spectra, bundle.saved, other)
    without_c = {**by_hand(bundle)}
    without_c["fourierft.spectrum.0"] = without_c["fourierft.spectrum.0"] * [[1], [0]]
    without_c["fourierft.spectrum.0"] = without_c["fourierft.spectrum.0"].astype(np.float32)
    path = small_tenants.file("swappable")
    feeds = parameters_for(path, mixed)
    assert feeds["fourierft.spectrum.0"].shape == (2, 28)
    got = run(path, {**small_tenants.inputs, **feeds})["output"]
    want = run(path, {**small_tenants.inputs, **without_c})["output"]
    np.testing.assert_allclose(got, want, atol=1e-6)
    changed = {**spectra, "c": np.array([3.0, 2.0, 1.0], np.float32)}
    again = ff.Bundle.build(mixed.spec, changed, bundle.saved, other)
    moved = run(path, {**small_tenants.inputs, **parameters_for(path, again)})["output"]
    assert np.abs(moved - want).max() > 1e-3


def test_pack_for_onnx_names_its_mistakes(
    small_tenants: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(small_tenants.bundle_file("one")), str(tmp_path / "one.onnx_adapter")
    to = ["--to", "onnx-adapter", "-o", out]
    bank = str(small_tenants.file("bank"))
    for arguments, found in (
        ([source, *to], "name it with --onnx"),
        ([source, "--onnx", bank, "-o", out], "name it with --onnx"),
        ([source, "--onnx", bank, *to], "found mode bank"),
    ):
        assert run_command(["pack", *arguments]) == 2
        assert found in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_tells_the_base_of_an_unbound_bundle(
    small_tenants: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, bundle = small_tenants.file("swappable"), small_tenants.bundles["one"]
    nothing = {"shape": None, "entry_rule": None, "entries_sha256": None, "fingerprint": None}
    layers = tuple(replace(layer, **nothing) for layer in bundle.layers)
    unbound = ff.Bundle.build(replace(bundle.spec, layers=layers), bundle.spectra, bundle.saved)
    unbound.save(tmp_path / "unbound")
    for source, said in (
        (small_tenants.bundle_file("one"), "was checked against the graph's base"),
        (tmp_path / "unbound", "so it was not checked against the graph's base"),
    ):
        out = ["--to", "onnx-adapter", "--onnx", str(path), "-o", f"{source.name}.onnx_adapter"]
        out[-1] = str(tmp_path / out[-1])
        assert run_command(["pack", str(source), *out]) == 0
        assert said in " ".join(capsys.readouterr().err.split())
    session = ff.AdapterSession(path)
    caplog.clear()
    session.load("bound", bundle)
    session.load("unbound", unbound)
    (message,) = caplog.messages
    assert "'unbound': no check was possible" in message


def test_adapter_files_of_a_paired_graph_hold_its_weights(
    small_tenants: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through ONNX Runtime's adapter API, as og.Adapters uses it; the expander has its own file."""
    path, bundle = small_tenants.file("paired"), small_tenants.bundles["two"]
    expander = path.with_suffix(".expand.onnx")
    spectral = {
        f"fourierft.{kind}.{i}" for kind in ("spectrum", "entries", "scaling") for i in "01"
    }
    assert parameters_for(expander, bundle).keys() == spectral
    assert parameters_for(path, bundle, both_graphs=True).keys() == spectral | {*bundle.saved}
    out = tmp_path / "two.onnx_adapter"
    to = ["--to", "onnx-adapter", "--onnx", str(path), "-o", str(out)]
    assert run_command(["pack", str(small_tenants.bundle_file("two")), *to]) == 0
    assert {*read_adapter(out)} == {"a.weight", "b.weight", "c.weight", *bundle.saved}
    capsys.readouterr()
    assert run_command(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["inspect"]
    assert facts["inputs"][1] == {"name": "a.weight", "dtype": "float32", "shape": [12, 20]}
    assert run_command(["inspect", str(out)]) == 0
    assert "c.weight" in capsys.readouterr().out
    adapter, options, run_options = ort.LoraAdapter(), ort.SessionOptions(), ort.RunOptions()
    adapter.Load(str(out))
    run_options.add_active_adapter(adapter)
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, small_tenants.inputs, run_options)
    small_tenants.check(got, "two")


@pytest.mark.parametrize("mode", ["swappable", "paired", "bank"])
def test_a_head_that_the_base_lacks_must_come_with_the_adapter(
    small_tenants: Any, mode: str, tmp_path: Path
) -> None:
    path, bundle = tmp_path / "m.onnx", small_tenants.bundles["one"]
    head = ["head.weight", "head.bias"]
    small_tenants.export(mode, path, absent=head)
    session = ff.AdapterSession(path)
    session.load("one", bundle)
    small_tenants.check(session.run(small_tenants.inputs, "one")["output"], "one")
    np.testing.assert_array_equal(session.run(small_tenants.inputs)["output"], 0)
    biases = {name: array for name, array in bundle.saved.items() if name not in head}
    headless = ff.Bundle.build(bundle.spec, bundle.spectra, biases)
    with pytest.raises(BaseMismatchError) as caught:
        session.load("headless", headless)
    assert [line.partition(":")[0] for line in caught.value.offenders] == sorted(head)
    if mode == "bank":
        return
    with pytest.raises(BaseMismatchError, match="2 layers or tensors that do not fit"):
        parameters_for(path, headless)
    written = tmp_path / "headless.onnx_adapter"
    parameters = parameters_for(path, bundle, both_graphs=True)
    write_adapter(written, {k: v for k, v in parameters.items() if k != "head.bias"})
    with pytest.raises(BadInputError, match=r"head\.bias: missing"):
        session.load("headless", written)


def test_a_bank_has_no_row_for_an_adapter_without_the_head(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), torch.randn(2, 8)
    for name, saved in (("one", ["1"]), ("two", None)):
        config = ff.FourierFTConfig(n_frequency=9, target_modules=["0"], modules_to_save=saved)
        ff.inject(model, config, name)
    with pytest.raises(BaseMismatchError, match="neither has"):
        ff.export_onnx(model, (x,), tmp_path / "m.onnx", mode="bank", absent=["1.weight", "1.bias"])
    assert list(tmp_path.iterdir()) == []


def test_the_report_tells_of_a_head_that_the_base_lacks(minilm_tenants: Any) -> None:
    path = minilm_tenants.file("swappable")
    content = json.loads(
        {p.key: p.value for p in onnx.load(path).metadata_props}["fourierft_export"]
    )
    marked = [saved["name"] for saved in content["inputs"]["saved"] if saved.get("absent")]
    assert marked == ["classifier.bias", "classifier.weight"]
    (note,) = (n for n in minilm_tenants.reports["swappable"].notes if "base has no" in n)
    assert "classifier.weight" in note
