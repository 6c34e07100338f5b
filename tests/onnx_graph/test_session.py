"""AdapterSession over all modes: against PyTorch, in threads, without torch, with bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import fourierft_export as ff
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.onnx_graph.runtime.adapter_file import write_adapter
from fourierft_export.onnx_graph.runtime.exported_file import parameters_for
from fourierft_export.onnx_graph.runtime.ort_session import device_of

RUNTIME_MODES = ("swappable", "paired", "bank")


def one_thread() -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def opened(tenants: Any, mode: str, **options: Any) -> ff.AdapterSession:
    session = ff.AdapterSession(tenants.file(mode), session_options=one_thread(), **options)
    for name, bundle in tenants.bundles.items():
        session.load(name, bundle)
    return session


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_every_adapter_and_the_base(small_tenants: Any, mode: str) -> None:
    session = opened(small_tenants, mode)
    assert (session.mode, session.adapters) == (mode, ("one", "two"))
    assert (session.inputs, session.outputs) == (("x",), ("output",))
    for name in ("one", None, "two", "one"):
        got = session.run(small_tenants.inputs, name)
        small_tenants.check(got["output"], name)
    names = ["two", None, "one", "one", "two"]
    got = session.run(small_tenants.inputs, names)
    for row, name in enumerate(names):
        small_tenants.check(got["output"][row], name, rows=row)


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_minilm_equals_peft_row_by_row(minilm_tenants: Any, mode: str) -> None:
    session = opened(minilm_tenants, mode)
    names = ["one", "two"] * 6
    got = session.run(minilm_tenants.inputs, names)["logits"]
    for row, name in enumerate(names):
        minilm_tenants.check(got[row], name, rows=row)


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_files_that_hold_their_adapter_for_good(small_tenants: Any, mode: str) -> None:
    session = ff.AdapterSession(small_tenants.file(mode))
    assert session.adapters == ("one",)
    for adapter in (None, session.adapters[0]):
        small_tenants.check(session.run(small_tenants.inputs, adapter)["output"], "one")
    with pytest.raises(UsageError, match="is fixed in the file"):
        session.run(small_tenants.inputs, "two")
    with pytest.raises(UsageError, match="swappable, paired or bank"):
        session.load("two", small_tenants.bundles["two"])


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_sources_of_adapters(small_tenants: Any, mode: str, tmp_path: Path) -> None:
    session = ff.AdapterSession(small_tenants.file(mode))
    bundle = small_tenants.bundles["two"]
    ff.to_peft(bundle, tmp_path / "peft")
    written = tmp_path / "two.onnx_adapter"
    write_adapter(written, parameters_for(small_tenants.file("swappable"), bundle))
    unbound = [replace(m, shape=None, entry_rule=None, entries_sha256=None) for m in bundle.layers]
    unbound = [replace(layer, fingerprint=None) for layer in unbound]
    sources = [
        bundle,
        small_tenants.bundle_file("two"),
        str(tmp_path / "peft"),
        written,
        ff.Bundle.build(replace(bundle.spec, layers=tuple(unbound)), bundle.spectra, bundle.saved),
    ]
    for number, source in enumerate(sources):
        session.load(f"two {number}", source)
        got = session.run(small_tenants.inputs, f"two {number}")
        small_tenants.check(got["output"], "two")


def test_an_adapter_of_less_leaves_the_rest_to_the_base(small_tenants: Any) -> None:
    """No head, no biases, one layer: everything else is the base's, not the exported adapter's."""
    bundle = small_tenants.bundles["two"]
    layers = tuple(layer for layer in bundle.layers if layer.name == "b")
    small = ff.Bundle.build(replace(bundle.spec, layers=layers), {"b": bundle.spectra["b"] * 0})
    for mode in RUNTIME_MODES:
        session = ff.AdapterSession(small_tenants.file(mode))
        session.load("small", small)
        small_tenants.check(session.run(small_tenants.inputs, "small")["output"], None)


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_loading_and_unloading_beside_running_threads(small_tenants: Any, mode: str) -> None:
    session = opened(small_tenants, mode, memory_limit=1)

    def work(name: str | None) -> list[np.ndarray]:
        return [session.run(small_tenants.inputs, name)["output"] for _ in range(25)]

    with ThreadPoolExecutor(4) as threads:
        waiting = {name: threads.submit(work, name) for name in ("one", "two", None)}
        for number in range(25):
            session.load(f"more {number}", small_tenants.bundles["two"])
            session.unload(f"more {number}")
        for name, results in waiting.items():
            for got in results.result():
                small_tenants.check(got, name)


def test_adapted_weights_are_kept_up_to_a_limit(small_tenants: Any) -> None:
    session = opened(small_tenants, "paired")
    session.load("three", small_tenants.bundles["two"])
    assert session.resident == {}
    for name in ("one", "two", "three", "one"):
        session.run(small_tenants.inputs, name)
    assert list(session.resident) == ["two", "three", "one"]
    (size,) = set(session.resident.values())
    assert size == 4 * (3 * 12 * 20 + 20 + 12 + 3 + 3 * 20)
    limited = opened(small_tenants, "paired", memory_limit=2 * size)
    limited.load("three", small_tenants.bundles["two"])
    for name in ("one", "two", "one", "three"):
        limited.prepare(name)
    assert list(limited.resident) == ["one", "three"]
    small_tenants.check(limited.run(small_tenants.inputs, "two")["output"], "two")
    limited.unload("two")
    assert list(limited.resident) == ["three"]
    for name in (None, "one"):  # the base's weights take as much
        small_tenants.check(limited.run(small_tenants.inputs, name)["output"], name)
    assert limited.resident == {None: size, "one": size}
    limited.prepare("three")
    assert list(limited.resident) == ["one", "three"]


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_adapters_that_do_not_belong(small_tenants: Any, mode: str) -> None:
    session = ff.AdapterSession(small_tenants.file(mode))
    bundle = small_tenants.bundles["one"]
    other = replace(bundle.layers[0].fingerprint, digest=bytes(16))
    layers = (replace(bundle.layers[0], fingerprint=other), *bundle.layers[1:])
    moved = ff.Bundle.build(replace(bundle.spec, layers=layers), bundle.spectra, bundle.saved)
    with pytest.raises(BaseMismatchError) as caught:
        session.load("moved", moved)
    assert caught.value.offenders == ("a: another weight than the adapter was trained on",)
    session.load("moved", moved, allow_base_mismatch=True)
    small_tenants.check(session.run(small_tenants.inputs, "moved")["output"], "one")
    names = {"a": "z", "b": "b", "c": "c"}
    layers = tuple(replace(layer, name=names[layer.name]) for layer in bundle.layers)
    spectra = {names[name]: spectrum for name, spectrum in bundle.spectra.items()}
    saved = {"head.bias": np.zeros(4, np.float32), "tail.weight": np.zeros(2, np.float32)}
    wrong = ff.Bundle.build(replace(bundle.spec, layers=layers), spectra, saved)
    with pytest.raises(BaseMismatchError) as caught:
        session.load("wrong", wrong)
    assert len(caught.value.offenders) == 3
    assert "z: the graph has no adapter input" in caught.value.offenders[0]
    assert session.adapters == ("moved",)


def test_adapter_files_that_do_not_fit(small_tenants: Any, tmp_path: Path) -> None:
    session = ff.AdapterSession(small_tenants.file("swappable"))
    good = parameters_for(small_tenants.file("swappable"), small_tenants.bundles["one"])
    entries = good["fourierft.entries.0"].copy()
    entries[3, 1] = 12

    def filled(name: str, value: float) -> dict[str, np.ndarray]:
        return {name: np.full_like(good[name], value)}

    bad = {
        r"spectrum\.0: NaN": filled("fourierft.spectrum.0", np.nan),
        r"scaling\.0: NaN or inf": filled("fourierft.scaling.0", np.inf),
        r"head\.bias: NaN": filled("head.bias", np.nan),
        "no coefficients": {
            "fourierft.entries.0": np.zeros((0, 2), np.int64),
            "fourierft.spectrum.0": np.zeros((2, 0), np.float32),
        },
        "outside": {"fourierft.entries.0": entries},
        "no such input": {"strange": np.zeros(3, np.float32)},
        "found int32": {"fourierft.entries.0": good["fourierft.entries.0"].astype(np.int32)},
        "float32 \\[2, 40\\]": {"fourierft.spectrum.0": np.zeros((3, 40), np.float32)},
    }
    for number, (match, change) in enumerate(bad.items()):
        path = tmp_path / f"{number}.onnx_adapter"
        write_adapter(path, good | change)
        with pytest.raises(BadInputError, match=match):
            session.load("bad", path)
    garbage = tmp_path / "garbage.onnx_adapter"
    garbage.write_bytes(b"garbage" * 10)
    with pytest.raises(BadInputError, match="an ONNX Runtime adapter"):
        session.load("bad", garbage)
    assert session.adapters == ()


def test_mistakes_at_a_run(small_tenants: Any) -> None:
    session = opened(small_tenants, "swappable")
    inputs = small_tenants.inputs
    for adapter, match in (("three", "load it first"), (["one", None], "for each of 5 rows")):
        with pytest.raises(UsageError, match=match):
            session.run(inputs, adapter)
    with pytest.raises(UsageError, match="x: missing"):
        session.run({}, "one")
    # ONNX Runtime itself would take the caller's value, and say nothing.
    with pytest.raises(UsageError, match="belongs to the adapter"):
        session.run({**inputs, "head.bias": np.zeros(3, np.float32)}, "one")
    with pytest.raises(UsageError, match="load it first"):
        session.unload("three")


@pytest.mark.parametrize("mode", RUNTIME_MODES)
def test_inputs_that_onnx_runtime_refuses(small_tenants: Any, mode: str) -> None:
    session = opened(small_tenants, mode)
    x = small_tenants.inputs["x"]
    for wrong in (x.astype(np.float64), x[0], x[:, :, :5]):
        with pytest.raises(UsageError, match="inputs: expected what the model takes"):
            session.run({"x": wrong}, "one")


@pytest.mark.parametrize("mode", ["swappable", "paired"])
def test_a_batch_of_no_rows(small_tenants: Any, mode: str) -> None:
    session = opened(small_tenants, mode)
    got = session.run({"x": small_tenants.inputs["x"][:0]}, [])["output"]
    assert got.shape == (0, 3)


def test_files_that_are_not_ours(small_tenants: Any, tmp_path: Path) -> None:
    with pytest.raises(FileAccessError):
        ff.AdapterSession(tmp_path / "absent.onnx")
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage" * 10)
    with pytest.raises(BadInputError, match="an ONNX model"):
        ff.AdapterSession(garbage)
    model = onnx.load(small_tenants.file("swappable"))
    model.graph.node[0].op_type = "Unheard"
    onnx.save(model, tmp_path / "unheard.onnx")
    with pytest.raises(BadInputError, match="ONNX Runtime loads"):
        ff.AdapterSession(tmp_path / "unheard.onnx")
    model = onnx.load(small_tenants.file("swappable"))
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    with pytest.raises(BadInputError, match="metadata"):
        ff.AdapterSession(tmp_path / "plain.onnx")
    lonely = tmp_path / "lonely.onnx"
    lonely.write_bytes(small_tenants.file("paired").read_bytes())
    with pytest.raises(FileAccessError, match=r"lonely\.expand\.onnx"):
        ff.AdapterSession(lonely)


DAMAGE: dict[str, Any] = {
    "a layer without inputs": lambda d: d["inputs"]["groups"].pop(),
    "a layer of another size": lambda d: d["inputs"]["groups"][0].update(shape=[9, 12]),
    "a layer outside its weight": lambda d: d["weights"]["a"][0].update(start=5),
    "a start of another type": lambda d: d["weights"]["a"][0].update(start="5"),
    "weights that are no list": lambda d: d.update(weights=[]),
    "a weight that is not there": lambda d: d["weights"]["a"][0].update(initializer="zz"),
    "an unknown dtype": lambda d: d["inputs"]["groups"][0].update(dtype="strange"),
    "an absurd shape": lambda d: d["inputs"]["saved"][0].update(shape=[1 << 40, 1 << 40]),
    "an unknown mode": lambda d: d.update(mode="melted"),
    "no rows": lambda d: d["inputs"].pop("rows"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metadata_of_a_paired_graph(
    damage: str, small_tenants: Any, tmp_path: Path
) -> None:
    for suffix in (".onnx", ".expand.onnx"):
        model = onnx.load(small_tenants.file("paired").with_suffix(suffix))
        (entry,) = (one for one in model.metadata_props if one.key == "fourierft_export")
        content = json.loads(entry.value)
        DAMAGE[damage](content)
        entry.value = json.dumps(content)
        onnx.save(model, (tmp_path / "model").with_suffix(suffix))
    with pytest.raises(BadInputError, match=r"model\.(expand\.)?onnx"):
        ff.AdapterSession(tmp_path / "model.onnx")


SCRIPT = """
import sys
sys.modules["torch"] = None
import numpy as np
import fourierft_export as ff
folder, rows = sys.argv[1], np.load(sys.argv[2])
for mode in ("swappable", "paired", "bank"):
    session = ff.AdapterSession(f"{folder}/{mode}.onnx")
    session.load("two", f"{folder}/two.fourierft.safetensors")
    np.save(f"{sys.argv[3]}/{mode}.npy", session.run({"x": rows}, "two")["output"])
"""


def test_without_torch_and_without_a_word(small_tenants: Any, tmp_path: Path) -> None:
    for mode in RUNTIME_MODES:
        small_tenants.file(mode)
    rows = tmp_path / "x.npy"
    np.save(rows, small_tenants.inputs["x"])
    arguments = [str(small_tenants.folder), str(rows), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for mode in RUNTIME_MODES:
        small_tenants.check(np.load(tmp_path / f"{mode}.npy"), "two")


@pytest.mark.parametrize(("given", "want"), [("0", "0"), ("1", "1"), (None, "1")])
def test_the_callers_options_stay(given: str | None, want: str, small_tenants: Any) -> None:
    """What avoids saturated int8 sums is added only where the caller did not choose."""
    options, entry = ort.SessionOptions(), "session.x64quantprecision"
    options.log_severity_level = 1
    if given is not None:
        options.add_session_config_entry(entry, given)
    ff.AdapterSession(small_tenants.file("merged"), session_options=options)
    assert options.log_severity_level == 1
    assert options.get_session_config_entry(entry) == want


def test_values_go_to_the_device_of_the_session(small_tenants: Any) -> None:
    cuda = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert device_of(cuda, {cuda[0]: {"device_id": "3"}, cuda[1]: {}}) == ("cuda", 3)
    assert device_of(cuda, {}) == ("cuda", 0)
    session = ort.InferenceSession(small_tenants.file("merged"), one_thread(), providers=cuda[1:])
    assert device_of(session.get_providers(), session.get_provider_options()) == ("cpu", 0)
