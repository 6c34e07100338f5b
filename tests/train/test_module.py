"""Models of the user's own: a factory makes a plain model, or the whole task."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from fourierft_export.demo.vit import DigitViT, ViTConfig
from fourierft_export.errors import BadInputError, UsageError
from fourierft_export.train.data.prepare import prepare

SOURCE = """
from types import SimpleNamespace

import torch
from torch import nn

from fourierft_export.demo.vit import DigitViT, ViTConfig
from fourierft_export.errors import BadInputError
from fourierft_export.train.task import StepResult, TrainingTask


def digits():
    torch.manual_seed(0)
    return DigitViT(ViTConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        return SimpleNamespace(logits=self.last(torch.tanh(self.first(x))))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids):
        return self.last(self.embed(input_ids))


class Sentiment(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(30522, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None].float()
        return self.last((self.embed(input_ids) * mask).sum(1) / mask.sum(1))


def fails():
    raise RuntimeError("no weights today")


def refuses():
    raise BadInputError("weights.bin", expected="weights", found="none")


def number():
    return 7


def step(model, batch):
    x, y = batch["x"], batch["y"]
    loss = ((model(x) - y) ** 2).sum()
    return StepResult(loss, len(x), {"squares": loss.detach()})


def whole():
    rows = [(torch.full((2,), float(i)), torch.tensor([float(i)])) for i in range(6)]
    return TrainingTask(
        model=nn.Linear(2, 1),
        train=rows,
        eval=None,
        collate=lambda rows: dict(zip("xy", map(torch.stack, zip(*rows)))),
        step=step,
        metrics=lambda sums: {"squares": float(sums["squares"])},
    )
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of factories in it."""
    (tmp_path / "own_models.py").write_text(SOURCE, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("own_models", None)
    yield tmp_path
    sys.modules.pop("own_models", None)


@pytest.fixture
def digits(here: Path) -> Path:
    images, labels = load_digits(return_X_y=True)
    pixels = (images[:40] / 16).reshape(-1, 8, 8)
    np.savez(here / "a.npz", inputs=pixels, labels=labels[:40])
    return here / "a.npz"


@pytest.mark.parametrize("name", [None, "image-classification"])
def test_a_plain_model_gets_the_numbers(name: str | None, digits: Path) -> None:
    task = prepare(name, module="own_models:digits", data=digits, eval_share=0)
    model = task.model
    torch.manual_seed(0)
    wanted = DigitViT(ViTConfig(num_hidden_layers=1, hidden_size=16, intermediate_size=16))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), wanted.parameters(), strict=True)
    )
    with np.load(digits) as file:
        inputs, labels = torch.from_numpy(file["inputs"]), torch.from_numpy(file["labels"])
    with torch.no_grad():
        result = task.step(model, task.collate(task.train))
        logits = model(inputs.float())
        loss = cross_entropy(logits.double(), labels, reduction="sum")
    assert float(result.loss) == pytest.approx(float(loss), rel=1e-6)
    right = float((logits.argmax(-1) == labels).double().mean())
    assert task.metrics(result.sums)["accuracy"] == pytest.approx(right)
    assert result.count == 40
    assert (task.target_modules, task.task_type, task.metric) == (
        ("query", "value"),
        None,
        "accuracy",
    )
    assert task.labels == tuple(map(str, range(10)))


def test_lists_and_models_that_return_an_object(here: Path) -> None:
    rows = [{"inputs": [i, 0.5, -i], "labels": "abc"[i % 3]} for i in range(6)]
    data = here / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = prepare(None, module="own_models:Net", data=data, eval_share=0)
    assert task.labels == ("a", "b", "c", "3")  # the model has a class that no row has
    assert task.target_modules == "all-linear"
    batch = task.collate(task.train)
    assert batch["inputs"].tolist() == [row["inputs"] for row in rows]
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    result = task.step(task.model, batch)
    logits = task.model(batch["inputs"]).logits
    exact = cross_entropy(logits.double(), batch["labels"], reduction="sum").detach()
    assert float(result.loss.detach()) == pytest.approx(float(exact), rel=1e-6)


def test_bytes_are_scaled(here: Path) -> None:
    pixels = np.arange(6 * 64, dtype=np.uint32).astype(np.uint8).reshape(6, 8, 8)
    np.savez(here / "a.npz", images=pixels, labels=np.arange(6))
    task = prepare(None, module="own_models:digits", data=here / "a.npz", eval_share=0)
    batch = task.collate(task.train)
    assert torch.equal(batch["inputs"], torch.from_numpy(pixels.astype(np.float32) / 255))
    assert "inputs are bytes: they are scaled to 0..1" in task.notes


def test_a_model_of_text_takes_ready_ids(here: Path) -> None:
    data = here / "a.jsonl"
    data.write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4, 5]}\n', "utf-8")
    task = prepare("causal-lm", module="own_models:Words", data=data, eval_share=0)
    batch = task.collate(task.train)
    assert sorted(batch) == ["input_ids", "labels"]  # its forward takes no mask
    result = task.step(task.model, batch)
    logits = task.model(batch["input_ids"]).double()
    exact = cross_entropy(logits[[0, 0, 1], [0, 1, 0]], torch.tensor([2, 3, 5]), reduction="sum")
    assert float(result.loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert result.count == 3
    with pytest.raises(UsageError, match="a forward that takes input_ids, found x"):
        prepare("causal-lm", module="own_models:Net", data=data)
    with pytest.raises(UsageError, match="a directory with the module's tokenizer"):
        prepare("text-classification", module="own_models:Words", data=data)


def test_a_model_of_text_borrows_a_tokenizer(here: Path, data_dir: Path, minilm_dir: Path) -> None:
    sst2, trec = (data_dir / f"text/{name}/train.tsv" for name in ("sst2", "trec"))
    module, text = "own_models:Sentiment", "text-classification"
    task = prepare(text, module=module, model=minilm_dir, data=sst2)
    rows = task.train[:4]
    with torch.no_grad():
        whole = task.step(task.model, task.collate(rows))
        alone = [float(task.step(task.model, task.collate([row])).loss) for row in rows]
    assert sum(alone) == pytest.approx(float(whole.loss), rel=1e-6)
    assert task.modules_to_save == ()
    with pytest.raises(UsageError, match=r"the last one 6 or more.*found shape \[1, 2\]"):
        prepare(text, module=module, model=minilm_dir, data=trec)
    with pytest.raises(UsageError, match="a forward that takes input_ids"):
        prepare(text, module="own_models:Net", model=minilm_dir, data=sst2)


def test_a_factory_may_make_the_whole_task(here: Path, digits: Path) -> None:
    task = prepare(None, module="own_models:whole")
    result = task.step(task.model, task.collate(task.train))
    with torch.no_grad():
        x = torch.arange(6.0)[:, None]
        exact = ((task.model(x.expand(6, 2)) - x) ** 2).double().sum()
    assert float(result.loss.detach()) == pytest.approx(float(exact), rel=1e-6)
    told = prepare(None, module="own_models:whole", data=digits)
    assert told.notes == ("not used, since the module brings a whole task: --data",)
    assert replace(told, notes=()).metric == "loss"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_models", "expected package.module:factory, found 'own_models'"),
        (":digits", "expected package.module:factory"),
        ("not_there:digits", "ModuleNotFoundError: No module named 'not_there'"),
        ("own_models:nothing", "AttributeError: module 'own_models' has no attribute 'nothing'"),
        ("own_models:fails", "RuntimeError: no weights today"),
        ("own_models:number", "a torch.nn.Module or a TrainingTask, found int"),
        ("own_models:SOURCE.x", "AttributeError"),
    ],
)
def test_factories_that_are_none(spec: str, message: str, digits: Path) -> None:
    with pytest.raises(UsageError) as caught:
        prepare(None, module=spec, data=digits)
    assert message in caught.value.summary


def test_a_factorys_own_error_passes(digits: Path) -> None:
    with pytest.raises(BadInputError, match=r"weights\.bin"):
        prepare(None, module="own_models:refuses", data=digits)


def test_a_module_that_cannot_be_imported(here: Path, digits: Path) -> None:
    (here / "broken_models.py").write_text("def make(:\n", "utf-8")
    with pytest.raises(UsageError, match="SyntaxError"):
        prepare(None, module="broken_models:make", data=digits)


@pytest.mark.parametrize(
    ("inputs", "labels", "kind", "message"),
    [
        (np.zeros((4, 5)), [0, 1, 2, 3], UsageError, r"a float tensor of shape \[1, 5\]"),
        (
            np.zeros((6, 3)),
            list(range(6)),
            UsageError,
            r"the last one 6 or more.*found shape \[1, 4\]",
        ),
        (np.full((2, 3), np.nan), [0, 1], BadInputError, "not finite"),
        (np.array([["a"] * 3] * 2), [0, 1], BadInputError, "row 1: inputs"),
        (np.zeros((2, 3)), [0.5, 1.5], BadInputError, "row 1: label"),
    ],
)
def test_rows_that_do_not_fit(
    inputs: Any, labels: Any, kind: type[Exception], message: str, here: Path
) -> None:
    np.savez(here / "a.npz", inputs=inputs, labels=np.array(labels))
    with pytest.raises(kind, match=message):
        prepare(None, module="own_models:Net", data=here / "a.npz")


def test_lists_of_unequal_shapes(here: Path) -> None:
    rows = [[1, 2, 3], [1, 2], [[1], [2, 3]], [1, 2, "3"], [4, 5, 6]]
    data = here / "a.jsonl"
    lines = [json.dumps({"inputs": row, "label": i % 2}) for i, row in enumerate(rows)]
    data.write_text("\n".join(lines), "utf-8")
    with pytest.raises(BadInputError, match="3 bad rows") as caught:
        prepare(None, module="own_models:Net", data=data)
    assert [line.split(":")[0] for line in caught.value.offenders] == ["line 2", "line 3", "line 4"]
