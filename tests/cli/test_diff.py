"""diff, inspect --plot, and validate of a folder by its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

import fourierft_export as ff

Verb = Callable[..., Any]


@pytest.fixture
def pair(stories_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle, and the same with a larger scaling, one spectrum changed and a layer less."""
    bundle = ff.Bundle.load(stories_bundle)
    spectra = {name: array.copy() for name, array in bundle.spectra.items()}
    del spectra[bundle.layers[-1].name]
    spectra[bundle.layers[0].name][3] += 1
    spec = replace(bundle.spec, scaling=bundle.spec.scaling * 2, layers=bundle.layers[:-1])
    return stories_bundle, ff.Bundle.build(spec, spectra).save(tmp_path / "other")


def test_norms_are_those_of_delta_w(pair: tuple[Path, Path], run_verb: Verb) -> None:
    from fourierft_export.spectral.delta import reference_delta

    found = run_verb("diff", *pair).json["diff"]
    bundles = [ff.Bundle.load(path) for path in pair]
    assert found["only_left"] == [bundles[0].layers[-1].name] and found["only_right"] == []
    assert found["scaling"] == [300.0, 600.0] and len(found["layers"]) == 9
    for layer in found["layers"]:
        a, b = (
            reference_delta(
                bundle.spectra[layer["name"]], bundle.entries(layer["name"]),
                next(x.shape for x in bundle.layers if x.name == layer["name"]),
                float(bundle.spec.scaling),
            )
            for bundle in bundles
        )  # fmt: skip
        assert layer["same_entries"]
        assert layer["norms"] == pytest.approx([np.linalg.norm(a), np.linalg.norm(b)], rel=1e-9)
        assert layer["distance"] == pytest.approx(np.linalg.norm(a - b), rel=1e-9)
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        assert layer["cosine"] == pytest.approx(cosine, rel=1e-9)


def test_other_kinds_of_files(
    stories_adapter: Path,
    stories260k: Path,
    pair: tuple[Path, Path],
    tmp_path: Path,
    run_verb: Verb,
) -> None:
    found = run_verb("diff", stories_adapter, pair[0]).json["diff"]
    assert found["layers"][0]["distance"] is None
    found = run_verb("diff", stories_adapter, pair[0], "--base", stories260k).json["diff"]
    assert all(layer["distance"] == 0 for layer in found["layers"])
    ff.merge_checkpoint(stories260k, pair[0], tmp_path / "merged")
    found = run_verb("diff", stories260k, tmp_path / "merged").json["diff"]
    norms = run_verb("diff", *pair).json["diff"]["layers"]
    for layer in norms:
        change = found["tensors"].pop(f"{layer['name']}.weight")
        assert change == pytest.approx(layer["norms"][0], rel=1e-5)
    assert len(found["tensors"]) == 1
    assert run_verb("diff", stories260k, pair[0]).code == 2
    with_head = ff.Bundle.load(pair[0])
    head = {"lm_head.weight": np.ones((2, 2), np.float32)}
    ff.Bundle.build(with_head.spec, with_head.spectra, head).save(tmp_path / "head")
    assert run_verb("diff", pair[0], tmp_path / "head").json["diff"]["saved"] == {
        "lm_head.weight": None
    }
    assert run_verb("diff", pair[0], tmp_path / "absent").code == 6


def test_onnx_files_by_their_weights(tmp_path: Path, run_verb: Verb) -> None:
    values = {"w": np.ones((2, 3), np.float32), "same": np.zeros(2, np.float32)}
    for path, more in (("a.onnx", {"x": np.ones(1)}), ("b.onnx", {"w": values["w"] + 2})):
        held = [onnx.numpy_helper.from_array(a, name) for name, a in (values | more).items()]
        graph = onnx.helper.make_graph([], "graph", [], [], held)
        onnx.save(onnx.helper.make_model(graph), tmp_path / path)
    found = run_verb("diff", tmp_path / "a.onnx", tmp_path / "b.onnx").json["diff"]
    assert found["tensors"] == {"w": pytest.approx(np.sqrt(24))} and found["same"] == 1
    assert (found["only_left"], found["only_right"]) == (["x"], [])


def test_one_adapter_of_a_pool(pair: tuple[Path, Path], tmp_path: Path, run_verb: Verb) -> None:
    one = f"{tmp_path / 'p.pool'}#one"
    bundles = [f"one={pair[0]}", f"two={pair[0]}"]
    assert run_verb("pack", "--pool", *bundles, "-o", tmp_path / "p.pool").code == 0
    facts = run_verb("inspect", one, "--plot", tmp_path / "one.png").json["inspect"]
    assert (facts["path"], facts["sha256"]) == (one, ff.Bundle.load(pair[0]).sha256)
    assert (tmp_path / "one.png").stat().st_size > 5_000
    assert run_verb("diff", one, pair[0]).json["diff"]["layers"][0]["distance"] == 0


def test_a_picture(
    pair: tuple[Path, Path], stories_adapter: Path, tmp_path: Path, run_verb: Verb
) -> None:
    for source in (pair[0], stories_adapter):
        out = tmp_path / f"{source.stem}.png"
        assert run_verb("inspect", source, "--plot", out).code == 0
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5_000
        assert run_verb("inspect", source, "--plot", out).code == 2


def test_validate_finds_what_belongs_to_a_merged_folder(
    stories260k: Path, pair: tuple[Path, Path], tmp_path: Path, run_verb: Verb
) -> None:
    shutil.copytree(stories260k, tmp_path / "base")
    bundle = tmp_path / "b.fourierft.safetensors"
    shutil.copy(pair[0], bundle)
    shutil.copy(pair[1], tmp_path / "a.fourierft.safetensors")  # another one
    ff.merge_checkpoint(tmp_path / "base", bundle, tmp_path / "merged")
    page, xml = tmp_path / "report.html", tmp_path / "report.xml"
    words = ["validate", tmp_path / "merged", "--samples", 8, "--report", page, "--junit", xml]
    report = run_verb(*words).json["validate"]
    assert [side["name"] for side in report["sides"]] == ["base", "torch", "merged"]
    assert report["sides"][1]["source"].endswith(f" + {bundle}")
    html = page.read_text("utf-8")
    assert "data:image/png;base64," in html and f"sha256 {ff.Bundle.load(bundle).sha256}" in html
    norms = run_verb("diff", *pair).json["diff"]["layers"]
    for layer in norms:  # name, norm of delta_W, share of the weights that changed
        row = html[html.index(f"<tr><td>{layer['name']}</td>") :].split("</tr>")[0]
        assert f">{layer['norms'][0]:.4g}<" in row and "%<" in row
    size = sum(f.stat().st_size for f in (tmp_path / "merged").iterdir())
    assert f">{size:,}<" in html
    suite = ElementTree.fromstring(xml.read_text("utf-8"))
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    assert run_verb("validate", tmp_path / "base").code == 6
    both = ["--report", tmp_path / "x", "--junit", tmp_path / "x"]
    assert run_verb("validate", tmp_path / "merged", *both).code == 2
    ff.merge_checkpoint(tmp_path / "base", bundle, tmp_path / "half", weights=[0.5])
    assert run_verb("validate", tmp_path / "half").code == 2
    (tmp_path / "base").rename(tmp_path / "moved")
    assert run_verb("validate", tmp_path / "merged").code == 2
    words = ["validate", tmp_path / "merged", "--base", tmp_path / "moved", "--samples", 4]
    assert len(run_verb(*words).json["validate"]["sides"]) == 3
    bundle.unlink()  # without it nothing would be compared with the merged model
    assert run_verb(*words).code == 2


def test_texts_with_a_tokenizer_from_elsewhere(
    stories260k: Path, pair: tuple[Path, Path], tmp_path: Path, run_verb: Verb
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 7}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    made.save_pretrained(tmp_path / "words")
    (tmp_path / "texts.txt").write_text("Once upon a time\nA cat\n")
    verb = ["validate", "--base", stories260k, "--bundle", pair[0]]
    verb += ["--inputs", tmp_path / "texts.txt"]
    assert run_verb(*verb).code == 2
    report = run_verb(*verb, "--tokenizer", tmp_path / "words").json["validate"]
    assert report["inputs"].endswith("texts.txt: 2 texts")
