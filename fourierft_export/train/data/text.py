"""Text, words or ready token ids -> rows that a model takes, and batches of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...errors import BadInputError, UsageError
from ...models.example_inputs import input_names
from ...models.processor import load_processor, usable
from .losses_and_scores import IGNORED

Row = dict[str, Any]
IDS = "input_ids"
# Positions that these families count from their padding id on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "longformer")
CORRECT = "add or correct the tokenizer's files, or for text-generation give rows of input_ids"
_UNLIMITED = 10**9  # transformers writes 1e30 for "no limit known"
_AT_ONCE = 1024


class TextInput:
    """What a model takes of text.

    Args:
        model: transformers' model, whose config says what pads a row and how long one may be.
        max_length: the longest row that the user wants; None is `usual`, or the model's limit.
        usual: the longest row of this task.
        directory: of the tokenizer; None for rows of ready token ids.
        words: texts are lists of words.
    """

    def __init__(
        self,
        model: nn.Module,
        max_length: int | None,
        usual: int,
        directory: str | None,
        *,
        words: bool = False,
    ) -> None:
        config: Any = model.config
        self.directory, self.words, self.names = directory, words, input_names(model)
        if IDS not in self.names:
            raise UsageError(
                type(model).__name__,
                expected="a forward that takes input_ids",
                found=", ".join(inspect.signature(model.forward).parameters) or "no arguments",
                remedy="give a model of text, or another --task",
            )
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        self.size: int = getattr(embedding, "num_embeddings", None) or 1 << 31
        # The model's own comes first: by it a decoder's head finds the end of a row, and RoBERTa
        # counts positions.
        pads, limits = [getattr(config, "pad_token_id", None)], []
        if directory is not None:
            self.tokenizer = load_tokenizer(directory, words=words)
            pads += [self.tokenizer.pad_token_id, self.tokenizer.eos_token_id]
            limits.append(self.tokenizer.model_max_length)
        known = [i for i in pads if isinstance(i, int) and 0 <= i < self.size]
        self.pad_id: int = next(iter(known), 0)
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int):
            offset = self.pad_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
            limits.append(longest - offset)
        numbers = (int(n) for n in limits if isinstance(n, int | float) and 0 < n < _UNLIMITED)
        limit = min(numbers, default=None)
        if max_length is not None and not 4 <= max_length <= (limit or max_length):
            expected = f"4 to {limit} tokens" if limit else "at least 4 tokens"
            raise UsageError("max_length", expected=expected, found=str(max_length))
        self.length = max_length or min(usual, limit or usual)

    def encode(
        self, texts: Sequence[tuple[Any, ...]], *, cut: bool = True
    ) -> tuple[list[Row], list[list[int | None]]]:
        """Rows of ids, cut to the longest length; and of words, which word each token is of."""
        rows: list[Row] = []
        owners: list[list[int | None]] = []
        options: Any = {"truncation": True, "max_length": self.length} if cut else {}
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            with usable("tokenizer", self.directory or "", CORRECT):
                encoded = self.tokenizer(
                    *(list(column) for column in zip(*some, strict=True)),
                    is_split_into_words=self.words,
                    return_attention_mask=False,
                    verbose=False,
                    **options,
                )
            names = [name for name in self.names if name in encoded]
            rows += [{name: encoded[name][i] for name in names} for i in range(len(some))]
            owners += [encoded.word_ids(i) for i in range(len(some))] if self.words else []
        largest = max((max(row[IDS], default=0) for row in rows), default=0)
        if largest >= self.size:
            raise BadInputError(
                self.directory or "",
                expected=f"token ids below {self.size}",
                found=f"id {largest}",
                remedy="use the tokenizer of this model",
            )
        return rows, owners

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """A batch: lists padded to (rows, longest), numbers (rows,), and the attention mask."""
        fill = {IDS: self.pad_id, "labels": IGNORED}
        batch = {}
        for name in rows[0]:
            values = [torch.tensor(row[name]) for row in rows]
            lists = values[0].ndim > 0
            batch[name] = (
                pad_sequence(values, True, fill.get(name, 0)) if lists else torch.stack(values)
            )
        if "attention_mask" in self.names:
            ones = [torch.ones(len(row[IDS]), dtype=torch.int64) for row in rows]
            batch["attention_mask"] = pad_sequence(ones, True)
        return batch


def load_tokenizer(directory: str, *, words: bool = False) -> Any:
    """The directory's tokenizer, without the network."""
    # Byte-level tokenizers take lists of words only with this option.
    options = {"add_prefix_space": True} if words else {}
    tokenizer = load_processor("tokenizer", directory, CORRECT, **options)
    # Without its vocabulary's files, transformers makes an empty tokenizer and says nothing.
    with usable("tokenizer", directory, CORRECT):
        ids = tokenizer("a 1 . the", add_special_tokens=False)[IDS]
    if set(ids) <= {tokenizer.unk_token_id} or (words and not tokenizer.is_fast):
        raise BadInputError(
            directory,
            expected="a tokenizer with a vocabulary (for words, a tokenizer.json)",
            found=f"{type(tokenizer).__name__} of {len(tokenizer)} entries, which knows no English"
            if tokenizer.is_fast or not words
            else f"{type(tokenizer).__name__}, which does not know the word of a token",
            remedy=CORRECT,
        )
    return tokenizer
