"""The bundle back out of a merged checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fourierft_export as ff
from fourierft_export.errors import BaseMismatchError, UsageError, ValidationError
from fourierft_export.recover.spectrum import compute_spectrum, judge_spectrum
from fourierft_export.spectral.delta import Term, reference_delta
from fourierft_export.spectral.entries import spectral_entries

Array = np.ndarray[Any, Any]
MakeBase = Callable[..., Path]
MakeBundle = Callable[..., ff.Bundle]
LAYERS = [f"layers.{number}.q" for number in range(2)]


def known(bundle: ff.Bundle, name: str) -> Array:
    """A layer's spectrum as far as delta_W determines it: entries that mirror each other share."""
    rows, columns = bundle.layer(name).shape or (0, 0)
    index = {tuple(entry): k for k, entry in enumerate(bundle.entries(name).tolist())}
    mirrors = [index.get((-u % rows, -v % columns), k) for k, (u, v) in enumerate(index)]
    spectrum = bundle.spectra[name].astype(np.float64)
    return (spectrum + spectrum[mirrors]) / 2


def error_of(found: ff.Bundle, expected: ff.Bundle) -> float:
    """The largest relative error of a layer's spectrum."""
    pairs = [(found.spectra[n].astype(np.float64), known(expected, n)) for n in expected.spectra]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


SHAPES = [(1, 1), (1, 8), (7, 1), (2, 2), (8, 6), (9, 15), (16, 16), (5, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_delta_gives_back_its_spectrum(shape: tuple[int, int], share: float) -> None:
    """Mirrored pairs are in these entries: only their sums are known, and shared equally."""
    n = max(1, int(share * shape[0] * shape[1]))
    entries = spectral_entries(3, shape, n)
    random = np.random.default_rng(0)
    spectrum = random.standard_normal(n)
    weight = random.standard_normal(shape)
    delta = reference_delta(spectrum, entries, shape, 5.0)
    found = compute_spectrum(weight, weight + delta, entries, 5.0)
    index = {tuple(entry): k for k, entry in enumerate(entries.tolist())}
    mirrors = [index.get((-u % shape[0], -v % shape[1]), k) for k, (u, v) in enumerate(index)]
    expected = np.array([(spectrum[k] + spectrum[m]) / 2 for k, m in enumerate(mirrors)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * max(shape) ** 2)
    assert share < 1 or min(shape) < 3 or any(m != k for k, m in enumerate(mirrors))
    again = reference_delta(found, entries, shape, 5.0)
    np.testing.assert_allclose(again, delta, rtol=0, atol=1e-12 * max(shape) ** 2)


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 2e-5), ("float16", 1e-2), ("bfloat16", 6e-2)]
)
def test_a_merged_checkpoint_gives_back_its_bundle(
    tmp_path: Path, make_base: MakeBase, make_bundle: MakeBundle, dtype: str, most: float
) -> None:
    base = make_base(tmp_path / "base", shards=2, size=256)
    bundle = make_bundle(base, LAYERS, n_frequency=64, scaling=150.0, seed=11)
    ff.merge_checkpoint(base, bundle, tmp_path / "out", dtype=dtype)
    for options in ({"like": bundle}, {"seed": 11, "n_frequency": 64, "targets": ["q"]}):
        found, report = ff.recover_bundle(base, tmp_path / "out", **options)  # type: ignore[arg-type]
        error = error_of(found, bundle)
        assert error < most
        # The reported uncertainty is what really came of rounding.
        worst = max(layer.uncertainty for layer in report.layers)
        assert error < 2 * worst and (dtype == "float32" or error > worst / 4)
        assert all(0.5 < layer.residual < 1.2 for layer in report.layers) or dtype == "float32"
        assert [layer.name for layer in report.layers] == LAYERS
        assert [replace(layer, fingerprint=None) for layer in found.layers] == [
            replace(layer, fingerprint=None) for layer in bundle.layers
        ]
        assert found.is_bound and not found.saved
    again = ff.merge_checkpoint(base, found, tmp_path / "again", dtype="float32")
    assert again.bundles[0].base_check == "same"


def test_what_peft_merges_is_recovered_with_its_head(
    tmp_path: Path, tiny_model: Any, tiny_base: Any, tiny_adapter: Any, load_peft: Any
) -> None:
    """PEFT's own merge, whose names have a prefix that the bare base lacks."""
    fields = {"target_modules": ["query", "value"], "scaling": 60.0}
    folder = tiny_adapter("bert-cls", **fields)
    tiny_model("bert-cls").bert.save_pretrained(tmp_path / "base")
    peft = load_peft(tiny_base("bert-cls"), folder).merge_and_unload()
    peft.save_pretrained(tmp_path / "merged")
    adapter = ff.from_peft(folder, tmp_path / "base")
    found, report = ff.recover_bundle(tmp_path / "base", tmp_path / "merged", like=adapter)
    assert error_of(found, adapter) < 1e-3
    assert set(found.saved) == set(adapter.saved) == {"classifier.weight", "classifier.bias"}
    for name, value in adapter.saved.items():
        np.testing.assert_array_equal(found.saved[name], value)
    assert found.spec.peft_config == adapter.spec.peft_config
    blind, _ = ff.recover_bundle(
        tmp_path / "base", tmp_path / "merged", seed=adapter.spec.seed, n_frequency=24,
        targets=["query", "value"], scaling=60.0,
    )  # fmt: skip
    assert error_of(blind, adapter) < 1e-3
    assert set(blind.saved) == set(adapter.saved)
    assert blind.spec.task_type == adapter.spec.task_type == "SEQ_CLS"  # as the merged config says
    assert report.saved == tuple(found.saved)


def test_transposed_weights(tmp_path: Path, tiny_gpt2: Path, make_bundle: MakeBundle) -> None:
    bundle = make_bundle(tiny_gpt2, ["transformer.h.0.attn.c_attn"], n_frequency=100, scaling=300.0)
    ff.merge_checkpoint(tiny_gpt2, bundle, tmp_path / "out")
    found, _ = ff.recover_bundle(tiny_gpt2, tmp_path / "out", like=bundle)
    delta, expected = (
        reference_delta(b.spectra[n], b.entries(n), (96, 32), 300.0)
        for b in (found, bundle)
        for n in b.spectra
    )
    np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory, make_base: MakeBase, make_bundle: MakeBundle
) -> Path:
    """A folder with a base and what a merge of seed 11, n 64, made of it in bfloat16."""
    folder = tmp_path_factory.mktemp("recover")
    base = make_base(folder / "base", shards=2, size=128, dtype=ml_dtypes.bfloat16)
    bundle = make_bundle(base, LAYERS, n_frequency=64, scaling=150.0, seed=11)
    ff.merge_checkpoint(base, bundle, folder / "out")
    return folder


@pytest.fixture
def merged(original: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the base and of the merged checkpoint."""
    for name in ("base", "out"):
        shutil.copytree(original / name, tmp_path / name)
    return tmp_path / "base", tmp_path / "out"


RIGHT: dict[str, Any] = {"seed": 11, "n_frequency": 64, "targets": ["q"]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 12}, "the difference leaves"),
        ({"n_frequency": 32}, "the difference leaves"),
        ({"targets": ["layers.0.q"]}, "layers.1.q.weight: changed, but not a layer"),
        ({"targets": ["k"]}, "equal to the base"),
    ],
)
def test_a_difference_of_another_kind_is_refused(
    merged: tuple[Path, Path], options: dict[str, Any], says: str
) -> None:
    base, out = merged
    ff.recover_bundle(base, out, **RIGHT)
    with pytest.raises(ValidationError) as caught:
        ff.recover_bundle(base, out, **{**RIGHT, **options})
    assert says in "\n".join(caught.value.offenders)
    assert caught.value.exit_code == 5


def edit(folder: Path, name: str, change: Callable[[Array], Array]) -> None:
    (file,) = (f for f in folder.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def test_other_changes_of_an_adapted_weight_are_refused(merged: tuple[Path, Path]) -> None:
    """A fine-tune of one layer, and one element of another that was changed by hand."""
    base, out = merged
    noise = (np.random.default_rng(5).standard_normal((128, 128)) * 3e-3).astype(np.float32)
    edit(out, "layers.1.q.weight", lambda w: (w.astype(np.float32) + noise).astype(w.dtype))
    nudge = np.zeros((128, 128), ml_dtypes.bfloat16)
    nudge[3, 4] = 0.125
    edit(out, "layers.0.q.weight", lambda w: w + nudge)
    with pytest.raises(ValidationError, match="2 weights") as caught:
        ff.recover_bundle(base, out, **RIGHT)
    assert [line.split(":")[0] for line in caught.value.offenders] == LAYERS


def test_noise_below_rounding_is_not_taken_for_an_adapter() -> None:
    """A change that rounding could explain, but that has nothing to do with the entries."""
    weight = np.random.default_rng(0).standard_normal((256, 256)).astype(ml_dtypes.bfloat16)
    random = np.random.default_rng(1)
    bits = weight.view(np.uint16) + (random.random((256, 256)) < 0.02).astype(np.uint16)
    entries = spectral_entries(11, (256, 256), 64)
    after = bits.view(ml_dtypes.bfloat16)
    spectrum = compute_spectrum(weight, after, entries, 150.0)
    found = judge_spectrum("w", weight, after, Term(spectrum, entries, 150.0))
    assert found.residual < 1.5
    assert found.objection.endswith("no more in these entries than in others")


def test_unchanged_layers_have_zero_spectra(
    merged: tuple[Path, Path], make_bundle: MakeBundle
) -> None:
    base, out = merged
    edit(out, "layers.1.q.weight", lambda w: load_file(
        base / "model-00002-of-00002.safetensors")["layers.1.q.weight"])  # fmt: skip
    found, report = ff.recover_bundle(base, out, **RIGHT)
    assert not found.spectra["layers.1.q"].any() and found.spectra["layers.0.q"].any()
    assert any("1 of 2 layers have the weights of the base" in note for note in report.notes)
    shutil.rmtree(out)
    shutil.copytree(base, out)
    with pytest.raises(ValidationError, match="2 weights"):
        ff.recover_bundle(base, out, **RIGHT)


def test_biases_come_along_and_other_tensors_are_refused(
    tmp_path: Path, make_bundle: MakeBundle
) -> None:
    random = np.random.default_rng(0)
    tensors = {
        "a.weight": random.standard_normal((64, 48)).astype(np.float32),
        "a.bias": np.zeros(64, np.float32), "norm.weight": np.ones(48, np.float32),
        "ids": np.arange(3),
    }  # fmt: skip
    for folder in ("base", "out"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "made"}')
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    bias = np.ones(64, np.float32)
    bundle = make_bundle(tmp_path / "base", ["a"], saved={"a.bias": bias}, n_frequency=20)
    ff.merge_checkpoint(tmp_path / "base", bundle, tmp_path / "out", force=True)
    options: dict[str, Any] = {"seed": 777, "n_frequency": 20, "targets": ["a"], "scaling": 50.0}
    for chosen in (options, {"like": bundle}):
        found, report = ff.recover_bundle(tmp_path / "base", tmp_path / "out", **chosen)
        assert report.saved == ("a.bias",)
        np.testing.assert_array_equal(found.saved["a.bias"], bias)
    saved = {"a.bias": bias, "score.weight": np.ones((2, 64), np.float32)}
    more = make_bundle(tmp_path / "base", ["a"], saved=saved, n_frequency=20)
    found, report = ff.recover_bundle(tmp_path / "base", tmp_path / "out", like=more)
    assert set(found.saved) == {"a.bias"}
    assert "so not in the bundle: score.weight" in report.notes[-1]
    edit(tmp_path / "out", "norm.weight", lambda w: w * 2)
    edit(tmp_path / "out", "ids", lambda w: w + 1)
    for chosen in (options, {"like": bundle}):
        with pytest.raises(ValidationError) as caught:
            ff.recover_bundle(tmp_path / "base", tmp_path / "out", **chosen)
        assert {line.split(":")[0] for line in caught.value.offenders} == {"norm.weight", "ids"}


def test_options_that_do_not_make_sense(
    merged: tuple[Path, Path], make_bundle: MakeBundle, tmp_path: Path, make_base: MakeBase
) -> None:
    base, out = merged
    for wrong in (
        {"seed": None}, {"n_frequency": None}, {"targets": []}, {"targets": ["nothing"]},
        {"scaling": 0.0}, {"scaling": float("inf")}, {"like": make_bundle(base, LAYERS)},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            ff.recover_bundle(base, out, **{**RIGHT, **wrong})
    like = make_bundle(base, LAYERS, n_frequency=64, scaling=150.0, seed=11)
    for option in (
        {"seed": 11}, {"n_frequency": 64}, {"targets": ["q"]}, {"scaling": 150.0},
        {"entry_rule": "small"},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"both: {next(iter(option))}"):
            ff.recover_bundle(base, out, like=like, **option)  # type: ignore[arg-type]
    # An unbound bundle does not have the rule.
    unbound = make_bundle(base, LAYERS, n_frequency=64, scaling=150.0, seed=11, bound=False)
    found, _ = ff.recover_bundle(base, out, like=unbound, entry_rule="small")
    assert [layer.entry_rule for layer in found.layers] == ["small", "small"]
    other = make_base(tmp_path / "other", shards=2, size=64)
    with pytest.raises(BaseMismatchError) as caught:
        ff.recover_bundle(other, out, **RIGHT)
    assert len(caught.value.offenders) == 2
