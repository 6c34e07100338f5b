"""verify, recover and merge's options at the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export.bundle.file import Bundle
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.cli.console import COUNTED_IN_BYTES
from fourierft_export.cli.main import run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    random = np.random.default_rng(0)
    weight = (random.standard_normal((64, 48)) * 0.02).astype(np.float32)
    save_file({"a.q.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "made"}')
    return folder


@pytest.fixture
def bundle(base: Path, tmp_path: Path) -> Path:
    spectrum = np.random.default_rng(1).standard_normal(20).astype(np.float32)
    spec = AdapterSpec(7, 150.0, (LayerSpec("a.q", 20),))
    return Bundle.build(spec, {"a.q": spectrum}).bind(base).save(tmp_path / "b")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


Call = Callable[..., tuple[int, str, str]]


def test_merge_verify_recover(base: Path, bundle: Path, tmp_path: Path, call: Call) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    code, text, _ = call("merge", "--base", base, "--bundle", bundle, "-o", out)
    assert code == 0
    assert re.search(
        r"at least (9\d|100)% of each layer's weights changed \(least: a\.q, F32\)", text
    )
    code, text, _ = call("verify", out)
    assert code == 0
    assert "2 files" in text and "as they were written" in text and "NOT" not in text
    code, text, _ = call(
        "recover", "--base", base, "--merged", out, "-o", again,
        "--seed", 7, "--n-frequency", 20, "--targets", "q",
    )  # fmt: skip
    assert code == 0
    assert "1 layers, 0 dense tensors" in text and "(a.q)" in text
    found, before = Bundle.load(again), Bundle.load(bundle)
    np.testing.assert_allclose(found.spectra["a.q"], before.spectra["a.q"], rtol=1e-3, atol=1e-4)
    code, text, _ = call(
        "recover", "--json", "--force", "--base", base, "--merged", out, "-o", again,
        "--like", bundle,
    )  # fmt: skip
    report = json.loads(text)["recover"]
    assert code == 0 and report["layers"][0]["name"] == "a.q"
    assert report["layers"][0]["residual"] < 1.5


def test_damage_is_told_with_code_5(base: Path, bundle: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    call("merge", "--base", base, "--bundle", bundle, "-o", out)
    (out / "config.json").unlink()
    code, text, err = call("verify", out)
    assert code == 5
    assert "NOT as they were written" in text
    assert err.count("error:") == 1 and "config.json: missing" in err
    code, text, _ = call("verify", "--json", out)
    assert code == 5 and json.loads(text)["error"]["offenders"] == ["config.json: missing"]
    assert call("verify", base)[0] == 6
    assert call("verify", tmp_path / "absent")[0] == 6
    (out / "manifest.json").write_text("{}")
    assert call("verify", out)[0] == 3


def test_a_wrong_seed_is_told_with_code_5(
    base: Path, bundle: Path, tmp_path: Path, call: Call
) -> None:
    out = tmp_path / "out"
    call("merge", "--base", base, "--bundle", bundle, "-o", out)
    wanted = ["recover", "--base", base, "--merged", out, "-o", tmp_path / "r"]
    code, _, err = call(*wanted, "--seed", 8, "--n-frequency", 20, "--targets", "q")
    assert code == 5 and "a.q: the difference leaves" in err
    code, _, err = call(*wanted)
    assert code == 2 and "--like" in err
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").touch()
    assert call(*wanted, "--like", bundle)[0] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--base", "x"], "--base only"),
        (["--merged", "x"], "--merged only"),
        ([], "neither"),
        (["--base", "x", "--merged", "y", "--adapter", "a"], "--adapter"),
        (["--onnx", "x", "--base", "x", "--seed", 1], "found --base, --seed"),
        (["--onnx", "x", "--n-frequency", 1, "--targets", "q"], "found --n-frequency, --targets"),
        (["--onnx", "x", "--scaling", 1, "--entry-rule", "small"], "found --scaling, --entry-rule"),
        (["--onnx", "x", "--merged", "x", "--like", "y"], "found --merged, --like"),
    ],
)
def test_recover_ignores_no_option(
    tmp_path: Path, call: Call, words: list[object], says: str
) -> None:
    code, _, err = call("recover", *words, "-o", tmp_path / "out")
    assert code == 2 and says in err


def test_recover_takes_no_scaling_beside_a_bundle(
    base: Path, bundle: Path, tmp_path: Path, call: Call
) -> None:
    call("merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out")
    words = ["recover", "--base", base, "--merged", tmp_path / "out", "-o", tmp_path / "again"]
    code, _, err = call(*words, "--like", bundle, "--scaling", 150)
    assert code == 2 and "both: scaling" in err
    assert call(*words, "--like", bundle)[0] == 0


def test_a_dry_run_says_what_is_needed(
    base: Path, bundle: Path, tmp_path: Path, call: Call
) -> None:
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out", "--dry-run"]
    code, text, _ = call(*words)
    assert code == 0
    assert "would change 1 layers" in text and "of space and about" in text
    fields: dict[str, Any] = json.loads(call(*words, "--json")[1])["merge"]
    assert fields["dry_run"] is True
    assert fields["nbytes"] == 64 * 48 * 4 < fields["disk_bytes"] < fields["memory_bytes"]
    assert "weights changed" not in text
    assert not (tmp_path / "out").exists()


def test_options_that_clash(base: Path, bundle: Path, tmp_path: Path, call: Call) -> None:
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out"]
    code, _, err = call(*words, "--workers", 2, "--scheduler", "tcp://127.0.0.1:1")
    assert code == 2 and "a number of processes, or a scheduler" in err
    assert call(*words, "--workers", -1)[0] == 2


def test_labels_are_named(base: Path, tmp_path: Path, call: Call) -> None:
    spec = AdapterSpec(7, 150.0, (LayerSpec("a.q", 20),), task_type="SEQ_CLS")
    head = {"classifier.weight": np.ones((2, 48), np.float32)}
    spectra = {"a.q": np.ones(20, np.float32)}
    bundle = Bundle.build(spec, spectra, head).bind(base).save(tmp_path / "b")
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out"]
    assert call(*words, "--label", "bad", "--label", "good")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    code, _, err = call(*words, "--force", "--label", "bad", "--label", "bad")
    assert code == 2 and "'bad', 'bad'" in err


def test_links_are_followed_when_allowed(
    base: Path, bundle: Path, tmp_path: Path, call: Call
) -> None:
    (base / "store").mkdir()
    (base / "model.safetensors").rename(base / "store" / "blob")
    (base / "model.safetensors").symlink_to("store/blob")
    words = ["merge", "--base", base, "--bundle", bundle, "-o", tmp_path / "out"]
    code, _, err = call(*words)
    assert code == 3 and "--allow-links" in err
    assert call(*words, "--allow-links")[0] == 0


def test_manifests_name_the_bundles(base: Path, bundle: Path, tmp_path: Path, call: Call) -> None:
    words = ["merge", "--base", base, "--bundle", bundle, "--bundle", bundle, "-o", tmp_path / "o"]
    assert call(*words, "--weight", "0.5", "--weight", "0.25")[0] == 0
    entries = json.loads((tmp_path / "o" / "manifest.json").read_text())["bundles"]
    assert [(e["name"], e["weight"]) for e in entries] == [("b", 0.5), ("b", 0.25)]


def test_what_is_counted_in_bytes_is_what_the_library_reports(
    base: Path, bundle: Path, tmp_path: Path
) -> None:
    from fourierft_export.merge.merge import merge_checkpoint
    from fourierft_export.merge.verify import verify_merged
    from fourierft_export.recover.from_checkpoint import recover_bundle

    seen: dict[str, int] = {}
    note: Any = lambda what, done, total: seen.update({what: total})  # noqa: E731
    out = tmp_path / "out"
    merge_checkpoint(base, bundle, out, progress=note)
    verify_merged(out, progress=note)
    recover_bundle(base, out, like=Bundle.load(bundle), progress=note)
    assert seen.keys() - {"checking the base"} == COUNTED_IN_BYTES
    assert all(seen[what] >= 64 * 48 * 4 for what in COUNTED_IN_BYTES)
