"""Bad input at the command line: one clear line, the right exit code, nothing written.

Inside the words of a command, `{name}` is a
path in the case's own folder, made by the function of that name below or left absent.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fourierft_export.errors import MAX_OFFENDERS_SHOWN

Q_PROJ = "model.layers.2.self_attn.q_proj"


class Case(NamedTuple):
    words: str
    code: int
    told: tuple[str, ...]  # pieces of the summary line or of its offenders


MISSING = [
    Case(words, 6, ("absent", "expected", "found"))
    for words in (
        "pack {absent} -o {out}",
        "pack {adapter} --base {absent} -o {out}",
        "unpack {absent} -o {out}",
        "inspect {absent}",
        "merge --base {absent} --bundle {bundle} -o {out}",
        "merge --base {base} --bundle {absent} -o {out}",
        "export --base {absent} --bundle {bundle} --mode merged -o {out}",
        "export --base {base} --bundle {absent} --mode merged -o {out}",
        "validate --base {base} --bundle {absent}",
        "validate --base {base} --bundle {bundle} --onnx {absent}",
    )
]
WRONG_KIND = [
    Case("pack {lora} -o {out}", 3, ("lora", "FOURIERFT", "LORA")),
    Case("inspect {lora}", 3, ("lora", "FOURIERFT", "LORA")),
    Case("merge --base {base} --bundle {lora} -o {out}", 3, ("lora", "LORA")),
    Case("pack {empty_directory} -o {out}", 3, ("empty_directory", "adapter_config.json")),
    Case("pack {base} -o {out}", 3, ("base", "adapter_config.json")),
    Case("pack {no_spectra} -o {out}", 3, ("no_spectra", "fourierft_spectrum")),
    Case("unpack {base} -o {out}", 3, ("base", "a directory")),
    Case("inspect {pickled}", 3, ("pickled", "safetensors")),
    Case("inspect {empty_file}", 3, ("empty_file",)),
    Case("inspect {fifo}", 3, ("fifo", "FIFO")),
]
DAMAGED = [
    Case(words, 3, ("truncated",))
    for words in (
        "inspect {truncated}",
        "unpack {truncated} -o {out}",
        "merge --base {base} --bundle {truncated} -o {out}",
        "export --base {base} --bundle {truncated} --mode unmerged -o {out}",
        "validate --base {base} --bundle {truncated}",
    )
] + [
    Case("inspect {flipped}", 3, ("flipped", "hash")),
    Case("merge --base {base} --bundle {flipped} -o {out}", 3, ("flipped", "hash")),
    Case("pack {adapter} --base {truncated_base} -o {out}", 3, ("truncated_base",)),
]
OTHER_BASE = [
    Case(f"{verb} --base {{{base}}} --bundle {{bundle}}{rest}", 4, (base, Q_PROJ))
    for verb, rest in (
        ("merge", " -o {out}"),
        ("export", " --mode merged -o {out}"),
        ("export", " --mode unmerged -o {out}"),
        ("validate", ""),
    )
    for base in ("other_weights", "tiny_gpt2")
] + [Case("pack {adapter} --base {tiny_gpt2} -o {out}", 4, ("tiny_gpt2", Q_PROJ))]
EXISTING = [
    Case(f"{words} -o {{{out}}}", 2, (out, "--force"))
    for words, out in (
        ("pack {adapter}", "existing_file"),
        ("unpack {bundle}", "existing_directory"),
        ("merge --base {base} --bundle {bundle}", "existing_directory"),
        ("export --base {base} --bundle {bundle} --mode merged", "existing_file"),
    )
]
ITSELF = [
    Case("merge --base {base} --bundle {bundle} -o {base} --force", 2, ("base",)),
    Case("merge --base {base} --bundle {bundle} -o {link_to_base} --force", 2, ("link_to_base",)),
    Case("pack {adapter} -o {adapter} --force", 2, ("adapter",)),
]
USAGE = [
    Case("pack", 2, ("Missing argument", "--help")),
    Case("pack {adapter}", 2, ("--output", "--help")),
    Case("frobnicate", 2, ("frobnicate", "--help")),
    Case("inspect {base} --frobnicate", 2, ("--frobnicate", "--help")),
    Case("export --base {base} --bundle {bundle} --mode sideways -o {out}", 2, ("sideways",)),
    Case("merge --base {base} --bundle {bundle} --weight 1 --weight 2 -o {out}", 2, ("--weight",)),
    Case("validate --base {base} --bundle {bundle} --tolerance tight", 2, ("tight",)),
    Case("validate", 2, ("validate",)),
]
FAILED = [Case("validate --base {base} --bundle {bundle} --merged {base}", 5, ("merged",))]

CASES = MISSING + WRONG_KIND + DAMAGED + OTHER_BASE + EXISTING + ITSELF + USAGE + FAILED


class Maker:
    """Makes the paths that a case names, by the method of that name."""

    def __init__(
        self, folder: Path, base: Path, adapter: Path, tiny_gpt2: Path, bundle: bytes
    ) -> None:
        self.folder = folder
        self.sources = {"base": base, "adapter": adapter, "tiny_gpt2": tiny_gpt2}
        self.bundle_bytes = bundle

    def path(self, name: str) -> str:
        path = self.folder / name
        if name in self.sources:
            shutil.copytree(self.sources[name], path, dirs_exist_ok=True)
        elif name not in ("absent", "out"):
            getattr(self, name)(path)
        return str(path)

    def bundle(self, path: Path) -> None:
        path.write_bytes(self.bundle_bytes)

    def truncated(self, path: Path) -> None:
        path.write_bytes(self.bundle_bytes[:-1])

    def flipped(self, path: Path) -> None:
        content = bytearray(self.bundle_bytes)
        content[-5] ^= 1
        path.write_bytes(content)

    def truncated_base(self, path: Path) -> None:
        shutil.copytree(self.sources["base"], path)
        os.truncate(path / "model.safetensors", 500_000)

    def other_weights(self, path: Path) -> None:
        """Right names and shapes, but one targeted weight was trained further."""
        shutil.copytree(self.sources["base"], path)
        tensors = load_file(path / "model.safetensors")
        tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"] * np.float32(1.5)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    def lora(self, path: Path) -> None:
        path.mkdir()
        config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
        (path / "adapter_config.json").write_text(json.dumps(config), "utf-8")
        name = f"base_model.model.{Q_PROJ}.lora_A.weight"
        save_file({name: np.zeros((8, 64), np.float32)}, path / "adapter_model.safetensors")

    def no_spectra(self, path: Path) -> None:
        shutil.copytree(self.sources["adapter"], path)
        save_file(
            {"base_model.model.score.weight": np.zeros((2, 64), np.float32)},
            path / "adapter_model.safetensors",
        )

    def pickled(self, path: Path) -> None:
        path.write_bytes(pickle.dumps({"weight": [1.0] * 100}))

    def empty_file(self, path: Path) -> None:
        path.write_bytes(b"")

    def empty_directory(self, path: Path) -> None:
        path.mkdir()

    def fifo(self, path: Path) -> None:
        os.mkfifo(path)

    def existing_file(self, path: Path) -> None:
        path.write_text("do not touch", "utf-8")

    def existing_directory(self, path: Path) -> None:
        path.mkdir()
        (path / "file").write_text("do not touch", "utf-8")

    def link_to_base(self, path: Path) -> None:
        path.symlink_to(self.folder / "base", target_is_directory=True)


@pytest.fixture
def words_of(
    stories_adapter: Path, stories260k: Path, tiny_gpt2: Path, stories_bundle: Path, tmp_path: Path
) -> Callable[[str], list[str]]:
    """`words_of(text)`: a command's words, with the paths that it names made."""
    maker = Maker(tmp_path, stories260k, stories_adapter, tiny_gpt2, stories_bundle.read_bytes())

    def words(text: str) -> list[str]:
        return [maker.path(word[1:-1]) if word.startswith("{") else word for word in text.split()]

    return words


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: the bytes of files, None for what is no file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_bad_input(
    case: Case,
    words_of: Callable[[str], list[str]],
    tmp_path: Path,
    run_verb: Callable[..., Any],
) -> None:
    words = words_of(case.words)
    before = tree(tmp_path)
    code, found, err = run_verb(*words)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == case.code == found["error"]["code"], err
    assert lines[0].startswith("error: ")
    assert len(lines) <= 1 + MAX_OFFENDERS_SHOWN
    assert all(line.startswith("  ") for line in lines[1:])
    assert all(piece in err for piece in case.told), err
    assert tree(tmp_path) == before
    assert {"kind", "where", "expected", "found", "remedy"} <= found["error"].keys()


def test_offenders_are_listed_together(
    words_of: Callable[[str], list[str]], run_verb: Callable[..., Any]
) -> None:
    """All ten layers that a GPT-2 lacks, in one answer."""
    found = run_verb(*words_of("merge --base {tiny_gpt2} --bundle {bundle} -o {out}"))
    offenders = found.json["error"]["offenders"]
    assert (found.code, len(offenders)) == (4, 10)
    assert any(Q_PROJ in line for line in offenders)
