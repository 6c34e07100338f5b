"""`torchrun -m fourierft_export train`: one curve, one writer, one voice, and a clean end."""

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

import pytest

from fourierft_export import Bundle
from fourierft_export.cli.main import run
from fourierft_export.train.state import folder_of

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PATIENCE = 120  # of a test that would hang otherwise

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def arguments(stories260k: Path, tmp_path: Path) -> list[str]:
    """Real sentences' worth of tokens for the small Llama; batches of 8 leave a last one of 5."""
    rows = [[1, *range(3 + i, 3 + i + 5 + 7 * i % 23)] for i in range(21)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), "utf-8")
    what = ["--model", str(stories260k), "--task", "causal-lm", "--data", str(data)]
    how = ["--eval", str(data), "--batch-size", "8", "--device", "cpu"]
    return ["train", *what, *how]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """`launch(arguments)`: the command in two processes, in a group of its own."""

    def start(arguments: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *TORCHRUN, "-m", "fourierft_export", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_two_processes_write_what_one_does(
    arguments: list[str], launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*arguments, "--steps", "20", "--json", "-o"]
    ended = launch([*more, "two.fourierft.safetensors", "--shard-base"])
    alone = tmp_path / "one.fourierft.safetensors"
    assert run([*more, str(alone)]) == 0
    expected = json.loads(capsys.readouterr().out)["train"]
    out, errors = ended.communicate(timeout=PATIENCE)
    assert ended.returncode == 0, errors
    found = json.loads(out)["train"]  # one object, though two processes ran
    assert (found["processes"], expected["processes"]) == (2, 1)
    assert found["best"]["loss"] == pytest.approx(expected["best"]["loss"], rel=1e-6)
    assert found["best"]["loss"] < 0.9 * found["before"]["loss"]
    curves = [
        json.loads((folder_of(tmp_path / name) / "metrics.json").read_text("utf-8"))["curves"]
        for name in ("two.fourierft.safetensors", alone.name)
    ]
    assert curves[0]["loss"] == pytest.approx(curves[1]["loss"], rel=1e-6)
    two = Bundle.load(tmp_path / "two.fourierft.safetensors")
    one = Bundle.load(alone)
    assert two.spec == one.spec
    files = sorted(p.name for p in folder_of(tmp_path / "two.fourierft.safetensors").iterdir())
    assert files == sorted(p.name for p in folder_of(alone).iterdir())
    assert len(list(tmp_path.glob("*two*"))) == 2, "one bundle, one folder, nothing left over"


def test_bad_input_is_told_once(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input_ids": "none"}\n', "utf-8")
    ended = launch([*arguments, "--steps", "5", "--json", "-o", "out.safetensors"])
    out, errors = ended.communicate(timeout=PATIENCE)
    assert ended.returncode != 0
    assert json.loads(out)["error"]["kind"] == "bad-input"
    assert errors.count("error: ") == 1
    assert "input_ids" in errors
    assert not list(tmp_path.glob("out*"))


def test_a_killed_process_ends_all(arguments: list[str], launch: Launch, tmp_path: Path) -> None:
    bundle = tmp_path / "out.fourierft.safetensors"
    started = launch([*arguments, "--steps", "100000", "--eval-every", "2", "-o", str(bundle)])
    workers = wait_for_bundle(started, bundle)
    os.kill(workers[1], signal.SIGKILL)
    _, errors = started.communicate(timeout=PATIENCE)
    assert started.returncode not in (0, None)
    assert errors.count("error: ") <= 1
    assert_kept(bundle)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_an_interrupt_leaves_the_bundle_and_the_state(
    arguments: list[str], launch: Launch, tmp_path: Path
) -> None:
    bundle = tmp_path / "out.fourierft.safetensors"
    started = launch([*arguments, "--steps", "100000", "--eval-every", "2", "-o", str(bundle)])
    workers = wait_for_bundle(started, bundle)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=PATIENCE)
    assert started.returncode not in (0, None)
    assert errors.count("interrupted; ") == 1, errors
    assert "for --resume" in errors
    assert_kept(bundle)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def wait_for_bundle(started: subprocess.Popen[str], bundle: Path) -> list[int]:
    """The workers' process ids, once the first bundle is there."""
    deadline = time.monotonic() + PATIENCE
    while not (folder_of(bundle) / "state.safetensors").exists():
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text()
    ranks: dict[int, int] = {}
    for child in map(int, children.split()):
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        pairs = dict(line.partition("=")[::2] for line in environment)
        if "LOCAL_RANK" in pairs:
            ranks[int(pairs["LOCAL_RANK"])] = child
    assert sorted(ranks) == [0, 1]
    return [ranks[0], ranks[1]]


def assert_kept(bundle: Path) -> None:
    """The bundle, the state and the metrics are whole, and belong to one moment."""
    assert len(Bundle.load(bundle).layers) == 10
    from fourierft_export.train.state import load_state

    history = load_state(folder_of(bundle) / "state.safetensors").history
    assert len(history.losses) >= 2
    metrics: dict[str, Any] = json.loads((folder_of(bundle) / "metrics.json").read_text("utf-8"))
    assert metrics["best_step"] >= 2
