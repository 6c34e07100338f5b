"""The verb `train` as its user meets it: real models, files, options, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourierft_export import Bundle
from fourierft_export.cli.main import run
from fourierft_export.cli.train import RUN_KEYS, train
from fourierft_export.train.settings import SETTING_NAMES

FEW = ["--device", "cpu", "--steps", "3", "--batch-size", "8", "--max-length", "24"]
FACTORY = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3))
"""


@pytest.fixture(scope="module")
def stories(stories260k: Path, stories_tokens: np.ndarray, tmp_path_factory: Any) -> list[str]:
    """Options for a language model and a few rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"input_ids": row.tolist()} for row in stories_tokens] * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return ["train", "--model", str(stories260k), "--task", "causal-lm", "--data", str(path)]


def test_a_classifier_from_text(
    minilm_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.fourierft.safetensors"
    text = data_dir / "text/trec"
    words = ["train", "--model", str(minilm_dir), "--task", "text-classification"]
    words += ["--data", str(text / "train.tsv"), "-o", str(out), "--max-train-rows", "40", *FEW]
    assert run([*words, "--json"]) == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    told = answer["train"]
    bundle = Bundle.load(out)
    assert told["bundle_bytes"] == out.stat().st_size
    assert told["parameters"] == {"spectra": 12_000, "heads": 384 * 6 + 6}
    assert {name.rsplit(".", 1)[-1] for name in (m.name for m in bundle.layers)} == {
        "query",
        "value",
    }
    assert bundle.spec.task_type == "SEQ_CLS"
    assert told["adapter"]["scaling"] == bundle.spec.scaling
    assert 0 <= told["before"]["accuracy"] <= 1
    assert any("held out" in note for note in answer["notes"])
    assert "note: " in shown.err
    # What is trained fits what the toolkit does next.
    assert run(["validate", "--base", str(minilm_dir), "--bundle", str(out), "--samples", "2"]) == 0


def test_a_language_model_for_people(
    stories: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.fourierft.safetensors"
    words = [*stories, "--eval", stories[-1], "-o", str(out), "--device", "cpu"]
    words += ["--epochs", "4", "--batch-size", "4", "--n-frequency", "200", "--eval-every", "4"]
    assert run(words) == 0
    shown = capsys.readouterr()
    scored = [line for line in shown.err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in scored] == [f"step {n} of 12" for n in (0, 4, 8, 12)]
    assert ", perplexity " in scored[1] and scored[1].endswith("; kept")
    lines = shown.out.splitlines()
    assert lines[0].startswith(f"{out}: ")
    assert "10 layers adapted, 2,000 coefficients" in lines[0]
    told = json.loads((tmp_path / "b.fourierft.safetensors.train/metrics.json").read_text())
    assert told["best"]["loss"] < 0.97 * told["before"]["loss"]
    best = told["best"][told["metric"]]
    assert f"{best:.4g} at its best, after step {told['best_step']} of 12" in lines[1]
    assert "12 rows, 4 epochs" in lines[2]
    assert f"next: fourierft-export validate --base {stories[2]} --bundle {out}" in lines
    refused = [*words, "--json"]
    assert run(refused) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["where"] == str(out)
    assert "--force" in error["remedy"]


def test_a_file_of_options_and_the_command_line_over_it(
    stories: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    keys = dict(zip(stories[1::2], stories[2::2], strict=True))
    lines = [f"{key.removeprefix('--')} = {json.dumps(value)}" for key, value in keys.items()]
    lines += ["steps = 9", "learning-rate = 0.25", "target_modules = ['q_proj']", "device = 'cpu'"]
    lines += [f"output = {json.dumps(str(out))}", "batch_size = 4"]
    config = tmp_path / "run.toml"
    config.write_text("\n".join(lines), "utf-8")
    assert run(["train", "--config", str(config), "--epochs", "1", "--seed", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["train"]["settings"]
    assert (told["epochs"], told["steps"], told["seed"]) == (1.0, None, 5)
    assert (told["learning_rate"], told["target_modules"]) == (0.25, ["q_proj"])
    assert {m.name.rsplit(".", 1)[-1] for m in Bundle.load(out).layers} == {"q_proj"}
    config.write_text("\n".join([*lines, "epoch = 2", "modell = 'x'"]), "utf-8")
    assert run(["train", "--config", str(config), "--json"]) == 2
    offenders = json.loads(capsys.readouterr().out)["error"]["offenders"]
    assert offenders == [
        "epoch: no such setting; did you mean epochs?",
        "modell: no such setting; did you mean model?",
    ]


def test_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_net_for_train.py").write_text(FACTORY, "utf-8")
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 6)).astype(np.float32)
    np.savez("rows.npz", inputs=inputs, labels=inputs[:, :3].argmax(1))
    words = ["train", "--module", "own_net_for_train:model", "--data", "rows.npz", "-o", "net"]
    words += ["--device", "cpu", "--epochs", "8", "--batch-size", "8"]
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert "next: fourierft-export inspect net" in shown
    told = json.loads(Path("net.train/metrics.json").read_text("utf-8"))
    assert told["best"]["loss"] < 0.97 * told["before"]["loss"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--data", "x.tsv"], 2, "Missing option '-o'"),
        (["-o", "a", "--steps", "0", "--seed", "-1"], 2, "2 that are not"),
        (["-o", "no/such/a"], 6, "a folder to write to"),
        (["-o", "a", "--resume"], 6, "leave --resume out"),
        (["-o", "a", "--resume", "--force"], 2, "expected one of them, found both"),
        (["-o", "a", "--task", "poetry"], 2, "poetry"),
        (["-o", "a", "--bundle", "absent"], 6, "absent"),
        (["-o", "a", "--bundle", "./a", "--force"], 2, "an output apart from the inputs"),
        (["-o", "a", "--config", "absent.toml"], 6, "absent.toml"),
        (["-o", "a", "--device", "abacus"], 2, "abacus"),
    ],
)
def test_refusals(
    words: list[str],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", *words]) == code
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_trained_further_and_a_wrong_one_refused(
    stories: list[str], stories_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*stories, "--bundle", str(stories_adapter), "-o", str(tmp_path / "d"), *FEW]
    assert run([*words, "--n-frequency", "7"]) == 2
    assert "n_frequency: expected settings of the training alone" in capsys.readouterr().err
    assert run(words) == 0
    assert Bundle.load(tmp_path / "d").spec.scaling == 300
    wrong = [*stories, "--bundle", str(tmp_path / "e"), "-o", str(tmp_path / "f"), *FEW]
    bundle = Bundle.load(tmp_path / "d")
    spectra = {f"{name}x": array for name, array in bundle.spectra.items()}
    from dataclasses import replace

    layers = tuple(replace(layer, name=f"{layer.name}x") for layer in bundle.layers)
    Bundle.build(replace(bundle.spec, layers=layers), spectra).save(tmp_path / "e")
    assert run(wrong) == 4
    assert not (tmp_path / "f").exists()


def test_every_option_is_a_setting_or_a_key() -> None:
    """So that a settings file can hold all of them, but those that say how to begin."""
    own = {"config", "resume", "force", "allow_base_mismatch", "as_json", "debug"}
    options = {option.name for option in train.params} - own
    assert options <= {*SETTING_NAMES, *RUN_KEYS}
    assert set(RUN_KEYS) <= options
    only_in_files = {"n_frequency_pattern", "layers_to_transform"}
    assert set(SETTING_NAMES) - options == only_in_files


def test_help_is_in_sections(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "What is trained on what:",
        "The adapter:",
        "How it learns:",
        "On what machine:",
        "Scores and outputs:",
        "Others:",
    ]


def test_an_interrupt_keeps_what_there_is(stories: list[str], tmp_path: Path) -> None:
    """Ctrl-C from outside, then --resume: the same files as without it."""
    common = [*stories, "--device", "cpu", "--batch-size", "4", "--threads", "1"]
    common += ["--n-frequency", "50", "--eval-every", "10", "--steps", "40"]
    # A parent that runs in the background hands on that Ctrl-C is ignored; the child takes it back.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from fourierft_export.cli.main import main; main(sys.argv[1:])"
    words = [*common, "-o", str(tmp_path / "a")]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True
    )
    state = tmp_path / "a.train/state.safetensors"
    deadline = time.monotonic() + 200
    while not state.exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "error: interrupted; " in errors
    assert "of 40, for --resume" in errors
    Bundle.load(tmp_path / "a")
    assert run([*words, "--resume"]) == 0
    assert run([*common, "-o", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
