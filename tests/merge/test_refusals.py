"""Merges that must not happen: the right error, and nothing written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fourierft_export as ff
from fourierft_export.errors import (
    BadInputError,
    BaseMismatchError,
    FileAccessError,
    FourierFTError,
    UsageError,
)

Array = np.ndarray[Any, Any]
MODULES = ["bert.layer.0.query", "bert.layer.1.query"]


def weights(seed: int = 0, rows: int = 12) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {f"{name}.weight": random.standard_normal((rows, 8), np.float32) for name in MODULES}


def checkpoint(directory: Path, tensors: dict[str, Array]) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text('{"model_type": "made"}')
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", weights())


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [p.name for p in tmp_path.rglob("*") if "out" in p.name or "partial" in p.name]


def head(seed: int, labels: int = 2) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {"classifier.weight": random.standard_normal((labels, 8), np.float32)}


@pytest.mark.parametrize("dry_run", [False, True])
def test_another_base_is_refused_with_every_layer_and_passes_when_allowed(
    base: Path, tmp_path: Path, make_bundle: Any, exact_delta: Any, dry_run: bool
) -> None:
    other = checkpoint(tmp_path / "other", weights(seed=1))
    bundle = make_bundle(base, MODULES)
    with pytest.raises(BaseMismatchError) as caught:
        ff.merge_checkpoint(other, bundle, tmp_path / "out", dry_run=dry_run)
    assert [line.split(":")[0] for line in caught.value.offenders] == MODULES
    assert "--allow-base-mismatch" in caught.value.remedy
    assert caught.value.exit_code == 4
    options = {"allow_base_mismatch": True, "dry_run": dry_run}
    report = ff.merge_checkpoint(other, bundle, tmp_path / "done", **options)
    assert report.bundles[0].base_check == "mismatch"
    assert any("another base" in note for note in report.notes)
    if not dry_run:
        found = load_file(tmp_path / "done" / "model.safetensors")
        for name in MODULES:
            exact = weights(seed=1)[f"{name}.weight"] + exact_delta(bundle, name)
            np.testing.assert_allclose(found[f"{name}.weight"], exact, rtol=1e-6, atol=1e-6)


def test_misfits_of_all_bundles_are_listed_even_when_allowed(
    base: Path, tmp_path: Path, make_bundle: Any
) -> None:
    """Other shapes, absent layers, a bias of another shape: bound and unbound bundles."""
    third = "bert.layer.2.query"
    tensors = {**weights(), f"{third}.weight": np.ones((4, 4), np.float32)}
    larger = checkpoint(tmp_path / "larger", {**tensors, f"{MODULES[0]}.bias": np.ones(12, "f")})
    other = checkpoint(tmp_path / "other", {**weights(rows=16), f"{MODULES[0]}.bias": np.ones(16)})
    saved = {f"{MODULES[0]}.bias": np.zeros(12, np.float32)}
    bundles = [
        make_bundle(larger, [*MODULES, third], saved=saved),
        make_bundle(larger, [third], bound=False),
    ]
    with pytest.raises(BaseMismatchError) as caught:
        ff.merge_checkpoint(other, bundles, tmp_path / "out", allow_base_mismatch=True)
    one, two = (f"bundle {number} (given as an object): " for number in (1, 2))
    assert [line.split(" (near")[0] for line in caught.value.offenders] == [
        f"{one}{MODULES[0]}: shape [12, 8] expected, found [16, 8]",
        f"{one}{MODULES[1]}: shape [12, 8] expected, found [16, 8]",
        f"{one}{third}: no tensor {third}.weight",
        f"{one}{MODULES[0]}.bias: shape [12] expected, found [16]",
        f"{two}{third}: no tensor {third}.weight",
    ]
    assert "--allow-base-mismatch" not in caught.value.remedy


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_targets_are_refused_by_name(
    base: Path, tmp_path: Path, make_bundle: Any, dtype: str
) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    quantised = tmp_path / "quantised"
    quantised.mkdir()
    kind = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(value).to(kind) for name, value in weights().items()}
    save_torch(tensors, quantised / "model.safetensors")
    with pytest.raises(BaseMismatchError) as caught:
        ff.merge_checkpoint(quantised, make_bundle(base, MODULES), tmp_path / "out")
    assert all("quantised" in line for line in caught.value.offenders)
    assert [line.split(":")[0] for line in caught.value.offenders] == MODULES


def test_float16_overflow_names_the_tensor(base: Path, tmp_path: Path, make_bundle: Any) -> None:
    bundle = make_bundle(base, MODULES, scaling=1e9)
    with pytest.raises(BadInputError) as caught:
        ff.merge_checkpoint(base, bundle, tmp_path / "out", dtype="float16")
    assert f"{MODULES[0]}.weight" in caught.value.where
    assert "bfloat16" in caught.value.remedy
    ff.merge_checkpoint(base, bundle, tmp_path / "done", dtype="bfloat16")
    tensors = {**weights(), "big": np.array([1.0, 70000.0], np.float32)}
    untouched = checkpoint(tmp_path / "untouched", tensors)
    with pytest.raises(BadInputError, match="tensor big"):
        ff.merge_checkpoint(
            untouched, make_bundle(base, MODULES), tmp_path / "out", dtype="float16"
        )
    # An infinity of the base is not the merge's fault.
    masked = checkpoint(tmp_path / "m", {**weights(), "mask": np.array([-np.inf], np.float32)})
    ff.merge_checkpoint(masked, make_bundle(base, MODULES), tmp_path / "half", dtype="float16")
    assert load_file(tmp_path / "half" / "model.safetensors")["mask"] == -np.inf


@pytest.mark.parametrize("way", ["itself", "link", "inside", "above", "trailing", "bundle"])
def test_inputs_are_never_the_output(
    base: Path, tmp_path: Path, make_bundle: Any, way: str
) -> None:
    (tmp_path / "alias").symlink_to(base)
    bundle = make_bundle(base, MODULES).save(tmp_path / "a.safetensors")
    out = {
        "itself": base,
        "link": tmp_path / "alias",
        "inside": tmp_path / "alias" / "merged",
        "above": tmp_path,
        "trailing": Path(os.fspath(base) + "/../base"),
        "bundle": bundle,
    }[way]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    source = base / "model.safetensors" if way == "bundle" else base
    with pytest.raises(UsageError, match="apart from the inputs"):
        ff.merge_checkpoint(source, bundle, out, force=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"dtype": "int8"}, UsageError, "keep, float32, float16, bfloat16"),
        ({"weights": [1.0, 2.0]}, UsageError, "one for each of 1"),
        ({"weights": [float("nan")]}, UsageError, "one for each of 1"),
        ({"labels": ["a", "b"]}, UsageError, "no head"),
        ({"bundles": []}, UsageError, "one or more"),
        ({"base": "absent"}, FileAccessError, "absent"),
        ({"bundles": "absent"}, FileAccessError, "absent"),
        ({"out": "nowhere/deep"}, FileAccessError, "nowhere"),
        ({"out": "there"}, UsageError, "--force"),
        ({"out": ""}, UsageError, "an empty path"),
        ({"out": "x\0y"}, UsageError, "a NUL in the path"),
        ({"base": "x\0y"}, UsageError, "a NUL in the path"),
        ({"out": "out.safetensors"}, UsageError, "expected a folder"),
        ({"base": "base/model.safetensors"}, UsageError, r"ends in \.safetensors"),
    ],
)
def test_arguments_that_make_no_sense(
    base: Path, tmp_path: Path, make_bundle: Any, monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any], error: type[FourierFTError], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    given = {"base": "base", "bundles": make_bundle(base, MODULES), "out": "out"} | change
    with pytest.raises(error, match=says):
        ff.merge_checkpoint(**given)
    assert not [*Path("there").iterdir()]


@pytest.mark.parametrize("labels", [["x", "x", "y"], ["x", "", "y"], ["x", "y"]])
def test_labels_are_one_name_of_its_own_for_each_row(
    base: Path, tmp_path: Path, make_bundle: Any, labels: list[str]
) -> None:
    bundle = make_bundle(base, MODULES, saved=head(1, labels=3), task_type="SEQ_CLS")
    with pytest.raises(UsageError, match=r"labels: expected (different names|3)"):
        ff.merge_checkpoint(base, bundle, tmp_path / "out", labels=labels)


def test_bundles_that_set_one_tensor_to_different_values_are_refused(
    base: Path, tmp_path: Path, make_bundle: Any
) -> None:
    a, b, c = (
        make_bundle(base, MODULES, saved=head(seed), task_type="SEQ_CLS", numpy_seed=number)
        for number, seed in enumerate((1, 2, 1))
    )
    with pytest.raises(UsageError) as caught:
        ff.merge_checkpoint(base, [a, b], tmp_path / "out")
    assert "classifier.weight" in caught.value.offenders[0]
    ff.merge_checkpoint(base, [a, c], tmp_path / "done")
    found = load_file(tmp_path / "done" / "model.safetensors")["classifier.weight"]
    np.testing.assert_array_equal(found, head(1)["classifier.weight"])
    name = f"{MODULES[0]}.weight"
    both = make_bundle(base, MODULES, saved={name: np.ones((12, 8), np.float32)})
    with pytest.raises(UsageError) as caught:
        ff.merge_checkpoint(base, both, tmp_path / "out")
    assert caught.value.offenders == (f"{name}: both replaced and adapted",)


def test_links_and_special_files_of_a_base(base: Path, tmp_path: Path, make_bundle: Any) -> None:
    bundle = make_bundle(base, MODULES)
    (tmp_path / "secret").write_text("secret")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    for dry_run in (True, False):
        with pytest.raises(BadInputError, match="a link to"):
            ff.merge_checkpoint(base, bundle, tmp_path / "out", dry_run=dry_run, allow_links=True)
    (base / "vocab.txt").unlink()
    os.mkfifo(base / "pipe.txt")
    with pytest.raises(BadInputError, match="FIFO"):
        ff.merge_checkpoint(base, bundle, tmp_path / "out", dry_run=True)
    (base / "pipe.txt").unlink()
    # Links within the folder are followed when they are allowed.
    (base / "store").mkdir()
    for name in ("model.safetensors", "config.json"):
        (base / name).rename(base / "store" / name)
        (base / name).symlink_to(f"store/{name}")
    with pytest.raises(BadInputError, match="--allow-links"):
        ff.merge_checkpoint(base, bundle, tmp_path / "out")
    ff.merge_checkpoint(base, bundle, tmp_path / "done", allow_links=True)
    assert not (tmp_path / "done" / "config.json").is_symlink()
    assert json.loads((tmp_path / "done" / "config.json").read_text()) == {"model_type": "made"}
