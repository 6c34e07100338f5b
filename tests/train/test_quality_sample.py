"""The comparison of methods: its rows, one training of each kind, its table."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "quality"


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    names = ("data", "methods", "cells", "table")
    monkeypatch.syspath_prepend(str(SAMPLE))
    threads = torch.get_num_threads()
    yield {name: importlib.import_module(name) for name in names}
    torch.set_num_threads(threads)  # a training takes one
    for name in names:
        sys.modules.pop(name, None)


def test_rows_are_drawn_once_and_split(
    sample: dict[str, ModuleType], data_dir: Path, tmp_path: Path
) -> None:
    draw = sample["data"].write_rows
    rows = draw(data_dir / "text", "trec", tmp_path, rows=50, scored=30)
    lines = {
        name: getattr(rows, name).read_text("utf-8").splitlines()[1:]
        for name in ("search_train", "search_score", "train", "test")
    }
    assert [len(part) for part in lines.values()] == [40, 10, 50, 30]
    assert sorted(lines["search_train"] + lines["search_score"]) == sorted(lines["train"])
    known = (data_dir / "text/trec/train.tsv").read_text("utf-8").splitlines()
    assert set(lines["train"]) <= set(known)
    again = draw(data_dir / "text", "trec", tmp_path / "again", rows=50, scored=30)
    assert again.train.read_bytes() == rows.train.read_bytes()


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
