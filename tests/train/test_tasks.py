"""Rows of every task become what they say; losses and scores are the field's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import EvalPrediction

from fourierft_export.errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from fourierft_export.train.data import losses_and_scores as scores
from fourierft_export.train.data.make_task import prepare
from fourierft_export.train.settings import DataSettings, TrainSettings
from fourierft_export.train.task import TrainingTask
from tests.train.toy import sentences, write_jsonl, write_tsv

TAGGED = [
    (["the", "film", "is", "very", "good"], ["B-X", "I-X", "O", "O", "B-Y"]),
    (["a", "plot"], ["O", "B-X"]),
    (["bad", "and", "poor"], ["B-Y", "O", "B-Y"]),
    (["the", "very", "film"], ["I-X", "I-Y", "O"]),
]


def make(task: str, model: Path, data: Path, **given: Any) -> TrainingTask:
    names = set(TrainSettings.__dataclass_fields__)
    settings = TrainSettings(**{k: v for k, v in given.items() if k in names})
    rest = {k: v for k, v in given.items() if k not in names}
    run = DataSettings(task=task, model=str(model), data=str(data), **rest)
    return prepare(run, settings)


def images(folder: Path, count: int = 12) -> Path:
    for i in range(count):
        path = folder / f"class{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (10, 14, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(
    params=["one text", "pairs", "decoder", "several", "number", "words", "text", "images"]
)
def task(request: Any, with_tokenizer: Callable[[str], Path], tmp_path: Path) -> TrainingTask:
    rows, text, a = sentences(20), "text-classification", tmp_path / "a.tsv"
    pairs = [(text, text[::-1], label) for text, label in rows]
    lists = [{"text": t, "labels": ["x"] * n + ["y"]} for t, n in rows]
    numbers = [(t, n + 0.5) for t, n in rows]
    words = [{"tokens": w, "tags": t} for w, t in TAGGED]
    cases: dict[str, tuple[str, str, Callable[[], Path]]] = {
        "one text": (text, "bert", lambda: write_tsv(a, rows)),
        "pairs": (text, "roberta-cls", lambda: write_tsv(a, pairs, "sentence1\tsentence2\tlabel")),
        "decoder": (text, "llama", lambda: write_tsv(a, rows)),
        "several": (text, "bert", lambda: write_jsonl(tmp_path / "a.jsonl", lists)),
        "number": (text, "bert", lambda: write_tsv(a, numbers)),
        "words": (
            "token-classification", "bert", lambda: write_jsonl(tmp_path / "a.jsonl", words),
        ),
        "text": ("causal-lm", "llama", lambda: write_tsv(a, rows)),
        "images": ("image-classification", "vit", lambda: images(tmp_path / "i")),
    }  # fmt: skip
    name, base, data = cases[request.param]
    more = {"problem_type": "regression"} if request.param == "number" else {}
    return make(name, with_tokenizer(base), data(), **more)


def loss_of(task: TrainingTask, rows: Any) -> tuple[float, int]:
    """The summed loss of a batch, and how many labels count, as the Trainer counts them."""
    batch = dict(task.data_collator(rows))
    labels = batch.pop("labels")
    outputs = task.model(**batch)
    count = int((labels != -100).sum())
    return float(task.compute_loss_func(outputs, labels, num_items_in_batch=1.0)), count


@torch.no_grad()
def test_the_loss_is_transformers_own_and_adds_up(task: TrainingTask) -> None:
    rows = list(task.train_dataset)[:5]
    total, count = loss_of(task, rows)
    mean = float(task.model(**task.data_collator(rows)).loss)
    assert total == pytest.approx(mean * count, rel=1e-5)
    alone = [loss_of(task, [row]) for row in rows]
    assert sum(loss for loss, _ in alone) == pytest.approx(total, rel=1e-5)
    assert sum(n for _, n in alone) == count
    if task.lengths is not None:
        batch = task.data_collator(rows)
        assert batch["attention_mask"].sum(1).tolist() == list(task.lengths[:5])


@torch.no_grad()
def test_scores_are_of_all_rows(task: TrainingTask) -> None:
    """What is kept of the logits gives the loss of the whole set, whatever the batches."""
    rows = list(task.eval_dataset) + list(task.train_dataset)[:4]
    kept, labels = [], []
    batch = dict(task.data_collator(rows))
    truth = batch.pop("labels")
    found = task.preprocess_logits_for_metrics((task.model(**batch).logits,), truth)
    many = found if isinstance(found, tuple) else (found,)
    kept = tuple(t.numpy() for t in many)
    scored = task.compute_metrics(
        EvalPrediction(predictions=kept if len(kept) > 1 else kept[0], label_ids=truth.numpy())
    )
    total, count = loss_of(task, rows)
    assert scored["loss"] == pytest.approx(total / count, rel=1e-5)
    assert task.metric_for_best_model in scored
    assert all(np.isfinite(value) for value in scored.values())
    assert labels == []


def test_new_heads_follow_the_seed_and_are_saved(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write_tsv(tmp_path / "a.tsv", sentences(10))
    made = [
        make("text-classification", with_tokenizer("bert"), data, seed=seed) for seed in (1, 1, 2)
    ]
    heads = [task.model.classifier.weight for task in made]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert made[0].modules_to_save == ("classifier",)
    assert made[0].labels == ("0", "1")
    assert made[0].notes == (
        "no rows to score were given: 1 of 10 training rows are held out",
        "new for 2 labels, and trained whole: classifier",
    )
    with pytest.raises(BaseMismatchError, match=r"every weight of .* but its head"):
        more = shutil.copytree(with_tokenizer("bert"), tmp_path / "more")
        config = (more / "config.json").read_text("utf-8")
        lines = config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
        (more / "config.json").write_text(lines, "utf-8")
        make("text-classification", more, data)


def test_a_head_that_is_there_is_kept(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_tokenizer("bert-cls")
    rows = [(text, f"LABEL_{2 * label}") for text, label in sentences(10)]
    task = make("text-classification", base, write_tsv(tmp_path / "a.tsv", rows))
    assert task.labels == ("LABEL_0", "LABEL_1", "LABEL_2") and task.modules_to_save == ()
    assert sorted({row["labels"] for row in task.train_dataset}) == [0, 2]


def test_pairs_columns_and_lengths(with_tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    base = with_tokenizer("bert")
    rows = [("the film", "a plot", 1), ("a very very very poor film", "is bad", 0)] * 3
    data = write_tsv(tmp_path / "a.tsv", rows, "one\ttwo\twhat")
    chosen = {"text_column": ("one", "two"), "label_column": "what", "eval_share": 0.0}
    task = make("text-classification", base, data, max_length=8, **chosen)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = tokenizer("the film", "a plot", truncation=True, max_length=8)
    assert task.train_dataset[0]["input_ids"] == expected["input_ids"]
    assert task.train_dataset[0]["token_type_ids"] == expected["token_type_ids"]
    assert max(task.lengths) == 8 and task.eval_dataset is None
    assert "3 training rows fill all 8 tokens; what is longer is cut" in task.notes
    few = make("text-classification", base, data, max_train_rows=2, **chosen)
    assert len(few.train_dataset) == 2 and "2 of 6 training rows are used" in few.notes
    with pytest.raises(UsageError, match="4 to 64 tokens, found 65"):
        make("text-classification", base, data, max_length=65, **chosen)


def test_several_labels_in_text_files(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [("good film", "x,y"), ("bad film", "y"), ("a film", ""), ("the plot", "z")]
    task = make(
        "text-classification",
        with_tokenizer("bert"),
        write_tsv(tmp_path / "a.tsv", rows),
        problem_type="multi_label_classification",
        eval_share=0.0,
    )
    assert task.labels == ("x", "y", "z")
    assert [row["labels"] for row in task.train_dataset] == [
        [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1],
    ]  # fmt: skip
    assert task.model.config.problem_type == "multi_label_classification"


@torch.no_grad()
def test_a_number_of_minus_100_is_learnt_and_scored(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    """The Trainer counts no label of exactly -100."""
    rows = [("good film", -100), ("bad film", "-100.0"), ("the plot", 3)]
    data = write_tsv(tmp_path / "a.tsv", rows)
    given: dict[str, Any] = {"problem_type": "regression", "eval_share": 0.0}
    task = make("text-classification", with_tokenizer("bert"), data, **given)
    total, count = loss_of(task, task.train_dataset)
    assert count == 3
    batch = task.data_collator(task.train_dataset)
    truth = torch.tensor([-100.0, -100.0, 3.0])
    torch.testing.assert_close(batch.pop("labels"), truth, atol=1e-5, rtol=0)
    found = task.model(**batch).logits.flatten()
    assert total == pytest.approx(float(((found - truth) ** 2).sum()), rel=1e-6)


def test_the_first_token_of_a_word_has_its_label(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"tokens": w, "tags": t} for w, t in TAGGED])
    task = make("token-classification", with_tokenizer("bert"), data, eval_share=0.0)
    assert task.labels == ("B-X", "B-Y", "I-X", "I-Y", "O")
    ids = {name: i for i, name in enumerate(task.labels)}
    for row, (_, tags) in zip(task.train_dataset, TAGGED, strict=True):
        assert row["labels"] == [-100, *(ids[tag] for tag in tags), -100]
    cut = make("token-classification", with_tokenizer("bert"), data, eval_share=0.0, max_length=4)
    assert "5 words lie beyond 4 tokens and do not count" in cut.notes
    lines = write_tsv(
        tmp_path / "a.tsv", [(" ".join(w), " ".join(t)) for w, t in TAGGED], "words\ttags"
    )
    same = make("token-classification", with_tokenizer("bert"), lines, eval_share=0.0)
    assert same.train_dataset == task.train_dataset


def test_entities_as_conll_counts_them() -> None:
    """The hits and misses of the three sentences below are counted by hand."""
    score = scores.ScoreTags(("O", "B-X", "I-X", "B-Y", "I-Y"))
    true = np.array([[1, 2, 0, 3, -100], [0, 2, 2, 4, 4], [1, 1, 0, 0, -100]])
    seen = np.array([[1, 2, 0, 4, 1], [0, 1, 2, 4, 0], [1, 2, 0, 3, 0]])
    found = score(EvalPrediction(predictions=(seen, np.zeros(true.shape)), label_ids=true))
    # true: X(0,2) Y(3,4) | X(1,3) Y(3,5) | X(0,1) X(1,2); seen: X(0,2) Y(3,4) | X(1,3) Y(3,4) |
    # X(0,2) Y(3,4)
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((3 / 6, 3 / 6, 0.5))
    assert found["accuracy"] == pytest.approx(8 / 13)
    assert set(scores.ScoreTags(("A", "B"))(
        EvalPrediction(predictions=(seen[:1] % 2, seen[:1]), label_ids=true[:1] % 2)
    )) == {"loss", "accuracy"}  # fmt: skip


def test_text_to_continue(
    with_tokenizer: Callable[[str], Path], stories260k: Path, tmp_path: Path
) -> None:
    data = write_tsv(tmp_path / "a.tsv", [("the film is good",), ("a plot",)], "text")
    task = make("text-generation", with_tokenizer("llama"), data, eval_share=0.0)
    rows = [row["input_ids"] for row in task.train_dataset]
    assert [len(ids) for ids in rows] == [5, 3] and all(ids[-1] == 3 for ids in rows)  # [SEP]
    assert [row["labels"] for row in task.train_dataset] == [[-100, *ids[1:]] for ids in rows]
    packed = make(
        "text-generation", with_tokenizer("llama"), data, eval_share=0.0, pack=True, max_length=6
    )
    assert [row["input_ids"] for row in packed.train_dataset] == [
        [*rows[0], rows[1][0]],
        rows[1][1:],
    ]
    assert packed.train_dataset[0]["labels"][1:] == packed.train_dataset[0]["input_ids"][1:]
    ready = [{"input_ids": [1, 7, 9], "labels": [-100, -100, 9]}, {"input_ids": [1, 8, 2, 3]}]
    given = make("causal-lm", stories260k, write_jsonl(tmp_path / "b.jsonl", ready), eval_share=0.0)
    assert [row["labels"] for row in given.train_dataset] == [[-100, -100, 9], [-100, 8, 2, 3]]
    with pytest.raises(BadInputError, match="tokenizer"):
        make("text-generation", stories260k, data)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("text-classification", {"text": " ", "label": 1}, "line 3: an empty text"),
    ("text-classification", {"text": 7.0, "label": 1}, "line 3: float 7.0 as text"),
    ("text-classification", {"label": 1}, "line 3: no text"),
    ("text-classification", {"text": "a"}, "line 3: no label"),
    ("token-classification", {"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 labels"),
    ("token-classification", {"tokens": [], "tags": []}, r"words \[\]"),
    ("token-classification", {"tokens": ["a", " "], "tags": ["O", "O"]}, "the word ' '"),
    ("text-generation", {"input_ids": [1, 999]}, r"line 3: input_ids \[1, 999\]"),
    ("text-generation", {"input_ids": [1]}, "line 3: 1 tokens, none to be learnt"),
]


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_bad_rows_are_listed_with_their_places(
    name: str,
    row: dict[str, Any],
    message: str,
    with_tokenizer: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    good: dict[str, dict[str, Any]] = {
        "text-classification": {"text": "a film", "label": 1},
        "token-classification": {"tokens": ["a"], "tags": ["B"]},
        "text-generation": {"input_ids": [1, 2, 3]},
    }
    other = {"label": 0, "tags": ["C"]}
    second = {k: other.get(k, v) for k, v in good[name].items()}
    data = write_jsonl(tmp_path / "a.jsonl", [good[name], second, row, row])
    base = with_tokenizer("llama" if name == "text-generation" else "bert")
    with pytest.raises(BadInputError, match=message) as error:
        make(name, base, data)
    assert len(error.value.offenders) == 2 and "line 4" in error.value.offenders[1]


def test_images_from_a_folder_and_from_rows(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_tokenizer("vit")
    task = make("image-classification", base, images(tmp_path / "i"), eval_share=0.0)
    assert task.labels == ("class0", "class1", "class2")
    rows = [{"path": f"i/class{i % 3}/{i:02}.png", "label": f"class{i % 3}"} for i in range(12)]
    listed = make(
        "image-classification", base, write_jsonl(tmp_path / "a.jsonl", rows), eval_share=0.0
    )
    order = sorted(range(12), key=lambda i: (i % 3, i))
    some, same = task.train_dataset, [listed.train_dataset[i] for i in order]
    assert torch.equal(
        task.data_collator(some)["pixel_values"], listed.data_collator(same)["pixel_values"]
    )
    pixels = task.data_collator(some[:1])["pixel_values"]
    image = Image.open(tmp_path / "i/class0/00.png").convert("RGB").resize((16, 16), resample=2)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels[0], expected, atol=1e-6, rtol=0)
    bad = tmp_path / "i" / "class0" / "broken.png"
    bad.write_bytes(b"no image")
    (tmp_path / "i" / "class1" / "empty.png").touch()
    with pytest.raises(BadInputError, match=r"2 bad rows, first .*broken.png: not an image"):
        make("image-classification", base, tmp_path / "i")


def test_an_image_that_claims_too_many_pixels(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = images(tmp_path / "i")
    Image.new("1", (9000, 9000)).save(folder / "class0" / "bomb.png")
    with pytest.raises(BadInputError, match="9000 x 9000 pixels, more than 67108864"):
        make("image-classification", with_tokenizer("vit"), folder)


def test_calls_that_cannot_be_carried_out(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base, data = with_tokenizer("bert"), write_tsv(tmp_path / "a.tsv", sentences(4))
    one = write_tsv(tmp_path / "b.tsv", [("a film", 1), ("a plot", 1)])
    other = write_tsv(tmp_path / "c.tsv", [("a film", 5)])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"task": "translation"}, UsageError, "task: expected text-classification or"),
        ({"model": None}, UsageError, "model: .*give --model"),
        ({"data": None}, UsageError, "data: .*give --data"),
        ({"model": str(tmp_path / "none")}, FileAccessError, "a model's directory, or its id"),
        ({"model": "some/model"}, FileAccessError, "not on the Hub"),
        ({"data": str(tmp_path / "none.tsv")}, FileAccessError, "nothing there"),
        ({"data": "some/data"}, FileAccessError, "some/data: expected a data set"),
        ({"text_column": ("a", "b", "c")}, UsageError, "at most 2"),
        ({"pack": True}, UsageError, "--pack: expected options that --task text-classification"),
        (
            {"task": "text-generation", "problem_type": "regression", "label_column": "label"},
            UsageError,
            "--problem-type, --label-column: expected options that --task text-generation uses",
        ),
        (
            {"text_column": ("nope",)},
            UsageError,
            "columns text, label; name the column with --text",
        ),
        ({"data": str(one)}, BadInputError, "two different labels, found only 1"),
        ({"eval": str(other)}, BadInputError, "label 5, which no training row has"),
        ({"problem_type": "regression", "label_column": "text"}, BadInputError, "a finite number"),
    ]
    plain = {"task": "text-classification", "model": str(base), "data": str(data)}
    for changed, kind, message in cases:
        with pytest.raises(kind, match=message):
            prepare(DataSettings(**(plain | changed)), TrainSettings())
