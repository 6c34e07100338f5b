"""The same inputs give the same bytes, whatever the hash seed, the threads and the folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kill import DATA, VERBS, files_in, make_inputs

SCRIPT = """
import sys
from fourierft_export.cli.main import run
for line in sys.argv[1:]:
    assert run(line.split()) == 0, line
"""


def test_pack_merge_apply_and_recover(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    make_inputs(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "another folder" / "deeper")
    lines = [
        f"{VERBS[verb].replace('@', '')} {more} -o {verb}.onnx{number}"
        for verb in ("pack", "unpack", "merge", "recover", "apply")
        for number, more in enumerate(["", "--workers 2"] if verb == "merge" else [""])
    ]
    found = []
    for folder, seed, threads in (("first", "0", "1"), ("another folder/deeper", "7", "3")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        environment["PYTHONPATH"] = str(DATA.parent.parent)
        command = [sys.executable, "-c", SCRIPT, *lines]
        subprocess.run(command, env=environment, cwd=tmp_path / folder, check=True)
        outputs = files_in(tmp_path / folder)
        found.append({name: data for name, data in outputs.items() if ".onnx" in name})
    assert found[0] == found[1]
    first, second = (
        {n.partition("/")[2]: d for n, d in found[0].items() if n.startswith(f"merge.onnx{number}")}
        for number in range(2)
    )
    assert first == second
