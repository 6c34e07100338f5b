"""What verbs print for people, their help and its examples, and the program as a process.

Their JSON and their exit codes are pinned by tests/test_contract.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import fourierft_export as ff
from fourierft_export.cli.main import run, verbs

Text = Callable[..., tuple[str, str]]


@pytest.fixture
def text(capsys: pytest.CaptureFixture[str]) -> Text:
    """`text(*words)`: stdout and stderr of a verb that must succeed."""

    def call(*words: object) -> tuple[str, str]:
        code = run([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return call


@pytest.fixture
def named_base(stories_adapter: Path, stories260k: Path, tmp_path: Path) -> Path:
    """A copy of the adapter whose config names its base."""
    adapter = tmp_path / "adapter"
    shutil.copytree(stories_adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(stories260k)
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return adapter


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_for_people(
    stories_bundle: Path, stories_adapter: Path, stories260k: Path, published_dir: Path, text: Text
) -> None:
    (config, *_) = sorted(published_dir.iterdir())
    for path, pieces in {
        stories_bundle: ("bound to its base", "seed 777", "scaling 300", "64 x 64", "q_proj"),
        stories_adapter: ("PEFT FourierFT adapter", "q_proj", "of tensors"),
        config: ("config only", "n_frequency 2000"),
        stories260k: ("260,032 parameters", "LlamaForCausalLM"),
        stories260k / "model.safetensors": ("260,032 parameters",),
    }.items():
        out, err = text("inspect", path)
        assert all(piece in out for piece in pieces), out
        assert err == ""


def test_inspect_does_not_read_the_base(named_base: Path, text: Text) -> None:
    """A config may name a folder on this machine, which `inspect` leaves alone."""
    config = named_base / "adapter_config.json"
    (named_base / "model.safetensors").write_bytes(b"damaged")
    (named_base / "config.json").write_text("{}")
    fields = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": str(named_base)}
    config.write_text(json.dumps(fields), "utf-8")
    assert "10" in text("inspect", named_base)[0]


# --- notes ---------------------------------------------------------------------------------------


def test_pack_says_what_the_bundle_is_bound_to(
    stories_adapter: Path, named_base: Path, stories260k: Path, tmp_path: Path, text: Text
) -> None:
    out, err = text("pack", stories_adapter, "-o", tmp_path / "b")
    assert out.startswith(f"{tmp_path / 'b'}: 10 layers, 1,000 coefficients, ")
    assert err.startswith("note: the bundle is unbound")
    assert "unbound" in text("inspect", tmp_path / "b")[0]
    _, err = text("pack", named_base, "-o", tmp_path / "b", "--force")
    assert f"note: bound to {stories260k}" in err
    assert ff.Bundle.load(tmp_path / "b").is_bound
    weights = named_base / "adapter_model.safetensors"
    name = "base_model.model.lm_head.base_layer.weight"
    save_file({**load_file(weights), name: np.zeros((8, 4), np.float32)}, weights)
    _, err = text("pack", named_base, "-o", tmp_path / "c")
    assert f"note: {name} is the base's own weight and was left out" in err
    assert not ff.Bundle.load(tmp_path / "c").saved


def test_the_entry_rule_of_older_torch(
    stories_adapter: Path, stories260k: Path, tmp_path: Path, run_verb: Callable[..., Any]
) -> None:
    words = ["pack", stories_adapter, "--base", stories260k, "-o", tmp_path / "b"]
    found = run_verb(*words, "--entry-rule", "r64").json
    assert {group["entry_rule"] for group in found["bundle"]["groups"]} == {"r64"}


# --- export ---------------------------------------------------------------------------------------


def test_options_of_export(
    stories260k: Path, stories_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They reach the library under its own names; what they do is tested there."""
    given: dict[str, Any] = {}

    def export(base: str, bundles: tuple[str, ...], out: str, **options: Any) -> None:
        given.update(options)
        raise ff.errors.UsageError("stop here")

    monkeypatch.setattr("fourierft_export.onnx_graph.trace.pretrained.export_pretrained", export)
    words = ["export", "--base", stories260k, "--bundle", stories_bundle, "--mode", "unmerged"]
    words += ["-o", tmp_path / "out"]
    assert run([*map(str, words)]) == 2
    assert given.pop("progress")
    defaults = {"mode": "unmerged", "defaults": "bundle", "task": None, "cache": False}
    defaults |= {"dtype": "float32", "opset": None, "ir_version": None, "inline": False}
    assert given.items() >= defaults.items()
    more = "--cache --dtype float16 --inline --task text-generation --opset 21 --ir-version 11"
    assert run([*map(str, words), *more.split(), "--defaults", "base", "--weight", "2"]) == 2
    wanted = {"cache": True, "dtype": "float16", "inline": True, "task": "text-generation"}
    wanted |= {"opset": 21, "ir_version": 11, "defaults": "base", "weights": (2.0,)}
    assert given.items() >= wanted.items()


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["", *verbs.commands])
def test_help(verb: str, text: Text) -> None:
    shown = [text(*([verb] if verb else []), flag) for flag in ("-h", "--help")]
    assert shown[0] == shown[1]
    out, err = shown[0]
    assert out.startswith("Usage: fourierft-export") and err == ""
    assert max(map(len, out.splitlines())) <= 100
    assert verb or not any(line.endswith("...") for line in out.splitlines()[1:])
    if verb not in ("", "train"):
        assert f"Examples:\n  fourierft-export {verb}" in out and "General:" in out


def test_near_names_are_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    for words, hint in ((["mrege"], "did you mean merge?"), (["merge", "--bundel"], "'--bundle'")):
        assert run(words) == 2
        assert hint in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    script, _ = text("completion", shell)
    assert "_FOURIERFT_EXPORT_COMPLETE" in script and "\\n" not in script.split("IFS")[0]
    monkeypatch.setenv("_FOURIERFT_EXPORT_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", "fourierft-export merge --all")
    monkeypatch.setenv("COMP_CWORD", "--all" if shell == "fish" else "2")
    with pytest.raises(SystemExit):
        run([])


def test_the_examples_work(
    tiny_model: Callable[[str], Any],
    tiny_base: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: Text,
) -> None:
    """In one folder with `base`, `adapter`, `in.onnx` and two bundles, in an order that fits."""
    monkeypatch.chdir(tmp_path)
    fields = {"target_modules": ["q_proj", "v_proj"], "n_frequency": 30}
    shutil.copytree(tiny_base("llama"), "base")
    shutil.copytree(tiny_adapter("llama", **fields), "adapter")
    ff.from_peft(tiny_adapter("llama", seed=1, **fields)).save("b.fourierft.safetensors")
    torch.onnx.export(
        tiny_model("llama"),
        (),
        "in.onnx",
        kwargs={"input_ids": torch.ones((2, 5), dtype=torch.int64), "use_cache": False},
        output_names=["logits"],
        verbose=False,
    )
    done = set()
    order = "pack:0 unpack merge verify export diff pack:1 pack:2 recover apply validate inspect"
    for name in order.split():
        verb, _, which = name.partition(":")
        command: Any = verbs.commands[verb]
        for example in command.examples if not which else [command.examples[int(which)]]:
            text(*example.split())
            done.add(example)
    left = {e for command in verbs.commands.values() for e in getattr(command, "examples", ())}
    assert {example.split()[0] for example in left - done} <= {
        "demo",
        "train",
        "completion",
        "push",
    }
    assert Path("a.onnx_adapter").stat().st_size > 0
    back = ff.Bundle.load("from_onnx.fourierft.safetensors")
    assert back.spectra.keys() == ff.Bundle.load("a.fourierft.safetensors").spectra.keys()


# --- as a program ---------------------------------------------------------------------------------


def program(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fourierft_export", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_as_a_program(stories_bundle: Path, tmp_path: Path) -> None:
    done = program("inspect", stories_bundle, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["inspect"]["layers"] == 10
    failed = program("inspect", tmp_path / "absent", "--json")
    assert failed.returncode == 6
    assert json.loads(failed.stdout)["error"]["kind"] == "file-access"
    assert failed.stderr.count("\n") == 1
    shown = program("--version")
    assert (shown.returncode, ff.__version__ in shown.stdout) == (0, True)


def test_a_reader_that_goes_away_is_no_error(stories_bundle: Path) -> None:
    command = f"{sys.executable} -m fourierft_export inspect {stories_bundle} | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
