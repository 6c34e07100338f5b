"""Merges that must not happen: the right error, and nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fourierft_export.bundle.file import Bundle
from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.merge.merge import merge_checkpoint

Array = np.ndarray[Any, Any]
MakeBundle = Callable[..., Bundle]
MODULES = ["bert.layer.0.query", "bert.layer.1.query"]


def weights(seed: int = 0, rows: int = 12) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {f"{name}.weight": random.standard_normal((rows, 8), np.float32) for name in MODULES}


MADE = '{"model_type": "made"}'


def checkpoint(directory: Path, tensors: dict[str, Array], config: str = MADE) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(config)
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", weights())


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [p.name for p in tmp_path.rglob("*") if "out" in p.name or "partial" in p.name]


def test_another_base_is_refused_with_every_layer(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    other = checkpoint(tmp_path / "other", weights(seed=1))
    bundle = make_bundle(base, MODULES)
    with pytest.raises(BaseMismatchError) as caught:
        merge_checkpoint(other, bundle, tmp_path / "out")
    assert [line.split(":")[0] for line in caught.value.offenders] == MODULES
    assert "--allow-base-mismatch" in caught.value.remedy
    assert caught.value.exit_code == 4
    with pytest.raises(BaseMismatchError):
        merge_checkpoint(other, bundle, tmp_path / "out", dry_run=True)


def test_another_base_passes_when_allowed(
    base: Path,
    tmp_path: Path,
    make_bundle: MakeBundle,
    exact_delta: Callable[..., Array],
) -> None:
    other = checkpoint(tmp_path / "other", weights(seed=1))
    bundle = make_bundle(base, MODULES)
    report = merge_checkpoint(other, bundle, tmp_path / "done", allow_base_mismatch=True)
    assert report.bundles[0].base_check == "mismatch"
    assert any("another base" in note for note in report.notes)
    found = load_file(tmp_path / "done" / "model.safetensors")
    for name in MODULES:
        exact = weights(seed=1)[f"{name}.weight"] + exact_delta(bundle, name)
        np.testing.assert_allclose(found[f"{name}.weight"], exact, rtol=1e-6, atol=1e-6)


def test_other_shapes_are_refused_even_when_allowed(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    other = checkpoint(tmp_path / "other", weights(rows=16))
    with pytest.raises(BaseMismatchError) as caught:
        merge_checkpoint(
            other, make_bundle(base, MODULES), tmp_path / "out", allow_base_mismatch=True
        )
    assert len(caught.value.offenders) == 2
    assert "shape [12, 8] expected, found [16, 8]" in caught.value.offenders[0]
    assert "--allow-base-mismatch" not in caught.value.remedy


@pytest.mark.parametrize("bound", [True, False])
def test_absent_layers_of_all_bundles_are_listed(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, bound: bool
) -> None:
    wide = {**weights(), "bert.layer.2.query.weight": np.ones((4, 4), np.float32)}
    larger = checkpoint(tmp_path / "larger", wide)
    a = make_bundle(larger, [*MODULES, "bert.layer.2.query"], bound=bound)
    b = make_bundle(larger, ["bert.layer.2.query"], bound=bound)
    with pytest.raises(BaseMismatchError) as caught:
        merge_checkpoint(base, [a, b], tmp_path / "out")
    assert [line.split(": ")[0] for line in caught.value.offenders] == [
        "bundle 1 (given as an object)", "bundle 2 (given as an object)",
    ]  # fmt: skip
    assert all("bert.layer.2.query" in line for line in caught.value.offenders)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_quantised_targets_are_refused_by_name(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, dtype: Any
) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    kind = torch.int8 if dtype is np.int8 else torch.float8_e4m3fn
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    tensors = {name: torch.from_numpy(value).to(kind) for name, value in weights().items()}
    save_torch(tensors, quantised / "model.safetensors")
    with pytest.raises(BaseMismatchError) as caught:
        merge_checkpoint(quantised, make_bundle(base, MODULES), tmp_path / "out")
    assert all("quantised" in line for line in caught.value.offenders)
    assert [line.split(":")[0] for line in caught.value.offenders] == MODULES


def test_float16_overflow_names_the_tensor(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(base, MODULES, scaling=1e9)
    with pytest.raises(BadInputError) as caught:
        merge_checkpoint(base, bundle, tmp_path / "out", dtype="float16")
    assert f"{MODULES[0]}.weight" in caught.value.where
    assert "bfloat16" in caught.value.remedy
    assert caught.value.exit_code == 3
    merge_checkpoint(base, bundle, tmp_path / "done", dtype="bfloat16")


def test_float16_overflow_of_an_untouched_tensor_is_refused_too(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    base = checkpoint(tmp_path / "base", {**weights(), "big": np.array([1.0, 70000.0], np.float32)})
    with pytest.raises(BadInputError, match="tensor big"):
        merge_checkpoint(base, make_bundle(base, MODULES), tmp_path / "out", dtype="float16")


def test_an_infinity_of_the_base_is_not_the_merges_fault(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    base = checkpoint(tmp_path / "base", {**weights(), "mask": np.array([-np.inf], np.float32)})
    merge_checkpoint(base, make_bundle(base, MODULES), tmp_path / "done", dtype="float16")
    assert load_file(tmp_path / "done" / "model.safetensors")["mask"] == -np.inf


def test_an_existing_output_is_refused(base: Path, tmp_path: Path, make_bundle: MakeBundle) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="--force"):
        merge_checkpoint(base, make_bundle(base, MODULES), tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("way", ["itself", "link", "inside", "above", "trailing"])
def test_the_base_is_never_the_output(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, way: str
) -> None:
    (tmp_path / "alias").symlink_to(base)
    out = {
        "itself": base,
        "link": tmp_path / "alias",
        "inside": tmp_path / "alias" / "merged",
        "above": tmp_path,
        "trailing": Path(os.fspath(base) + "/../base"),
    }[way]
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="apart from the"):
        merge_checkpoint(base, make_bundle(base, MODULES), out, force=True)
    assert (base / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in base.iterdir()) == ["config.json", "model.safetensors"]


def test_a_bundle_is_never_the_output(base: Path, tmp_path: Path, make_bundle: MakeBundle) -> None:
    path = make_bundle(base, MODULES).save(tmp_path / "a.fourierft.safetensors")
    with pytest.raises(UsageError, match="apart from the inputs"):
        merge_checkpoint(base / "model.safetensors", path, path, force=True)
    assert Bundle.load(path).layers


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "keep, float32, float16, bfloat16"),
        ({"weights": [1.0, 2.0]}, "one for each of 1"),
        ({"weights": [float("nan")]}, "one for each of 1"),
        ({"labels": ["a", "b"]}, "no head"),
    ],
)
def test_options_that_make_no_sense(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        merge_checkpoint(base, make_bundle(base, MODULES), tmp_path / "out", **options)


@pytest.mark.parametrize("labels", [["x", "x", "y"], ["x", "", "y"], ["x", "y"]])
def test_labels_are_one_name_of_its_own_for_each_row(
    base: Path, tmp_path: Path, make_bundle: MakeBundle, labels: list[str]
) -> None:
    bundle = make_bundle(base, MODULES, saved=heads(1, labels=3), task_type="SEQ_CLS")
    with pytest.raises(UsageError, match=r"labels: expected (a name of its own for each|3)"):
        merge_checkpoint(base, bundle, tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()


def test_no_bundles_at_all(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one or more"):
        merge_checkpoint(base, [], tmp_path / "out")


def test_missing_inputs(base: Path, tmp_path: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(base, MODULES)
    with pytest.raises(FileAccessError, match="absent"):
        merge_checkpoint(tmp_path / "absent", bundle, tmp_path / "out")
    with pytest.raises(FileAccessError, match="absent"):
        merge_checkpoint(base, tmp_path / "absent", tmp_path / "out")
    with pytest.raises(FileAccessError, match="nowhere"):
        merge_checkpoint(base, bundle, tmp_path / "nowhere" / "deep")


def test_a_folder_and_a_file_are_not_mixed_up(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(base, MODULES)
    with pytest.raises(UsageError, match="expected a folder"):
        merge_checkpoint(base, bundle, tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        merge_checkpoint(base / "model.safetensors", bundle, tmp_path / "out")


def heads(seed: int, labels: int = 2) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {"classifier.weight": random.standard_normal((labels, 8), np.float32)}


def test_bundles_with_different_heads_are_refused_and_with_the_same_head_not(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    a = make_bundle(base, MODULES, saved=heads(1), task_type="SEQ_CLS")
    b = make_bundle(base, MODULES, saved=heads(2), task_type="SEQ_CLS", numpy_seed=1)
    c = make_bundle(base, MODULES, saved=heads(1), task_type="SEQ_CLS", numpy_seed=1)
    with pytest.raises(UsageError) as caught:
        merge_checkpoint(base, [a, b], tmp_path / "out")
    assert "classifier.weight" in caught.value.offenders[0]
    merge_checkpoint(base, [a, c], tmp_path / "done")
    found = load_file(tmp_path / "done" / "model.safetensors")["classifier.weight"]
    np.testing.assert_array_equal(found, heads(1)["classifier.weight"])


def test_a_weight_both_replaced_and_adapted_is_refused(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    name = f"{MODULES[0]}.weight"
    a = make_bundle(base, MODULES, saved={name: np.ones((12, 8), np.float32)})
    with pytest.raises(UsageError) as caught:
        merge_checkpoint(base, a, tmp_path / "out")
    assert caught.value.offenders == (f"{name}: both replaced and adapted",)


def test_a_saved_tensor_of_another_shape_is_refused(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    tensors = {**weights(), f"{MODULES[0]}.bias": np.zeros(12, np.float32)}
    base = checkpoint(tmp_path / "base", tensors)
    bundle = make_bundle(base, MODULES, saved={f"{MODULES[0]}.bias": np.zeros(11, np.float32)})
    with pytest.raises(BaseMismatchError) as caught:
        merge_checkpoint(base, bundle, tmp_path / "out")
    assert f"{MODULES[0]}.bias: shape [11] expected, found [12]" in caught.value.offenders


def test_a_base_cut_short_while_it_is_read_is_an_error(
    base: Path, tmp_path: Path, make_bundle: MakeBundle
) -> None:
    bundle = make_bundle(base, MODULES)

    def cut(what: str, done: int, total: int) -> None:
        if what == "merging" and done:
            os.truncate(base / "model.safetensors", 300)

    with pytest.raises(BadInputError, match="changed"):
        merge_checkpoint(base, bundle, tmp_path / "out", progress=cut)
