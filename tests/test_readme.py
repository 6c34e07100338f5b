"""The README's examples run: every fenced block that follows a `<!-- test -->` line.

They run in order in one folder, where each may use what the ones before it wrote. There `minilm/`
is the base model, `adapter/` a PEFT adapter of it, and `train.tsv` and `dev.tsv` are rows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^<!-- test -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    return [Block(*found.groups()) for found in BLOCK.finditer(text)]


def test_every_mark_has_a_block() -> None:
    text = README.read_text("utf-8")
    found = blocks(text)
    assert len(found) == text.count("<!-- test -->")
    assert {block.language for block in found} == {"bash", "python"}


@pytest.mark.timeout(1200)  # torch starts in every block: minutes on a busy machine
def test_examples_run(
    minilm_dir: Path, trained_minilm_adapter: Path, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(minilm_dir, tmp_path / "minilm")
    shutil.copytree(trained_minilm_adapter, tmp_path / "adapter")
    for name in ("train.tsv", "dev.tsv"):
        lines = (data_dir / "text/sst2" / name).read_text("utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:65]), "utf-8")
    scripts = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ["PATH"]])}
    for number, block in enumerate(blocks(README.read_text("utf-8")), start=1):
        shell = ["bash", "-euo", "pipefail"] if block.language == "bash" else [sys.executable]
        done = subprocess.run(
            [*shell, "-c", block.code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"block {number}:\n{block.code}\n{done.stdout}{done.stderr}"
