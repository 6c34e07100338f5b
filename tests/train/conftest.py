"""Tiny models with tokenizers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train.toy import WORDS


@pytest.fixture(scope="session")
def with_tokenizer(
    tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`with_tokenizer(kind)`: a tiny base with a tokenizer of whole words."""
    made: dict[str, Path] = {}

    def base(kind: str) -> Path:
        if kind in made:
            return made[kind]
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast, ViTImageProcessor

        vocabulary = {w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
        if kind.startswith(("bert", "roberta")):
            tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
            special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
            special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        else:
            special |= {"eos_token": "[SEP]"}
        folder = tmp_path_factory.mktemp("text") / kind
        shutil.copytree(tiny_base(kind), folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        if kind == "vit":
            ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
        made[kind] = folder
        return folder

    return base
