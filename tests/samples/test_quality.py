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
    methods = {"head": 0.01, "lora8": 0.002, "peft": 0.1, "ours": None, "ours-biases": None}
    found = {}
    for method, rate in methods.items():
        cell = sample["cells"].Cell("sst2", method, "final", 0, rate)
        result = sample["cells"].train_cell(cell, rows, str(minilm_dir), "float32")
        found[cell.key] = result
        right = sample["table"].right_rows([result])[0]
        assert right.shape == (16,)
        assert right.mean() == result["score"]
    by_method = {result["method"]: result for result in found.values()}
    assert {m: r["parameters"] for m, r in by_method.items()} == {
        "head": 0,
        "lora8": 12 * 8 * 2 * 384,
        "peft": 12_000,
        "ours": 12_000,
        "ours-biases": 12 * (640 + 384),
    }
    assert {r["head_parameters"] for r in by_method.values()} == {2 * 384 + 2}
    assert by_method["ours"]["bytes"] < by_method["peft"]["bytes"] < by_method["lora8"]["bytes"]
    text = sample["table"].markdown(found, ["sst2"], list(methods))
    assert text.count("\n| ") == len(methods)
    assert "LoRA r=8 (PEFT): sst2 0.002" in text
    sample["table"].draw(found, ["sst2"], list(methods), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_last_block_for_the_first_token_alone_gives_the_same_logits(
    sample: dict[str, ModuleType], minilm_dir: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(minilm_dir).eval()
    ids, mask = torch.arange(1000, 1018).reshape(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).logits
        sample["cells"].read_first_token_only(model)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, whole)


def test_intervals_of_differences_that_are_known(sample: dict[str, ModuleType]) -> None:
    table = sample["table"]
    found = {}
    for method, right in (("lora8", "f000"), ("ours", "fff0")):  # 4 and 12 of 16 rows
        for seed in (10, 11):
            found[f"{method}{seed}"] = {
                "task": "sst2",
                "method": method,
                "part": "final",
                "seed": seed,
                "right": right,
                "scored": 16,
            }
    assert table.paired_gaps(found, "sst2", "ours").tolist() == 2 * [
        [0.0] * 4 + [1.0] * 8 + [0.0] * 4
    ]
    low, high = table.interval([table.paired_gaps(found, "sst2", "ours")])
    # Half of 16 rows differ: a standard deviation of 12.5 %.
    assert 20 < low < 32 and 68 < high < 80
    assert table.difference(found, ["sst2"], "lora8") == ""
    assert table.difference(found, ["sst2"], "ours").startswith("+50.0 (")
