"""A short demo as a user finds it: real gains, small bundles, artifacts that agree."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from fourierft_export.bundle.file import Bundle
from fourierft_export.demo import digits, steps, vit
from fourierft_export.demo.render import render
from fourierft_export.demo.run import run_demo
from fourierft_export.errors import MissingExtraError, UsageError
from fourierft_export.spectral.delta import reference_delta

NAMES = ("inverted", "rotated")
MODES = ("merged", "unmerged")


@pytest.fixture(scope="module")
def test_images() -> dict[str, np.ndarray]:
    """The test images by kind, changed by numpy."""
    images = digits.load(3)[1].images.numpy()
    turned = np.ascontiguousarray(np.rot90(images, axes=(1, 2)))
    return {"upright": images, "inverted": 1 - images, "rotated": turned}


@pytest.fixture(scope="module")
def test_labels() -> np.ndarray:
    return digits.load(3)[1].labels.numpy()


def torch_logits(folder: Path, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return vit.load(folder)(torch.from_numpy(images)).numpy()


def onnx_logits(file: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": images})
    return logits


def test_the_folder_explains_itself(made) -> None:
    assert sorted(
        p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*.*")
    ) == sorted(
        [
            "base/config.json",
            "base/model.safetensors",
            "demo.png",
            "report.json",
            *(f"{name}.fourierft.safetensors" for name in NAMES),
            *(f"{name}.{mode}.onnx" for name in NAMES for mode in MODES),
            *(f"merged-{name}/config.json" for name in NAMES),
            *(f"merged-{name}/manifest.json" for name in NAMES),
            *(f"merged-{name}/model.safetensors" for name in NAMES),
        ]
    )
    assert [p.name for p in made.folder.parent.iterdir()] == ["out"]  # no staging left beside it


def test_adapters_help_on_the_shifted_images(made, test_images, test_labels) -> None:
    """Accuracies are those of the files, counted here again, and adapters raise them a lot."""
    base = torch_logits(made.folder / "base", test_images["upright"]).argmax(1)
    assert made.result.accuracy == np.mean(base == test_labels) > 0.9
    for adapter in made.result.adapters:
        images = test_images[adapter.name]
        before = torch_logits(made.folder / "base", images).argmax(1)
        after = torch_logits(made.folder / adapter.merged, images).argmax(1)
        assert adapter.accuracy_before == np.mean(before == test_labels)
        assert adapter.accuracy_after == np.mean(after == test_labels)
        assert adapter.accuracy_after > adapter.accuracy_before + 0.4


def test_each_adapter_helps_only_its_own_shift(made, test_images, test_labels) -> None:
    for name, other in (NAMES, NAMES[::-1]):
        files = (made.folder / f"{n}.merged.onnx" for n in (name, other))
        seen = (onnx_logits(file, test_images[name]).argmax(1) for file in files)
        own, foreign = (np.mean(classes == test_labels) for classes in seen)
        assert own > foreign + 0.3


def test_bundles_are_a_few_kilobytes(made) -> None:
    for adapter in made.result.adapters:
        file = made.folder / adapter.bundle
        bundle = Bundle.load(file)
        assert len(bundle.layers) == 24
        assert adapter.coefficients == sum(s.size for s in bundle.spectra.values())
        assert adapter.bundle_bytes == file.stat().st_size
        assert 4 * adapter.coefficients < adapter.bundle_bytes < 4 * adapter.coefficients + 2_400
        assert made.result.base_bytes > 100 * adapter.bundle_bytes
        assert all(np.abs(spectrum).max() > 0.01 for spectrum in bundle.spectra.values())


def test_merged_checkpoint_is_base_plus_delta(made) -> None:
    """Every adapted weight by the float64 formula; every other tensor bit for bit."""
    base = load_file(made.folder / "base" / "model.safetensors")
    for adapter in made.result.adapters:
        merged = load_file(made.folder / adapter.merged / "model.safetensors")
        bundle = Bundle.load(made.folder / adapter.bundle)
        assert merged.keys() == base.keys()
        adapted = {f"{layer.name}.weight": layer for layer in bundle.layers}
        for name, weight in base.items():
            if name not in adapted:
                assert merged[name].tobytes() == weight.tobytes()
                continue
            layer = adapted[name]
            spectrum, entries = bundle.spectra[layer.name], bundle.entries(layer.name)
            delta = reference_delta(spectrum, entries, layer.shape, float(bundle.spec.scaling))
            np.testing.assert_allclose(merged[name], weight + delta, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_torch(name: str, mode: str, made, test_images, test_labels) -> None:
    images = test_images[name]
    file = f"{name}.{mode}.onnx"
    adapter = next(a for a in made.result.adapters if a.name == name)
    expected = torch_logits(made.folder / adapter.merged, images)
    logits = onnx_logits(made.folder / file, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert adapter.accuracy_onnx[file] == np.mean(logits.argmax(1) == test_labels)
    assert adapter.max_abs[file] <= 1e-4
    assert adapter.logits_scale == pytest.approx(np.abs(expected).max(), rel=1e-4)
    assert adapter.onnx_bytes[file] == (made.folder / file).stat().st_size
    for batch in (1, 7):
        few = onnx_logits(made.folder / file, images[:batch])
        np.testing.assert_allclose(few, expected[:batch], atol=1e-4, rtol=0)


def test_report_holds_the_result(made) -> None:
    report = json.loads((made.folder / "report.json").read_text("utf-8"))
    expected = json.loads(json.dumps(made.result.to_dict()))
    assert report == expected | {"directory": "."}
    assert set(report["adapters"][0]["max_abs"]) == {
        "merged",
        "inverted.merged.onnx",
        "inverted.unmerged.onnx",
    }


def test_files_name_no_place_on_this_machine(made) -> None:
    here = str(made.folder.parent).encode()
    for file in made.folder.rglob("*.*"):
        if file.is_file():
            assert here not in file.read_bytes(), file.name


def test_render_shows_the_numbers(made) -> None:
    console = Console(file=StringIO(), width=100, color_system=None)
    console.print(render(made.result))
    text = console.file.getvalue()
    assert str(made.folder) in text.replace("\n", "")
    for adapter in made.result.adapters:
        for accuracy in (adapter.accuracy_before, adapter.accuracy_after):
            assert f"{accuracy:.1%}" in text
        for file in (adapter.bundle, f"{adapter.merged}/", *adapter.onnx_bytes):
            assert file in text
            assert (made.folder / file).exists()


def test_picture_is_a_picture(made) -> None:
    from matplotlib.image import imread

    pixels = imread(made.folder / "demo.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert 0.05 < np.mean(pixels[..., :3].min(-1) < 0.9) < 0.6  # drawn on, not filled


def test_progress_and_generator(made) -> None:
    last = {what: (done, total) for what, done, total in made.reported}
    assert len(last) >= 4
    assert all(done <= total for _, done, total in made.reported)
    assert last["training the base"] == (8, 8)
    assert last["merging, exporting, proving"] == (2, 2)
    assert made.generator_untouched


def test_refuses_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="force"):
        run_demo(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"base_epochs": 0}, "base_epochs"),
        ({"adapter_epochs": 0}, "adapter_epochs"),
    ],
)
def test_refuses_values_out_of_range(options: dict[str, int], where: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=where):
        run_demo(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "extra"), [("sklearn", "demo"), ("onnxruntime", "ort"), ("torch", "torch")]
)
def test_names_the_missing_extra(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"fourierft-export\[{extra}\]"):
        run_demo(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spectrum spoilt between training and shipping: refused, and no folder appears."""
    learn_adapter = steps.learn_adapter

    def spoil(*args: object, **options: object) -> Bundle:
        bundle = learn_adapter(*args, **options)
        other = Bundle.load(bundle.save(tmp_path / "other.fourierft.safetensors"))
        return Bundle.build(other.spec, {n: np.zeros_like(s) for n, s in other.spectra.items()})

    monkeypatch.setattr(steps, "learn_adapter", spoil)
    with pytest.raises(Exception, match="base") as caught:
        run_demo(tmp_path / "out", base_epochs=1, adapter_epochs=1)
    assert type(caught.value).__name__ == "ValidationError"
    assert [p.name for p in tmp_path.iterdir()] == ["other.fourierft.safetensors"]
