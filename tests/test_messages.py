"""Bad input at the command line: one clear line, the right exit code, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from fourierft_export.errors import MAX_OFFENDERS_SHOWN

Q_PROJ = "model.layers.2.self_attn.q_proj"

# Exit code; the command; after a bar, pieces of the summary line or of its offenders.
CASES = """
6 pack adapter --base absent -o out | absent expected found
6 unpack absent -o out | absent expected found
6 merge --base base --bundle absent -o out | absent expected found
6 export --base absent --bundle bundle --mode merged -o out | absent expected found
6 validate --base base --bundle bundle --onnx absent | absent expected found
3 pack lora -o out | lora FOURIERFT LORA
3 inspect lora | lora FOURIERFT LORA
3 merge --base base --bundle lora -o out | lora LORA
3 pack empty_folder -o out | empty_folder adapter_config.json
3 pack base -o out | base adapter_config.json
3 pack no_spectra -o out | no_spectra fourierft_spectrum
3 unpack base -o out | base directory
3 inspect pickled | pickled safetensors
3 inspect empty_file | empty_file
3 inspect fifo | fifo FIFO
3 inspect truncated | truncated
3 merge --base base --bundle truncated -o out | truncated
3 export --base base --bundle truncated --mode unmerged -o out | truncated
3 validate --base base --bundle truncated | truncated
3 merge --base base --bundle flipped -o out | flipped hash
3 pack adapter --base truncated_base -o out | truncated_base
4 merge --base trained --bundle bundle -o out | trained Q_PROJ
4 merge --base gpt2 --bundle bundle -o out | gpt2 Q_PROJ
4 export --base trained --bundle bundle --mode unmerged -o out | trained Q_PROJ
4 export --base gpt2 --bundle bundle --mode merged -o out | gpt2 Q_PROJ
4 validate --base trained --bundle bundle | trained Q_PROJ
4 pack adapter --base gpt2 -o out | gpt2 Q_PROJ
2 pack adapter -o empty_file | empty_file --force
2 unpack bundle -o lora | lora --force
2 merge --base base --bundle bundle -o adapter | adapter --force
2 export --base base --bundle bundle --mode merged -o empty_file | empty_file --force
2 merge --base base --bundle bundle -o link_to_base --force | link_to_base
2 pack adapter -o adapter --force | adapter
2 pack | Missing --output --help
2 pack -o out | SOURCE found 0
2 pack adapter | --output --help
2 frobnicate | frobnicate --help
2 inspect base --frobnicate | --frobnicate --help
2 export --base base --bundle bundle --mode sideways -o out | sideways
2 merge --base base --bundle bundle --weight 1 --weight 2 -o out | --weight
2 merge --base base --bundle bundle --workers 2 --scheduler tcp://h:1 -o out | processes scheduler
2 merge --base base --bundle bundle --workers -1 -o out | --workers
3 merge --base linked --bundle bundle -o out | --allow-links
2 apply --onnx graph --bundle bundle --mode merged --map b:w -o out | LAYER=INITIALIZER
2 apply --onnx graph --bundle bundle --mode merged --map c=w -o out | layers adapter
2 apply --onnx graph --bundle bundle --mode merged --weight 1 --weight 2 -o out | each
2 apply --onnx graph --bundle bundle --mode merged --weight nan -o out | finite
6 apply --onnx graph --bundle bundle --mode merged --base absent -o out | absent
4 apply --onnx graph --bundle bundle --mode unmerged -o out | --map LAYER=INITIALIZER
2 recover --onnx graph -o out | no adapter metadata
6 recover --onnx absent -o out | absent
2 recover --base base -o out | --base only
2 recover --merged base -o out | --merged only
2 recover -o out | neither
2 recover --base base --merged base --adapter a -o out | --adapter
2 recover --onnx graph --seed 0 -o out | --seed
2 recover --onnx graph --n-frequency 1 --targets q -o out | --n-frequency --targets
2 recover --onnx graph --scaling 1 --entry-rule small -o out | --scaling --entry-rule
2 recover --onnx graph --merged base --like bundle -o out | --merged --like
2 pack bundle --to onnx-adapter --onnx graph --adapter a -o out | --adapter folder
2 pack bundle --to onnx-inputs --onnx graph --entry-rule r64 -o out | --entry-rule --base
2 validate --base base --bundle bundle --tolerance tight | tight
2 validate | validate
5 validate --base base --bundle bundle --merged base | merged
"""


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    stories_adapter: Path,
    stories260k: Path,
    tiny_gpt2: Path,
    stories_bundle: Path,
) -> Path:
    """A folder with every path that a case names, except `absent` and `out`."""
    folder = tmp_path_factory.mktemp("messages")
    for name, source in {
        "base": stories260k, "trained": stories260k, "truncated_base": stories260k,
        "adapter": stories_adapter, "no_spectra": stories_adapter, "gpt2": tiny_gpt2,
    }.items():  # fmt: skip
        shutil.copytree(source, folder / name)
    whole = stories_bundle.read_bytes()
    (folder / "bundle").write_bytes(whole)
    (folder / "truncated").write_bytes(whole[:-1])
    (folder / "flipped").write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    os.truncate(folder / "truncated_base" / "model.safetensors", 500_000)
    weights = folder / "trained" / "model.safetensors"
    tensors = load_file(weights)
    tensors[f"{Q_PROJ}.weight"] *= np.float32(1.5)
    save_file(tensors, weights, metadata={"format": "pt"})
    saved = {"base_model.model.score.weight": np.zeros((2, 64), np.float32)}
    save_file(saved, folder / "no_spectra" / "adapter_model.safetensors")
    (folder / "lora").mkdir()
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    saved = {f"base_model.model.{Q_PROJ}.lora_A.weight": np.zeros((8, 64), np.float32)}
    save_file(saved, folder / "lora" / "adapter_model.safetensors")
    (folder / "pickled").write_bytes(pickle.dumps({"weight": [1.0] * 100}))
    (folder / "empty_file").touch()
    (folder / "empty_folder").mkdir()
    os.mkfifo(folder / "fifo")
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), folder / "graph")
    (folder / "linked" / "blobs").mkdir(parents=True)
    shutil.copy(stories260k / "config.json", folder / "linked")
    shutil.copy(weights, folder / "linked" / "blobs")
    (folder / "linked" / "model.safetensors").symlink_to("blobs/model.safetensors")
    (folder / "link_to_base").symlink_to("base", target_is_directory=True)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: the bytes of files, None for what is no file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_bad_input(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, run_verb: Callable[..., Any]
) -> None:
    monkeypatch.chdir(folder)
    command, _, pieces = case.partition(" | ")
    expected, *words = command.split()
    before = tree(folder)
    code, found, err = run_verb(*words)
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == int(expected) == found["error"]["code"], err
    assert lines[0].startswith("error: ")
    assert len(lines) <= 1 + MAX_OFFENDERS_SHOWN
    assert all(line.startswith("  ") for line in lines[1:])
    assert all(piece in err for piece in pieces.replace("Q_PROJ", Q_PROJ).split()), err
    assert tree(folder) == before
    if "gpt2" in words and words[0] == "merge":  # all ten layers in one answer
        assert len(found["error"]["offenders"]) == 10
