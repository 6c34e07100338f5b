"""The comparison of qualities in samples/quality runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SAMPLES = Path(__file__).resolve().parents[2] / "samples"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ("data", "methods", "cells", "table")
    monkeypatch.syspath_prepend(str(SAMPLES / "quality"))
    threads = torch.get_num_threads()
    yield {name: importlib.import_module(name) for name in names}
    torch.set_num_threads(threads)  # a training takes one
    for name in names:
        sys.modules.pop(name, None)


def test_one_training_of_each_kind_and_the_table(
    sample: dict[str, ModuleType], data_dir: Path, minilm_dir: Path, tmp_path: Path
) -> None:
    rows = sample["data"].write_rows(data_dir / "text", "sst2", tmp_path, rows=40, scored=16)
    methods = {"head": 0.01, "lora": 0.002, "peft": 0.1, "ours": None}
    found = {}
    for method, rate in methods.items():
        cell = sample["cells"].Cell("sst2", method, "final", 0, rate)
        result = sample["cells"].train_cell(cell, rows, str(minilm_dir), "float32")
        found[cell.key] = result
        assert 0 <= result["score"] <= 1
    by_method = {result["method"]: result for result in found.values()}
    assert {m: r["parameters"] for m, r in by_method.items()} == {
        "head": 0,
        "lora": 12 * 8 * 2 * 384,
        "peft": 12_000,
        "ours": 12_000,
    }
    assert {r["head_parameters"] for r in by_method.values()} == {2 * 384 + 2}
    assert by_method["ours"]["bytes"] < by_method["peft"]["bytes"] < by_method["lora"]["bytes"]
    text = sample["table"].markdown(found, ["sst2"], list(methods))
    assert text.count("\n| ") == len(methods)
    assert "LoRA r=8 (PEFT): sst2 0.002" in text
    sample["table"].draw(found, ["sst2"], list(methods), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
