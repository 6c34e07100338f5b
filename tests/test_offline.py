"""The whole job without a network: nothing so much as tries to connect."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fourierft_export as ff
from tests.kill import DATA, VERBS, make_inputs

# `sitecustomize`, so that child processes are watched, too. Local sockets of a process are fine.
WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        if event == "socket.connect" and not isinstance(arguments[1], tuple):
            return  # a path: a local socket
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{event} {arguments}\\n")
        raise OSError("the test has no network")
sys.addaudithook(watch)
"""
SCRIPT = """
import sys
import numpy as np
import pytest
import fourierft_export as ff
from fourierft_export.cli.main import run
from tests.exporter_cache import remember_exports
remember_exports(pytest.MonkeyPatch())
for line in sys.argv[1:]:
    assert run(line.split()) == 0, line
for mode in ("swappable", "paired", "bank"):
    session = ff.AdapterSession(f"{mode}.onnx")
    session.load("one", "packed")
    ids = {"input_ids": np.array([[1, 5, 6]]), "attention_mask": np.ones((1, 3), np.int64)}
    ids = {name: array for name, array in ids.items() if name in session.inputs}
    adapted, base = (session.run(ids, adapter=name)["logits"] for name in ("one", None))
    assert np.abs(adapted - base).max() > 0, mode
"""
JOB = [
    "pack adapter --base small -o packed",
    "merge --base small --bundle packed -o whole",
    "verify whole",
    *(
        f"export --base small --bundle packed --mode {mode} -o {mode}.onnx"
        for mode in ("merged", "unmerged", "swappable", "paired", "bank")
    ),
    "apply --onnx graph.onnx --bundle graph.bundle --mode merged -o applied.onnx",
    "validate --base small --bundle packed --peft adapter --merged whole --onnx merged.onnx "
    "--onnx swappable.onnx --onnx paired.onnx --samples 4",
    "recover --base small --merged whole --like packed -o recovered",
    "unpack packed -o unpacked",
    f"{VERBS['train'].replace('@', '')} -o trained",
]


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    watch = folder / "watch"
    watch.mkdir(exist_ok=True)
    (watch / "sitecustomize.py").write_text(WATCH)
    environment = {name: v for name, v in os.environ.items() if not name.startswith("HF_")}
    environment |= {"ATTEMPTS": str(folder / "attempts"), "HF_HOME": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(watch), str(DATA.parent.parent)])
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True
    )


def test_the_whole_job_makes_no_connection(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    shutil.rmtree(tmp_path / "adapter")  # that of the larger base
    ff.to_peft(ff.Bundle.load(tmp_path / "small.bundle"), tmp_path / "adapter")
    done = start(tmp_path, "-c", SCRIPT, *JOB)
    assert done.returncode == 0, done.stderr[-3000:]
    attempts = tmp_path / "attempts"
    assert not attempts.exists(), attempts.read_text()


@pytest.mark.parametrize(
    "line", ["socket.create_connection(('127.0.0.1', 9))", "socket.gethostbyname('a.invalid')"]
)
def test_a_connection_would_be_seen(line: str, tmp_path: Path) -> None:
    assert start(tmp_path, "-c", f"import socket; {line}").returncode == 1
    assert "socket." in (tmp_path / "attempts").read_text()
