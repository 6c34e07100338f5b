"""The same inputs give the same bytes, whatever the hash seed, the threads and the folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fourierft_export.onnx_graph.mode_names import MODES
from tests.kill import DATA, VERBS, files_in, make_inputs

SCRIPT = """
import sys
import pytest
from fourierft_export.cli.main import run
from tests.exporter_cache import remember_exports
remember_exports(pytest.MonkeyPatch())
for line in sys.argv[1:]:
    assert run(line.split()) == 0, line
"""


def make_lines() -> list[str]:
    """A command line for each verb and mode; each writes files with .onnx in their paths."""
    lines = [VERBS[verb] for verb in ("pack", "unpack", "merge", "recover")]
    lines.append(f"{VERBS['merge']} --workers 2")
    for verb in ("apply", "export"):
        lines += [VERBS[verb].replace("mode merged", f"mode {mode}") for mode in MODES]
    return [f"{line.replace('@', '')} -o {n}.onnx" for n, line in enumerate(lines)]


def test_every_verb_and_mode(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    make_inputs(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "another folder" / "deeper")
    folders, running = [], []
    for folder, seed, threads in (("first", "0", "1"), ("another folder/deeper", "7", "3")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        environment["PYTHONPATH"] = str(DATA.parent.parent)
        command = [sys.executable, "-c", SCRIPT, *make_lines()]
        folders.append(tmp_path / folder)
        running.append(subprocess.Popen(command, env=environment, cwd=folders[-1]))
    assert [process.wait() for process in running] == [0, 0]
    found = [{n: d for n, d in files_in(f).items() if ".onnx" in n} for f in folders]
    assert found[0].keys() == found[1].keys()
    assert [name for name, data in found[0].items() if found[1][name] != data] == []
    for mode in range(2 * len(MODES)):
        assert f"{5 + mode}.onnx" in found[0]
    merged, by_workers = (
        {name.partition("/")[2]: d for name, d in found[0].items() if name.startswith(f"{n}.onnx/")}
        for n in (2, 4)
    )
    assert merged and merged == by_workers
