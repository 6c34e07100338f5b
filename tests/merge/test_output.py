"""What a merge writes, carries over, leaves behind and reports: shards, files, manifest."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.errors import BadInputError
from fourierft_export.files.safetensors_reader import read_header

Array = np.ndarray[Any, Any]
MakeBundle = Callable[..., ff.Bundle]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FIRST = {"layers.0.q.weight": (12, 8), "layers.0.k.weight": (6, 8), "embed.weight": (20, 8)}
SECOND = {"layers.1.q.weight": (12, 8), "norm.weight": (8,)}
TARGETS = ["layers.0.q", "layers.1.q"]
FILES = {
    "config.json": '{"model_type": "made", "dtype": "float32"}',
    "tokenizer.json": "{}", "tokenizer.model": "pieces", "chat_template.jinja": "{{ x }}",
    "modeling_made.py": "x = 1", "README.md": "# made", "generation_config.json": "{}",
    "1_Pooling/config.json": '{"word_embedding_dimension": 8}',
    "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
    "2_Dense/pytorch_model.bin": "weights of the dense module",
    "2_Dense/model.safetensors": "weights of the dense module",
}  # fmt: skip
STALE = {
    "pytorch_model.bin": "old", "pytorch_model.bin.index.json": "{}", "tf_model.h5": "old",
    "flax_model.msgpack": "old", "onnx/model.onnx": "old", "onnx/config.json": "{}",
    "openvino/openvino_model.xml": "old", "model.onnx": "old", "model.fp16.safetensors": "old",
    "rust_model.ot": "old", "optimizer.pt": "old", "rng_state.pth": "old", "model.gguf": "old",
    "adapter_config.json": "{}", "adapter_model.safetensors": "old", "manifest.json": "{}",
    "original/consolidated.00.pth": "old",
}  # fmt: skip


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sharded checkpoint with all other files that a real one may have."""
    directory = tmp_path / "base"
    for name, text in {**FILES, **STALE}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    for shard, shapes, seed in zip(SHARDS, (FIRST, SECOND), (1, 2), strict=True):
        save_file(values(shapes, seed), directory / shard, {"format": "pt"})
    weight_map = {**dict.fromkeys(FIRST, SHARDS[0]), **dict.fromkeys(SECOND, SHARDS[1])}
    index = {"metadata": {"total_size": 1, "total_parameters": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_shards_keep_their_layout(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, exact_delta: Callable[..., Array]
) -> None:
    bundle = make_bundle(base, TARGETS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "left-over.txt").touch()
    calls: list[tuple[str, int, int]] = []
    report = ff.merge_checkpoint(
        base, bundle, tmp_path / "out", force=True, progress=lambda *call: calls.append(call)
    )
    assert not (tmp_path / "out" / "left-over.txt").exists()
    merging = [done for what, done, total in calls if what == "merging" and total == report.nbytes]
    assert merging == sorted(merging) and merging[-1] == report.nbytes
    for shard, shapes, seed in zip(SHARDS, (FIRST, SECOND), (1, 2), strict=True):
        found, before = load_file(tmp_path / "out" / shard), values(shapes, seed)
        assert set(found) == set(shapes)
        for name in shapes:
            module = name.removesuffix(".weight")
            delta = exact_delta(bundle, module) if module in TARGETS else 0.0
            np.testing.assert_allclose(found[name], before[name] + delta, rtol=1e-6, atol=1e-6)
            assert np.array_equal(found[name], before[name]) == (module not in TARGETS)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    original = json.loads((base / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == original["weight_map"]
    elements = 12 * 8 + 6 * 8 + 20 * 8 + 12 * 8 + 8
    assert index["metadata"] == {"total_size": 4 * elements, "total_parameters": elements}
    assert report.nbytes == 4 * elements


def test_files_that_are_not_weights_are_copied_and_stale_weights_are_not(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    report = ff.merge_checkpoint(base, make_bundle(base, TARGETS), tmp_path / "out")
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == before
    out = tmp_path / "out"
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert there == {*FILES, *SHARDS, "model.safetensors.index.json", "manifest.json"}
    for name, text in FILES.items():
        assert (out / name).read_text() == text
    assert set(report.carried) == set(FILES)
    assert set(report.left_behind) == set(STALE)
    (base / "modules.json").unlink()  # which says that the weights in folders are modules
    plan = ff.merge_checkpoint(base, make_bundle(base, TARGETS), tmp_path / "x", dry_run=True)
    modules = {"2_Dense/pytorch_model.bin", "2_Dense/model.safetensors"}
    assert set(plan.left_behind) == set(STALE) | modules


def test_the_manifest_identifies_the_base(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    """By the hashes of copied shards and of its own manifest; the contract pins the rest."""
    report = ff.merge_checkpoint(base, make_bundle(base, TARGETS[:1]), tmp_path / "out")
    found = json.loads((tmp_path / "out/manifest.json").read_text())["base"]
    second = (base / SHARDS[1]).read_bytes()
    assert (tmp_path / "out" / SHARDS[1]).read_bytes() == second
    assert found == {
        "name": "base",
        "shards": {
            SHARDS[0]: {"bytes": (base / SHARDS[0]).stat().st_size},
            SHARDS[1]: {"bytes": len(second), "sha256": hashlib.sha256(second).hexdigest()},
        },
        "manifest_sha256": hashlib.sha256(STALE["manifest.json"].encode()).hexdigest(),
    }
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["name"] == "layers.0.q"


def test_file_modes_follow_the_umask(base: Path, tmp_path: Path, make_bundle: MakeBundle) -> None:
    old = os.umask(0o027)
    try:
        ff.merge_checkpoint(base, make_bundle(base, TARGETS), tmp_path / "out")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_the_manifest_names_the_bundles(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(base, TARGETS)
    ff.to_peft(bundle, tmp_path / "adapter")
    path = bundle.save(tmp_path / "b.fourierft.safetensors")
    monkeypatch.chdir(tmp_path / "adapter")
    ff.merge_checkpoint(base, [".", "../adapter/", path, bundle], tmp_path / "out")
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["bundles"]
    names = ["adapter", "adapter", "b.fourierft.safetensors", "bundle 4 (given as an object)"]
    assert [one["name"] for one in found] == names


def test_a_single_file_gives_a_single_file(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, exact_delta: Callable[..., Array]
) -> None:
    source = base / SHARDS[0]
    bundle = make_bundle(source, TARGETS[:1])
    report = ff.merge_checkpoint(source, bundle, tmp_path / "out.safetensors")
    found, before = load_file(tmp_path / "out.safetensors"), values(FIRST, 1)
    delta = exact_delta(bundle, TARGETS[0])
    np.testing.assert_allclose(
        found["layers.0.q.weight"], before["layers.0.q.weight"] + delta, rtol=1e-6, atol=1e-6
    )
    np.testing.assert_array_equal(found["embed.weight"], before["embed.weight"])
    assert read_header(tmp_path / "out.safetensors").metadata == {"format": "pt"}
    digest = hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest()
    assert report.shards == {SHARDS[0]: digest}
    assert report.notes == ("a single file has no manifest.json",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out.safetensors"]


def test_dtypes_of_tensors_that_are_not_floats_stay(
    tmp_path: Path, make_bundle: MakeBundle, tensors_of: Callable[[Path], dict[str, Array]]
) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        "q.weight": torch.ones(4, 6), "ids": torch.arange(3), "flag": torch.tensor([True]),
        "table": torch.ones(3, dtype=torch.float16), "odd": torch.arange(3, dtype=torch.int8),
        "scaled": torch.arange(5.0).to(torch.float8_e4m3fn), "bias": torch.ones(3),
        "positions": torch.arange(3, dtype=torch.int32),
    }  # fmt: skip
    save_torch(tensors, base / "model.safetensors", {"format": "pt"})
    ff.merge_checkpoint(base, make_bundle(base, ["q"]), tmp_path / "out", dtype="bfloat16")
    before, found = tensors_of(base), tensors_of(tmp_path / "out")
    assert {name: value.dtype.name for name, value in found.items()} == {
        "q.weight": "bfloat16", "ids": "int64", "flag": "bool", "table": "bfloat16", "odd": "int8",
        "scaled": "float8_e4m3fn", "bias": "bfloat16", "positions": "int32",
    }  # fmt: skip
    for name in ("ids", "flag", "odd", "scaled", "positions"):
        assert found[name].tobytes() == before[name].tobytes()
    # Every payload must be aligned to its element size, or readers cannot view it in place.
    infos = read_header(tmp_path / "out" / "model.safetensors").tensors.values()
    assert all(info.start % found[info.name].dtype.itemsize == 0 for info in infos)


def test_several_bundles_with_weights_add_up(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, exact_delta: Callable[..., Array]
) -> None:
    a = make_bundle(base, TARGETS, numpy_seed=1)
    b = make_bundle(base, TARGETS[:1], numpy_seed=2, seed=5, n_frequency=7, scaling=-20.0)
    report = ff.merge_checkpoint(base, [a, b], tmp_path / "out", weights=[0.7, -1.5])
    first = load_file(tmp_path / "out" / SHARDS[0])["layers.0.q.weight"].astype(np.float64)
    second = load_file(tmp_path / "out" / SHARDS[1])["layers.1.q.weight"].astype(np.float64)
    deltas = [0.7 * exact_delta(a, TARGETS[0]), -1.5 * exact_delta(b, TARGETS[0])]
    exact = values(FIRST, 1)["layers.0.q.weight"] + sum(deltas)
    np.testing.assert_allclose(first, exact, rtol=0, atol=1e-6)
    exact = values(SECOND, 2)["layers.1.q.weight"] + 0.7 * exact_delta(a, TARGETS[1])
    np.testing.assert_allclose(second, exact, rtol=0, atol=1e-6)
    assert [(entry.weight, entry.layers) for entry in report.bundles] == [(0.7, 2), (-1.5, 1)]


def test_a_dry_run_writes_nothing_and_says_what_would_be(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(base, TARGETS)
    planned = ff.merge_checkpoint(base, bundle, tmp_path / "out", dtype="float16", dry_run=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    done = ff.merge_checkpoint(base, bundle, tmp_path / "out", dtype="float16")
    layers = tuple(replace(layer, survival=None, error=None) for layer in done.layers)
    assert planned == replace(done, dry_run=True, shards={}, layers=layers, notes=planned.notes)


def test_low_survival_is_noted_with_the_remedy(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, tensors_of: Callable[..., Any]
) -> None:
    bundle = make_bundle(base, TARGETS, scaling=0.05)
    report = ff.merge_checkpoint(base, bundle, tmp_path / "out", dtype="bfloat16")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for layer in report.layers:
        rounded = before[layer.tensor].astype(ml_dtypes.bfloat16)
        changed = (after[layer.tensor] != rounded).mean()
        assert layer.survival == pytest.approx(changed, abs=1e-12)
        assert layer.survival is not None and layer.survival < 0.5
    (note,) = [note for note in report.notes if "less than half" in note]
    assert "--dtype float32" in note and "2 of 2 layers" in note
    # A layer to which nothing was added does not count.
    a, b = make_bundle(base, TARGETS[:1]), make_bundle(base, TARGETS[1:])
    none = ff.merge_checkpoint(base, [a, b], tmp_path / "none", weights=[1.0, 0.0])
    assert none.layers[1].survival == 0 and none.notes == ()
    full = ff.merge_checkpoint(base, bundle, tmp_path / "full", dtype="float32")
    assert all(layer.survival is not None and layer.survival > 0.9 for layer in full.layers)
    assert full.notes == ()


def test_a_weight_with_nan_has_no_error_and_is_named(tmp_path: Path, make_base: Any) -> None:
    base = make_base(tmp_path / "base", shards=2, size=16)
    tensors = load_file(base / SHARDS[1])
    tensors["layers.1.q.weight"][2, 3] = np.nan
    save_file(tensors, base / SHARDS[1], {"format": "pt"})
    spec = AdapterSpec(7, 50.0, tuple(LayerSpec(name, 9) for name in TARGETS))
    bundle = ff.Bundle.build(spec, dict.fromkeys(TARGETS, np.ones(9, np.float32)))
    report = ff.merge_checkpoint(base, bundle, tmp_path / "out")
    good, bad = report.layers
    assert good.error is not None and good.error < 1e-4 and bad.error is None
    assert report.notes[-1].startswith("layers.1.q.weight: NaN or infinity in the base's weight")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tensors"]["layers.1.q.weight"]["error"] is None
    assert np.isnan(load_file(tmp_path / "out" / SHARDS[1])["layers.1.q.weight"]).sum() == 1


def test_an_unbound_bundle_is_bound_and_said_to_be_unchecked(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    unbound = make_bundle(base, TARGETS, bound=False)
    report = ff.merge_checkpoint(base, unbound, tmp_path / "a")
    assert report.bundles[0].base_check == "unbound"
    assert any("no check was possible" in note for note in report.notes)
    ff.merge_checkpoint(base, make_bundle(base, TARGETS), tmp_path / "b")
    for shard in SHARDS:
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_a_snapshot_of_the_hugging_face_cache_becomes_plain_files(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(base, TARGETS)
    ff.merge_checkpoint(base, bundle, tmp_path / "plain")
    repository = tmp_path / "models--o--n"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "rev"
    for number, file in enumerate(sorted(p for p in base.rglob("*") if p.is_file())):
        place = snapshot / file.relative_to(base)
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        place.symlink_to(os.path.relpath(blob, place.parent))
    ff.merge_checkpoint(snapshot, bundle, tmp_path / "out")
    for file in (tmp_path / "plain").rglob("*"):
        copy = tmp_path / "out" / file.relative_to(tmp_path / "plain")
        assert not copy.is_symlink()
        if file.is_file() and file.name != "manifest.json":
            assert copy.read_bytes() == file.read_bytes()
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "plain" / "config.json")
    with pytest.raises(BadInputError, match="a link to"):
        ff.merge_checkpoint(snapshot, bundle, tmp_path / "again")
