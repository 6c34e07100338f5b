"""Every verb that succeeds: what it writes, what it prints, and its JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fourierft_export import __version__
from fourierft_export.bundle.file import Bundle
from fourierft_export.cli.main import run

Q_PROJ = "model.layers.0.self_attn.q_proj"


class Made(NamedTuple):
    """What the verbs made for stories260k, and the object each printed."""

    bundle: Path
    unpacked: Path
    merged: Path
    onnx: Path
    said: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def made(
    stories260k: Path, stories_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("verbs")
    bundle, base = folder / "a.fourierft.safetensors", str(stories260k)
    unpacked, merged, onnx = folder / "unpacked", folder / "merged", folder / "a.onnx"
    pair = ["--base", base, "--bundle", str(bundle)]
    commands = {
        "pack": ["pack", str(stories_adapter), "--base", base, "-o", str(bundle)],
        "unpack": ["unpack", str(bundle), "-o", str(unpacked)],
        "dry-run": ["merge", *pair, "-o", str(merged), "--dry-run"],
        "merge": ["merge", *pair, "-o", str(merged)],
        "export": ["export", *pair, "--mode", "unmerged", "-o", str(onnx)],
        "validate": ["validate", *pair, "--merged", str(merged), "--onnx", str(onnx),
                     "--samples", "4"],
    }  # fmt: skip
    said = {}
    for name, command in commands.items():
        told = subprocess_free_json(command)
        said[name] = told
        if name == "dry-run":
            assert not merged.exists()
    return Made(bundle, unpacked, merged, onnx, said)


def subprocess_free_json(command: list[str]) -> dict[str, Any]:
    """Run a command with --json in this process; its stdout is one object and nothing else."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = run([*command, "--json"])
    assert code == 0, out.getvalue()
    assert out.getvalue().count("\n") == 1
    found: dict[str, Any] = json.loads(out.getvalue())
    assert (found["schema"], found["ok"]) == (1, True)
    return found


def test_pack(made: Made, stories_adapter: Path, stories260k: Path) -> None:
    said = made.said["pack"]
    assert set(said) == {"schema", "ok", "bundle", "source", "notes"}
    facts, bundle = said["bundle"], Bundle.load(made.bundle)
    assert facts["bytes"] == made.bundle.stat().st_size
    assert facts["sha256"] == bundle.sha256
    assert facts["bound"] is True
    assert (facts["layers"], facts["coefficients"]) == (10, 1000)
    assert [(g["layers"], g["shape"]) for g in facts["groups"]] == [
        (["model.layers.{0-4}.self_attn.q_proj"], [64, 64]),
        (["model.layers.{0-4}.self_attn.v_proj"], [32, 64]),
    ]
    assert said["source"]["path"] == str(stories_adapter)
    assert said["source"]["bytes"] == sum(p.stat().st_size for p in stories_adapter.iterdir())


def test_unpack(made: Made, stories_adapter: Path) -> None:
    assert made.said["unpack"] == {
        "schema": 1, "ok": True, "output": str(made.unpacked), "layers": 10, "saved": [],
        "notes": [],
    }  # fmt: skip
    before, after = (
        load_file(d / "adapter_model.safetensors") for d in (stories_adapter, made.unpacked)
    )
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


def test_merge(made: Made, stories260k: Path) -> None:
    said = made.said["merge"]
    assert set(said) == {"schema", "ok", "merge", "notes"}
    facts = said["merge"]
    assert facts["out"] == str(made.merged)
    assert facts["dry_run"] is False
    assert len(facts["layers"]) == 10
    assert facts["bundles"][0]["base_check"] == "same"
    assert facts["bundles"][0]["sha256"] == Bundle.load(made.bundle).sha256
    assert made.said["dry-run"]["merge"]["dry_run"] is True
    before, after = (load_file(d / "model.safetensors") for d in (stories260k, made.merged))
    changed = {k for k in before if before[k].tobytes() != after[k].tobytes()}
    assert changed == {layer["tensor"] for layer in facts["layers"]}


def test_export(made: Made) -> None:
    facts = made.said["export"]["export"]
    assert facts["mode"] == "unmerged"
    axes = ["batch", "sequence"]
    assert facts["inputs"] == {"input_ids": axes, "attention_mask": axes}
    assert facts["outputs"] == {"logits": ["batch", "sequence", 512]}
    assert made.onnx.stat().st_size >= 260_032 * 4


def test_validate(made: Made) -> None:
    said = made.said["validate"]
    assert set(said) == {"schema", "ok", "validate", "notes"}
    assert said["validate"]["ok"] is True


def test_inspect_a_bundle(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        subprocess_free_json(["inspect", str(made.bundle)])["inspect"]
        == (made.said["pack"]["bundle"])
    )
    assert run(["inspect", str(made.bundle)]) == 0
    shown = capsys.readouterr()
    for piece in ("bound to its base", "seed 777", "scaling 300", "64 x 64", "small", "q_proj"):
        assert piece in shown.out
    assert shown.err == ""


def test_inspect_an_adapter(
    made: Made, stories_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = subprocess_free_json(["inspect", str(stories_adapter)])["inspect"]
    assert facts["kind"] == "adapter"
    assert facts["config"]["peft_type"] == "FOURIERFT"
    assert (facts["layers"], facts["coefficients"]) == (10, 1000)
    assert facts["bytes"] == (stories_adapter / "adapter_model.safetensors").stat().st_size
    assert run(["inspect", str(stories_adapter)]) == 0
    assert "PEFT FourierFT adapter" in capsys.readouterr().out


def test_inspect_a_config(published_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(published_dir.iterdir()):
        facts = subprocess_free_json(["inspect", str(path)])["inspect"]
        assert facts["kind"] == "adapter-config"
        assert facts["config"] == json.loads(path.read_text("utf-8"))
        assert run(["inspect", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "config only" in shown
        assert f"n_frequency {facts['config']['n_frequency']}" in shown


def test_inspect_a_checkpoint(stories260k: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (stories260k, stories260k / "model.safetensors"):
        facts = subprocess_free_json(["inspect", str(path)])["inspect"]
        assert (facts["kind"], facts["parameters"]) == ("checkpoint", 260_032)
        assert run(["inspect", str(path)]) == 0
        assert "260,032 parameters" in capsys.readouterr().out


def test_inspect_onnx(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    facts = subprocess_free_json(["inspect", str(made.onnx)])["inspect"]
    assert facts["kind"] == "onnx"
    assert [value["name"] for value in facts["outputs"]] == ["logits"]
    assert run(["inspect", str(made.onnx)]) == 0
    assert "logits" in capsys.readouterr().out


def test_inspect_does_not_read_the_base(
    stories_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config may name a directory on this machine; `inspect` has no business there."""
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(stories_adapter, adapter)
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"damaged")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(base)
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert run(["inspect", str(adapter)]) == 0
    assert "10" in capsys.readouterr().out


# --- notes ---------------------------------------------------------------------------------------


def test_an_unbound_bundle_is_said_to_be_one(
    stories_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    assert run(["pack", str(stories_adapter), "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{out}: 10 layers, 1,000 coefficients, ")
    assert shown.err.startswith("note: the bundle is unbound")
    assert run(["inspect", str(out)]) == 0
    assert "unbound" in capsys.readouterr().out


def test_a_base_that_the_config_names_is_told(
    stories_adapter: Path, stories260k: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(stories_adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(stories260k)
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    assert run(["pack", str(adapter), "-o", str(tmp_path / "b")]) == 0
    assert f"note: bound to {stories260k}" in capsys.readouterr().err
    assert Bundle.load(tmp_path / "b").is_bound


def test_a_base_weight_that_was_left_out_is_told(
    stories_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(stories_adapter, adapter)
    weights = adapter / "adapter_model.safetensors"
    name = "base_model.model.lm_head.base_layer.weight"
    save_file({**load_file(weights), name: np.zeros((8, 4), np.float32)}, weights)
    assert run(["pack", str(adapter), "-o", str(tmp_path / "b")]) == 0
    assert f"note: {name} is the base's own weight and was left out" in capsys.readouterr().err
    assert not Bundle.load(tmp_path / "b").saved


def test_packing_over_a_base_in_bfloat16(
    stories_adapter: Path, stories260k: Path, made: Made, tmp_path: Path
) -> None:
    """The same base in another precision: the bundle that knows it fits both."""
    base = tmp_path / "base"
    shutil.copytree(stories260k, base)
    weights = base / "model.safetensors"
    halved = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(weights).items()}
    save_file(halved, weights, metadata={"format": "pt"})
    command = ["merge", "--base", str(base), "--bundle", str(made.bundle), "--dry-run"]
    said = subprocess_free_json([*command, "-o", str(tmp_path / "out")])
    assert said["merge"]["bundles"][0]["base_check"] == "precision"
    assert any("another precision" in note for note in said["merge"]["notes"])


def test_a_bundle_or_the_adapter_directory_itself_may_be_merged(
    stories_adapter: Path, stories260k: Path, made: Made, tmp_path: Path
) -> None:
    pair = ["--base", str(stories260k), "--bundle", str(stories_adapter)]
    subprocess_free_json(["merge", *pair, "-o", str(tmp_path / "out")])
    one, other = ((d / "model.safetensors").read_bytes() for d in (made.merged, tmp_path / "out"))
    assert load_file(made.merged / "model.safetensors").keys()
    assert one[-4 * 260_032 :] == other[-4 * 260_032 :]


def test_force_replaces(
    stories_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b"
    out.write_text("old")
    assert run(["pack", str(stories_adapter), "-o", str(out), "--force"]) == 0
    assert Bundle.load(out).layers
    assert os.listdir(tmp_path) == ["b"]


def test_the_rule_of_older_torch_can_be_asked_for(
    stories_adapter: Path, stories260k: Path, tmp_path: Path
) -> None:
    pair = ["pack", str(stories_adapter), "--base", str(stories260k), "-o"]
    facts = subprocess_free_json([*pair, str(tmp_path / "b"), "--entry-rule", "r64"])
    assert {g["entry_rule"] for g in facts["bundle"]["groups"]} == {"r64"}


# --- as a program --------------------------------------------------------------------------------


def program(*words: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fourierft_export", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_as_a_program(made: Made, tmp_path: Path) -> None:
    done = program("inspect", str(made.bundle), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["inspect"]["layers"] == 10
    failed = program("inspect", str(tmp_path / "absent"), "--json")
    assert failed.returncode == 6
    assert json.loads(failed.stdout)["error"]["kind"] == "file-access"
    assert failed.stderr.count("\n") == 1
    shown = program("--version")
    assert (shown.returncode, __version__ in shown.stdout) == (0, True)


def test_a_reader_that_goes_away_is_no_error(made: Made) -> None:
    command = f"{sys.executable} -m fourierft_export inspect {made.bundle} | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "verb", ["", "pack", "unpack", "inspect", "merge", "export", "validate", "demo"]
)
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        assert run([*([verb] if verb else []), flag]) == 0
        shown = capsys.readouterr()
        assert "Usage: fourierft-export" in shown.out
        assert shown.err == ""
        assert max(map(len, shown.out.splitlines())) <= 100
