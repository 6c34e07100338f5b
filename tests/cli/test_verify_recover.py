"""verify, recover and merge at the command line: what they print for people."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import fourierft_export as ff
from fourierft_export.bundle.spec import AdapterSpec, LayerSpec
from fourierft_export.cli.console import COUNTED_IN_BYTES
from fourierft_export.cli.main import run

Call = Callable[..., tuple[int, str, str]]
MERGE = "merge --base base --bundle b -o out"
RECOVER = "recover --base base --merged out"


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """`call(command)`: exit code, stdout and stderr, in a folder with `base` and its bundle `b`."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    random = np.random.default_rng(0)
    weight = (random.standard_normal((64, 48)) * 0.02).astype(np.float32)
    save_file({"a.q.weight": weight}, "base/model.safetensors", {"format": "pt"})
    Path("base/config.json").write_text('{"model_type": "made"}')
    spectrum = random.standard_normal(20).astype(np.float32)
    spec = AdapterSpec(7, 150.0, (LayerSpec("a.q", 20),))
    ff.Bundle.build(spec, {"a.q": spectrum}).bind("base").save("b")

    def call(command: str) -> tuple[int, str, str]:
        code = run(command.split())
        return (code, *capsys.readouterr())

    return call


def test_merge_verify_recover(call: Call) -> None:
    code, text, _ = call(MERGE)
    pattern = r"at least (9\d|100)% of each layer's weights changed \(least: a\.q, F32\)"
    assert code == 0 and re.search(pattern, text)
    code, text, _ = call("verify out")
    assert code == 0 and "2 files" in text and "as they were written" in text and "NOT" not in text
    code, text, _ = call(f"{RECOVER} -o r --seed 7 --n-frequency 20 --targets q")
    assert code == 0 and "1 layers, 0 dense tensors" in text and "(a.q)" in text
    found, before = ff.Bundle.load("r"), ff.Bundle.load("b")
    np.testing.assert_allclose(found.spectra["a.q"], before.spectra["a.q"], rtol=1e-3, atol=1e-4)
    for wrong, code, says in (
        ("--seed 8 --n-frequency 20 --targets q", 5, "a.q: the difference leaves"),
        ("", 2, "--like"),
        ("--like b --scaling 150", 2, "both: scaling"),
    ):
        found_code, _, err = call(f"{RECOVER} -o new {wrong}")
        assert found_code == code and says in err
        assert not Path("new").exists()


def test_damage_has_code_5(call: Call) -> None:
    call(MERGE)
    Path("out/config.json").unlink()
    code, text, err = call("verify out")
    assert code == 5 and "NOT as they were written" in text
    assert err.count("error:") == 1 and "config.json: missing" in err
    code, text, _ = call("verify --json out")
    assert code == 5 and json.loads(text)["error"]["offenders"] == ["config.json: missing"]
    Path("out/manifest.json").write_text("{}")
    assert call("verify out")[0] == 3


def test_a_dry_run_says_what_is_needed(call: Call) -> None:
    code, text, _ = call(f"{MERGE} --dry-run")
    assert code == 0 and "would change 1 layers" in text and "of space and about" in text
    assert "weights changed" not in text
    fields: dict[str, Any] = json.loads(call(f"{MERGE} --dry-run --json")[1])["merge"]
    assert fields["nbytes"] == 64 * 48 * 4 < fields["disk_bytes"] < fields["memory_bytes"]


def test_what_is_counted_in_bytes_is_what_the_library_reports(call: Call) -> None:
    seen: dict[str, int] = {}
    note: Any = lambda what, done, total: seen.update({what: total})  # noqa: E731
    ff.merge_checkpoint("base", ff.Bundle.load("b"), "out", progress=note)
    ff.verify_merged("out", progress=note)
    ff.recover_bundle("base", "out", like=ff.Bundle.load("b"), progress=note)
    assert seen.keys() - {"checking the base"} == COUNTED_IN_BYTES
    assert all(seen[what] >= 64 * 48 * 4 for what in COUNTED_IN_BYTES)
