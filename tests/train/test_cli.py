"""The verb `train` as its user meets it: files, options, exit codes, one process and two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourierft_export as ff
from fourierft_export.cli.main import run
from fourierft_export.cli.train import train
from fourierft_export.train.settings import DataSettings, TrainSettings, kinds, read_settings
from tests.train.toy import sentences, write_jsonl, write_tsv

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--device", "cpu", "--steps", "3", "--batch-size", "8"]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMEOUT = 150  # of a test that would hang otherwise
FACTORY = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}

def whole():
    torch.manual_seed(0)
    rows = [{"x": x, "labels": x[:3].argmax()} for x in torch.randn(60, 6)]
    accuracy = lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    return {"model": Net(), "train_dataset": rows[10:], "eval_dataset": rows[:10],
            "compute_metrics": accuracy, "metric_for_best_model": "accuracy"}

def wrong():
    return {"model": Net(), "rows": []}
"""


@pytest.fixture(scope="module")
def stories(stories260k: Path, stories_tokens: np.ndarray, tmp_path_factory: Any) -> list[str]:
    """Options for a language model and a few rows; batches of 8 leave a last one of 5."""
    rows = [{"input_ids": row[: 8 + n].tolist()} for n in range(7) for row in stories_tokens]
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    words = ["train", "--model", str(stories260k), "--task", "text-generation"]
    return [*words, "--data", str(path), "--eval", str(path), "--device", "cpu"]


def test_a_classifier_from_text(
    with_tokenizer: Callable[[str], Path], run_verb: Callable[..., Any], tmp_path: Path
) -> None:
    out, base = tmp_path / "a.fourierft.safetensors", with_tokenizer("bert")
    data = write_tsv(tmp_path / "a.tsv", sentences(60))
    words = ["train", "--model", base, "--task", "sequence-classification", "--data", data]
    ran = run_verb(*words, "-o", out, "--max-train-rows", "40", *FEW)
    assert ran.code == 0
    found, bundle = ran.json["train"], ff.Bundle.load(out)
    assert found["bundle_bytes"] == out.stat().st_size
    assert found["parameters"] == {"spectra": 4 * 256, "heads": 2 * 32 + 2}
    assert {layer.name.rsplit(".", 1)[-1] for layer in bundle.layers} == {"query", "value"}
    assert bundle.spec.task_type == "SEQ_CLS"
    assert found["adapter"]["scaling"] == bundle.spec.scaling
    assert 0 <= found["before"]["accuracy"] <= 1
    assert any("held out" in note for note in ran.json["notes"])
    assert "note: " in ran.err
    # What is trained fits what the toolkit does next.
    assert run_verb("validate", "--base", base, "--bundle", out, "--samples", "2").code == 0


def test_a_language_model_for_people(
    stories: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.fourierft.safetensors"
    words = [*stories, "-o", str(out), "--epochs", "4", "--batch-size", "8"]
    words += ["--n-frequency", "200", "--eval-every", "4"]
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
    assert "21 rows, 4 epochs" in lines[2]
    assert f"next: fourierft-export validate --base {stories[2]} --bundle {out}" in lines
    assert run([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["where"] == str(out)
    assert "--force" in error["remedy"]


def test_a_file_of_options_and_the_command_line_over_it(
    stories: list[str], run_verb: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "c"
    keys = dict(zip(stories[1::2], stories[2::2], strict=True))
    lines = [f"{key.removeprefix('--')} = {json.dumps(value)}" for key, value in keys.items()]
    lines += ["steps = 9", "learning-rate = 0.25", "target_modules = ['q_proj']"]
    lines += [f"output = {json.dumps(str(out))}", "batch_size = 8", "report_to = []"]
    config = tmp_path / "run.toml"
    config.write_text("\n".join(lines), "utf-8")
    ran = run_verb("train", "--config", config, "--epochs", "1", "--seed", "5")
    told = ran.json["train"]["settings"]
    assert (told["epochs"], told["steps"], told["seed"]) == (1.0, None, 5)
    assert (told["learning_rate"], told["target_modules"]) == (0.25, ["q_proj"])
    assert {m.name.rsplit(".", 1)[-1] for m in ff.Bundle.load(out).layers} == {"q_proj"}
    config.write_text("\n".join([*lines, "epoch = 2", "modell = 'x'"]), "utf-8")
    ran = run_verb("train", "--config", config)
    assert (ran.code, ran.json["error"]["offenders"]) == (
        2,
        [
            "epoch: no such setting; did you mean epochs?",
            "modell: no such setting; did you mean model?",
        ],
    )


def test_a_model_of_ones_own(
    run_verb: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_net_for_train.py").write_text(FACTORY, "utf-8")
    words = ["train", "--module", "own_net_for_train:whole", "-o", "net", "--device", "cpu"]
    ran = run_verb(*words, "--epochs", "8", "--batch-size", "8")
    assert ran.code == 0
    told = json.loads(Path("net.train/metrics.json").read_text("utf-8"))
    assert told["best"]["loss"] < 0.97 * told["before"]["loss"]
    assert told["metric"] == "accuracy" and len(ff.Bundle.load("net").layers) == 2
    for spec, message in (
        ("own_net_for_train", "expected package.module:factory"),
        ("no_such_module:x", "No module named 'no_such_module'"),
        ("own_net_for_train:absent", "has no attribute 'absent'"),
        ("own_net_for_train:wrong", "unexpected keyword argument 'rows'"),
        ("own_net_for_train:torch.nn.Linear", "required positional argument"),
        ("os:getcwd", "a factory that returns a TrainingTask, or a mapping"),
    ):
        ran = run_verb("train", "--module", spec, "-o", "other")
        assert ran.code == 2 and message in ran.err, ran.err
    ran = run_verb("train", "--module", "own_net_for_train:whole", "--pack", "-o", "other")
    assert ran.code == 2 and "--pack: expected options that --module" in ran.err
    assert not Path("other").exists()


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
        (["-o", "a", "--task", "text-generation", "--model", "m", "--data", "d"], 6, "m: expected"),
    ],
)
def test_refusals(
    words: list[str],
    code: int,
    told: str,
    run_verb: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_verb("train", *words)
    assert ran.code == code and told in ran.err
    assert not list(tmp_path.iterdir())


def test_a_bundle_is_trained_further(
    stories: list[str], stories_adapter: Path, run_verb: Callable[..., Any], tmp_path: Path
) -> None:
    words = [*stories, "--bundle", stories_adapter, "-o", tmp_path / "d", *FEW]
    ran = run_verb(*words, "--n-frequency", "7")
    assert ran.code == 2
    assert "n_frequency: expected settings of the training alone" in ran.err
    assert run_verb(*words).code == 0
    assert ff.Bundle.load(tmp_path / "d").spec.scaling == 300


def test_settings_are_printed_as_a_file_and_nothing_is_trained(
    stories: list[str], run_verb: Callable[..., Any], tmp_path: Path
) -> None:
    ran = run_verb(*stories, "--budget", "500", "--epochs", "2", "--print-settings")
    found = ran.json["settings"]
    assert (ran.code, found["n_frequency"], found["steps"]) == (0, 50, 2)
    shown = "".join(f"{name} = {json.dumps(value)}\n" for name, value in found.items())
    (tmp_path / "run.toml").write_text(shown, "utf-8")
    again = run_verb(*stories, "--config", tmp_path / "run.toml", "--print-settings")
    assert again.json["settings"] == found
    # Three texts are more rows of four tokens: only the texts are counted by --max-train-rows.
    few = ["--max-train-rows", "3", "--pack", "--max-length", "4", "--batch-size", "1"]
    ran = run_verb(*stories, *few, "--epochs", "1", "--print-settings")
    assert ran.json["settings"]["steps"] > 3
    assert run_verb(*stories, "--print-settings", "--bundle", "a").code == 2


def test_printed_settings_of_a_budget_are_a_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers of 144 and 72 weights: the smaller one gets a quarter of its size at most."""
    monkeypatch.chdir(tmp_path)
    Path("own_net_of_a_budget.py").write_text(FACTORY, "utf-8")
    words = ["train", "--module", "own_net_of_a_budget:whole", "--print-settings"]
    assert run([*words, "--budget", "48"]) == 0
    shown = capsys.readouterr().out
    assert 'n_frequency_pattern = { "net.2" = 18 }' in shown and "n_frequency = 30" in shown
    Path("run.toml").write_text(shown, "utf-8")
    assert run([*words, "--config", "run.toml"]) == 0
    values, comment, _ = shown.partition("# for a rate that falls to zero")
    assert comment and capsys.readouterr().out == values
    # A run with these settings learns at this rate.
    same = ["--layer-rates", "same", "-o", "a"]
    assert run(["train", "--config", "run.toml", "--module", words[2], *same]) == 0
    told = json.loads(Path("a.train/metrics.json").read_text("utf-8"))
    assert max(told["rates"].values()) == pytest.approx(read_settings("run.toml")["learning_rate"])


def test_every_option_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """So that a settings file can hold all of them, but those that say how to begin."""
    own = {"config", "resume", "print_settings", "force", "allow_base_mismatch", "as_json", "debug"}
    options = {option.name for option in train.params} - own
    settings = kinds(TrainSettings) | kinds(DataSettings)
    assert options <= set(settings)
    assert set(settings) - options == {"n_frequency_pattern", "layers_to_transform"}
    assert run(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles[-4:] == ["Output:", "Checks:", "General:", "Examples:"]
    assert titles[:-4] == [
        "What is trained on what:",
        "The adapter:",
        "How it learns:",
        "On what machine:",
        "Scores and outputs:",
    ]


# --- processes of their own


def launch(words: list[str], folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """The verb in a process of its own, or in two under a launcher, in a group of its own."""
    # A parent that runs in the background hands on that Ctrl-C is ignored; the child takes it back.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from fourierft_export.cli.main import main; main(sys.argv[1:])"
    start = [*launcher, "-m", "fourierft_export"] if launcher else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *start, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(started: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not list(Path(f"{out}.train").glob("checkpoint-*/trainer_state.json")):
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupt_keeps_what_there_is(stories: list[str], tmp_path: Path) -> None:
    """Ctrl-C from outside, then --resume: the same bundle as without it."""
    common = [*stories, "--batch-size", "8", "--threads", "1"]
    common += ["--n-frequency", "50", "--eval-every", "20", "--steps", "80"]
    words = [*common, "-o", str(tmp_path / "a")]
    child = launch(words, tmp_path)
    wait_for_checkpoint(child, tmp_path / "a")
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=TIMEOUT)
    assert child.returncode == 130, errors
    assert "error: interrupted; " in errors
    assert "of 80, for --resume" in errors
    ff.Bundle.load(tmp_path / "a")
    assert run([*words, "--resume"]) == 0
    assert run([*common, "-o", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_two_processes_write_what_one_does(
    stories: list[str], run_verb: Callable[..., Any], tmp_path: Path
) -> None:
    more = [*stories, "--batch-size", "8", "--steps", "30", "--eval-every", "10", "-o"]
    started = launch([*more, "two", "--json"], tmp_path, *TWO)
    expected = run_verb(*more, tmp_path / "one").json["train"]
    out, errors = started.communicate(timeout=TIMEOUT)
    assert started.returncode == 0, errors
    assert out.count("\n") == 1, "one object, though two processes ran"
    found = json.loads(out)["train"]
    assert (found["processes"], expected["processes"]) == (2, 1)
    assert found["best"] == pytest.approx(expected["best"], rel=1e-4)
    curves = [
        json.loads((tmp_path / f"{name}.train/metrics.json").read_text("utf-8"))["curves"]
        for name in ("two", "one")
    ]
    assert len(curves[0]["loss"]) == 30
    assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], rel=1e-4)
    norms = [curve["gradient_norm"][0] for curve in curves]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert ff.Bundle.load(tmp_path / "two").spec == ff.Bundle.load(tmp_path / "one").spec
    assert sorted(path.name for path in tmp_path.glob("*two*")) == ["two", "two.train"]
    assert "Warning" not in errors


def test_of_two_processes_one_reports_an_error(stories: list[str], tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "bad.jsonl", [{"input_ids": [1, 9999]}])
    words = [str(data) if word == stories[6] else word for word in stories]
    started = launch([*words, "--json", "-o", "out"], tmp_path, *TWO)
    out, errors = started.communicate(timeout=TIMEOUT)
    assert started.returncode != 0
    assert json.loads(out)["error"]["kind"] == "bad-input"
    assert errors.count("error: ") == 1 and "input_ids" in errors
    assert not list(tmp_path.glob("out*"))


def test_a_killed_process_ends_all(stories: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [*stories, "--batch-size", "8", "--steps", "100000", "--eval-every", "2"]
    started = launch([*words, "-o", str(out)], tmp_path, *TWO)
    wait_for_checkpoint(started, out)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    workers = [
        child
        for child in children
        if b"LOCAL_RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    ]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, errors = started.communicate(timeout=TIMEOUT)
    assert started.returncode not in (0, None)
    assert errors.count("error: ") <= 1
    assert len(ff.Bundle.load(out).layers) == 10
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_base_in_pieces_learns_as_a_whole_one_and_resumes(tmp_path: Path) -> None:
    """FSDP2: the losses of one process; checkpoints hold the adapter alone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    environment |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    environment |= {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    script = str(ROOT / "tests/train/sharded.py")

    def start(out: str, *launcher: str, killed_at: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *launcher, script, str(tmp_path / out), str(killed_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    one, two = start("one"), start("two", *TWO)
    assert two.returncode == 0, two.stderr
    expected, found = json.loads(one.stdout), json.loads(two.stdout)
    assert found["processes"] == 2
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    checkpoint = tmp_path / "two.train" / "checkpoint-6"
    # The head of 8 KB is there four times; the base would be 80 KB more.
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 100_000
    assert start("again", *TWO, killed_at=5).returncode != 0
    assert (tmp_path / "again.train" / "checkpoint-4").is_dir()
    resumed = start("again", *TWO)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "again").read_bytes() == (tmp_path / "two").read_bytes()
