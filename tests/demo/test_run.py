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
from sklearn.datasets import load_digits
from transformers import ViTForImageClassification

import fourierft_export as ff
from fourierft_export.demo import digits, run
from fourierft_export.demo.run import run_demo
from fourierft_export.demo.show import render
from fourierft_export.errors import MissingExtraError, UsageError

pytestmark = pytest.mark.timeout(900)  # a whole demo, on a machine that may be busy
NAMES = ("inverted", "rotated")


def test_split_holds_every_image_once_and_follows_the_seed() -> None:
    training, test = digits.load(5)
    assert len(test.labels) == digits.TEST_IMAGES
    images = torch.cat([training.images, test.images]).flatten(1).numpy() * 16
    rows = np.column_stack([images, torch.cat([training.labels, test.labels]).numpy()])
    data, labels = load_digits(return_X_y=True)
    expected = np.column_stack([data, labels])
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    assert torch.equal(test.images, digits.load(5)[1].images)
    assert not torch.equal(test.images, digits.load(6)[1].images)
    some = test.images[:20]
    np.testing.assert_array_equal(digits.CHANGES["inverted"](some), 1 - some.numpy())
    np.testing.assert_array_equal(
        digits.CHANGES["rotated"](some), np.rot90(some.numpy(), axes=(2, 3))
    )


def test_the_folder_holds_what_is_said(made) -> None:
    names = {path.name for path in made.folder.iterdir()}
    files = {
        f"{n}{end}"
        for n in NAMES
        for end in (".fourierft.safetensors", ".merged.onnx", ".unmerged.onnx")
    }
    assert names == files | {"base", "merged-inverted", "merged-rotated", "demo.png", "report.json"}
    report = json.loads((made.folder / "report.json").read_text("utf-8"))
    assert report == json.loads(json.dumps(made.result.to_dict())) | {"directory": "."}
    here = str(made.folder.parent).encode()
    for file in made.folder.rglob("*.*"):
        assert file.is_dir() or here not in file.read_bytes(), file.name
    last = {what: (done, total) for what, done, total in made.reported}
    assert len(last) >= 4 and all(done <= total for _, done, total in made.reported)
    assert last["training the base"] == (8, 8)
    assert last["merging, exporting, proving"] == (2, 2)
    assert made.generator_untouched


@pytest.mark.parametrize("name", NAMES)
def test_adapters_gain_and_artifacts_agree(name: str, made) -> None:
    _, test = digits.load(3)
    images = test.changed(name).images
    adapter = next(a for a in made.result.adapters if a["name"] == name)
    assert adapter["accuracy_after"] > adapter["accuracy_before"] + 0.3
    assert made.result.base_bytes > 50 * adapter["bundle_bytes"]
    bundle = ff.Bundle.load(made.folder / adapter["bundle"])
    assert adapter["bundle_bytes"] == (made.folder / adapter["bundle"]).stat().st_size
    assert adapter["coefficients"] == 24 * 64 and len(bundle.layers) == 24
    merged = ViTForImageClassification.from_pretrained(made.folder / adapter["merged"]).eval()
    base = ff.attach(ViTForImageClassification.from_pretrained(made.folder / "base").eval(), bundle)
    with torch.no_grad():
        expected = merged(pixel_values=images).logits
        torch.testing.assert_close(base(pixel_values=images).logits, expected, atol=1e-4, rtol=0)
    accuracy = float((expected.argmax(-1) == test.labels).double().mean())
    assert adapter["accuracy_after"] == pytest.approx(accuracy, abs=0.003)
    assert adapter["logits_scale"] == pytest.approx(float(expected.abs().max()), rel=1e-4)
    assert set(adapter["max_abs"]) == {"merged", f"{name}.merged.onnx", f"{name}.unmerged.onnx"}
    for file, size in adapter["onnx_bytes"].items():
        session = onnxruntime.InferenceSession(made.folder / file)
        for count in (1, 500):
            (logits,) = session.run(["logits"], {"pixel_values": images[:count].numpy()})
            np.testing.assert_allclose(logits, expected[:count].numpy(), atol=1e-4, rtol=0)
        assert adapter["accuracy_onnx"][file] == np.mean(logits.argmax(1) == test.labels.numpy())
        assert adapter["max_abs"][file] <= 1e-4
        assert size == (made.folder / file).stat().st_size


def test_the_numbers_are_shown(made) -> None:
    console = Console(file=StringIO(), width=100, color_system=None)
    console.print(render(made.result))
    text = console.file.getvalue()
    assert str(made.folder) in text.replace("\n", "")
    for adapter in made.result.adapters:
        for accuracy in (adapter["accuracy_before"], adapter["accuracy_after"]):
            assert f"{accuracy:.1%}" in text
        for file in (adapter["bundle"], f"{adapter['merged']}/", *adapter["onnx_bytes"]):
            assert file in text
    from matplotlib.image import imread

    pixels = imread(made.folder / "demo.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    assert 0.05 < np.mean(pixels[..., :3].min(-1) < 0.9) < 0.6  # drawn on, not filled


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="force"):
        run_demo(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    for name, value in (("seed", -1), ("seed", 2**32), ("base_epochs", 0), ("adapter_epochs", 0)):
        with pytest.raises(UsageError, match=name):
            run_demo(tmp_path / "new", **{name: value})
    for package, extra in (("sklearn", "hf"), ("onnxruntime", "ort"), ("torch", "torch")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=rf"fourierft-export\[{extra}\]"):
                run_demo(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spectrum spoilt between training and shipping: refused, and no folder appears."""
    learn_adapter, whole = run.learn_adapter, digits.load
    few = lambda data: digits.Digits(data.images[:128], data.labels[:128])  # noqa: E731
    monkeypatch.setattr(digits, "load", lambda seed: tuple(map(few, whole(seed))))

    def spoil(*args: object, **options: object) -> ff.Bundle:
        bundle = learn_adapter(*args, **options)
        zeros = {name: np.zeros_like(values) for name, values in bundle.spectra.items()}
        return ff.Bundle.build(bundle.spec, zeros)

    monkeypatch.setattr(run, "learn_adapter", spoil)
    with pytest.raises(Exception, match="base") as caught:
        run_demo(tmp_path / "out", base_epochs=1, adapter_epochs=1)
    assert type(caught.value).__name__ == "ValidationError"
    assert not list(tmp_path.iterdir())
