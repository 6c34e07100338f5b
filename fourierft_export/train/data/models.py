"""The model to train and its tokenizer: of a directory or a Hub id, with a new head if needed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ...adapt.config import ALL_LINEAR
from ...adapt.targets import USUAL_TARGETS
from ...errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from ...files.hub import local_model
from ...models.example_inputs import input_names
from ...models.load import from_pretrained, load_model, quiet_transformers
from ...models.task import get_task, likely_task, read_config
from .losses_and_scores import IGNORED

Row = dict[str, Any]
IDS = "input_ids"
_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))
# Positions that these families count from their padding id on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "longformer")
_UNLIMITED = 10**9  # transformers writes 1e30 for "no limit known"
_AT_ONCE = 1024


def find_model(name: str) -> str:
    """The directory of a model: `name` itself, or where the Hub's cache holds that id."""
    path = os.fspath(local_model(name, old_names=True))
    if os.path.isdir(path):
        return path
    raise FileAccessError(
        name,
        expected="a model's directory, or its id on the Hub",
        found="a file" if os.path.exists(path) else "nothing there",
        remedy="check the path",
    )


def known_classes(directory: str, task: str) -> tuple[str, ...]:
    """Names by id of the classes that a model of this very task decides between already."""
    config = read_config(directory)
    likely, named = likely_task(config, None), config.get("id2label")
    if likely is None or likely.name != get_task(task).name or not isinstance(named, Mapping):
        return ()
    ids = {int(i): str(name) for i, name in named.items() if str(i).isdigit()}
    # Names that repeat, or ids with gaps, do not say which class is which.
    whole = sorted(ids) == list(range(len(named) or 1)) and len(set(ids.values())) == len(ids)
    return tuple(ids[i] for i in sorted(ids)) if whole else ()


def load_classifier(
    directory: str, task: str, names: Sequence[str], *, dtype: str | None, seed: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model with a head for `names`, and its modules that are new: drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing, mismatched = from_pretrained(
            directory, task, num_labels=len(names), dtype=dtype
        )
    config: Any = model.config
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.use_cache = False  # a decoder's, which training has no use for
    return model.eval(), _new_modules(directory, model, {*missing, *mismatched})


def _new_modules(directory: str, model: nn.Module, new: set[str]) -> tuple[str, ...]:
    """The topmost modules all of whose parameters are in `new`."""
    found: list[str] = []
    left = set(new)
    for path, module in model.named_modules():
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and own and own <= left and not any(part.isdigit() for part in path.split(".")):
            found.append(path)
            left -= own
    left &= {name for name, _ in model.named_parameters()}
    if left:
        raise BaseMismatchError(
            directory,
            expected=f"every weight of {type(model).__name__} but its head",
            found=f"{len(left)} others are missing or have another shape",
            remedy="give a base for this task, or name another with --task",
            offenders=sorted(left),
        )
    return tuple(found)


def load_generator(directory: str, *, dtype: str | None) -> nn.Module:
    """A causal language model, in eval mode on the CPU, that keeps no cache of keys and values."""
    model = load_model(directory, "text-generation", dtype=dtype)
    config: Any = model.config
    config.use_cache = False
    return model


def usual_targets(model: nn.Module) -> tuple[str, ...] | str | None:
    """Query and value, by the names that families give them; None for an architecture's usual."""
    config: Any = model.config
    if config.model_type in USUAL_TARGETS:
        return None
    ends = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return next((names for names in _QUERY_VALUE if ends.issuperset(names)), ALL_LINEAR)


class TextInput:
    """What a model takes of text; with a `directory`, its tokenizer, of `words` or of text."""

    tokenizer: Any = None

    def __init__(
        self, model: nn.Module, directory: str | None = None, *, words: bool = False
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
        self.limit = min((int(n) for n in limits if 0 < n < _UNLIMITED), default=None)
        self.collate = partial(pad, pad_id=self.pad_id, mask="attention_mask" in self.names)

    def row_length(self, max_length: int | None, usual: int) -> int:
        """The longest row: the user's `--max-length`, else `usual` or the model's limit."""
        limit = self.limit
        if max_length is None:
            return min(usual, limit or usual)
        if max_length < 4 or (limit is not None and max_length > limit):
            expected = f"4 to {limit} tokens" if limit else "at least 4 tokens"
            raise UsageError("max_length", expected=expected, found=str(max_length))
        return max_length

    def encode(
        self, texts: Sequence[tuple[Any, ...]], length: int | None
    ) -> tuple[list[Row], list[list[int | None]]]:
        """Rows of ids, cut to `length`; and of words, which word each token is of."""
        rows: list[Row] = []
        owners: list[list[int | None]] = []
        cut: Any = {} if length is None else {"truncation": True, "max_length": length}
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            encoded = self.tokenizer(
                *(list(column) for column in zip(*some, strict=True)),
                is_split_into_words=self.words,
                return_attention_mask=False,
                verbose=False,
                **cut,
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


def pad(rows: Sequence[Row], *, pad_id: int, mask: bool) -> dict[str, Tensor]:
    """A batch: lists as (rows, longest), numbers as (rows,); with `mask` "attention_mask" too."""
    fill = {IDS: pad_id, "labels": IGNORED}
    batch = {}
    for name in rows[0]:
        values = [torch.tensor(row[name]) for row in rows]
        lists = values[0].ndim > 0
        batch[name] = (
            pad_sequence(values, True, fill.get(name, 0)) if lists else torch.stack(values)
        )
    if mask:
        ones = [torch.ones(len(row[IDS]), dtype=torch.int64) for row in rows]
        batch["attention_mask"] = pad_sequence(ones, True)
    return batch


def load_processor(auto: Any, directory: str, what: str, remedy: str, **options: Any) -> Any:
    """A tokenizer or an image processor of a model's directory, without the network."""
    with quiet_transformers():
        try:
            return auto.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise BadInputError(
                directory,
                expected=f"{what} that transformers loads",
                found=(str(error).strip() or repr(error)).splitlines()[0],
                remedy=remedy,
            ) from error


def load_tokenizer(directory: str, *, words: bool = False) -> Any:
    """The directory's tokenizer, without the network."""
    from transformers import AutoTokenizer

    # Byte-level tokenizers take lists of words only with this option.
    options = {"add_prefix_space": True} if words else {}
    remedy = "add the tokenizer's files, or for text-generation give rows of input_ids"
    tokenizer = load_processor(AutoTokenizer, directory, "a tokenizer", remedy, **options)
    # Without its vocabulary's files, transformers makes an empty tokenizer and says nothing.
    ids = tokenizer("a 1 . the", add_special_tokens=False)[IDS]
    if set(ids) <= {tokenizer.unk_token_id} or (words and not tokenizer.is_fast):
        raise BadInputError(
            directory,
            expected="a tokenizer with a vocabulary (for words, a tokenizer.json)",
            found=f"{type(tokenizer).__name__} of {len(tokenizer)} entries, which knows no English"
            if tokenizer.is_fast or not words
            else f"{type(tokenizer).__name__}, which does not know the word of a token",
            remedy=remedy,
        )
    return tokenizer
