"""The model to train and its tokenizer: of a directory or a Hub id, with a new head if needed."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapt.config import ALL_LINEAR
from ...adapt.targets import SEQUENCE_HEADS, USUAL_TARGETS
from ...errors import BadInputError, BaseMismatchError, FileAccessError, UsageError
from ...models.examples import input_names
from ...models.load import from_pretrained, load_model, quiet_transformers
from ...models.task import get_task, likely_task, read_config
from .rows import HUB_ID
from .scores import IGNORED

Row = dict[str, Any]
_QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"))
# Positions that these families count from their padding id on.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "longformer")
_UNLIMITED = 10**9  # transformers writes 1e30 for "no limit known"
_AT_ONCE = 1024
_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]


def find_model(name: str) -> str:
    """The directory of a model: `name` itself, or where the Hub's cache holds that id."""
    if os.path.isdir(name):
        return name
    found = "a file" if os.path.exists(name) else "nothing there"
    if found == "nothing there" and HUB_ID.fullmatch(name) and ":" not in name:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            return snapshot_download(name, allow_patterns=_FILES)
        except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found = f"nothing there, and not on the Hub: {reason}"
    raise FileAccessError(
        name,
        expected="a model's directory, or its id on the Hub",
        found=found,
        remedy="check the path; for a Hub id check the network (HF_HUB_OFFLINE uses the cache)",
    )


def known_classes(directory: str, task: str) -> tuple[str, ...]:
    """Names by id of the classes that a model of this very task decides between already."""
    config = read_config(directory)
    likely = likely_task(config, None)
    named = config.get("id2label")
    if likely is None or likely.name != get_task(task).name or not isinstance(named, Mapping):
        return ()
    ids = {int(i): str(name) for i, name in named.items() if str(i).isdigit()}
    # Names that repeat, or ids with gaps, do not say which class is which.
    whole = sorted(ids) == list(range(len(named) or 1)) and len(set(ids.values())) == len(ids)
    return tuple(ids[i] for i in sorted(ids)) if whole else ()


def load_classifier(
    directory: str, task: str, names: Sequence[str], *, dtype: str | None, seed: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """A model with a head for `names`; what the checkpoint lacks of it is drawn by `seed`."""
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


def load_generator(directory: str, *, dtype: str | None) -> nn.Module:
    """A causal language model, in eval mode on the CPU, that keeps no cache of keys and values."""
    model = load_model(directory, "text-generation", dtype=dtype)
    config: Any = model.config
    config.use_cache = False
    return model


def trained_heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of a classifier's head, for tasks whose type does not name it."""
    return tuple(name for name, _ in model.named_children() if name in SEQUENCE_HEADS)


def usual_targets(model: nn.Module) -> tuple[str, ...] | str | None:
    """Query and value, by the names that families give them; None for an architecture's usual."""
    if getattr(getattr(model, "config", None), "model_type", None) in USUAL_TARGETS:
        return None
    ends = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return next((names for names in _QUERY_VALUE if ends.issuperset(names)), ALL_LINEAR)


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


class TextEncoder:
    """A directory's tokenizer, as far as a model needs it.

    Args:
        directory: a model's directory.
        model: the model that the ids are for.
        words: texts come as lists of words.

    Attributes:
        pad_id: fills rows up; masked out.
        limit: tokens that the model can take, or None.

    Raises:
        BadInputError: no tokenizer that transformers loads.
        UsageError: the model's forward takes no input_ids.
    """

    def __init__(self, directory: str, model: nn.Module, *, words: bool = False) -> None:
        self.directory = directory
        self.inputs = text_inputs(model)
        self.size = vocabulary(model)
        self.tokenizer = load_tokenizer(directory, words=words)
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        usual = next((i for i in ids if i is not None), 0)
        # The model's own comes first: by it a decoder's head finds the end of a row, and RoBERTa
        # counts positions.
        own = getattr(getattr(model, "config", None), "pad_token_id", None)
        size = self.size or 1 << 31
        self.pad_id: int = own if isinstance(own, int) and 0 <= own < size else usual
        limits = [positions(model, self.pad_id), getattr(self.tokenizer, "model_max_length", None)]
        known = [int(n) for n in limits if isinstance(n, int | float) and 0 < n < _UNLIMITED]
        self.limit = min(known, default=None)

    def encode(
        self, texts: Sequence[tuple[Any, ...]], length: int | None, *, words: bool = False
    ) -> tuple[list[Row], list[list[int | None]]]:
        """Rows of ids, cut to `length`."""
        rows: list[Row] = []
        owners: list[list[int | None]] = []
        cut: Any = {} if length is None else {"truncation": True, "max_length": length}
        for start in range(0, len(texts), _AT_ONCE):
            some = texts[start : start + _AT_ONCE]
            encoded = self.tokenizer(
                *(list(column) for column in zip(*some, strict=True)),
                is_split_into_words=words,
                return_attention_mask=False,
                verbose=False,
                **cut,
            )
            names = [name for name in self.inputs if name in encoded]
            rows += [{name: encoded[name][i] for name in names} for i in range(len(some))]
            if words:
                owners += [encoded.word_ids(i) for i in range(len(some))]
        check_ids(self.directory, rows, self.size)
        return rows, owners

    def pad(self) -> Pad:
        """What makes batches of the rows."""
        return Pad(self.pad_id, mask="attention_mask" in self.inputs)


class Pad:
    """Rows of ids -> a batch as long as its longest row.

    Args:
        pad_id: fills input_ids.
        mask: whether the model takes an attention_mask.
    """

    def __init__(self, pad_id: int, *, mask: bool = True) -> None:
        self.fill = {"input_ids": pad_id, "labels": IGNORED}
        self.mask = mask

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Tensors: lists as (rows, length), numbers as (rows,); and "attention_mask"."""
        batch = {name: self._stack(name, [row[name] for row in rows]) for name in rows[0]}
        if not self.mask:
            return batch
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        inside = torch.arange(int(sizes.max())) < sizes[:, None]
        return batch | {"attention_mask": inside.long()}

    def _stack(self, name: str, values: list[Any]) -> Tensor:
        if not isinstance(values[0], list):
            return torch.tensor(values)
        longest = max(map(len, values))
        fill = self.fill.get(name, 0)
        return torch.tensor([value + [fill] * (longest - len(value)) for value in values])


def text_inputs(model: nn.Module) -> list[str]:
    """What a model reads of text, by name."""
    names = input_names(model)
    if "input_ids" not in names:
        raise UsageError(
            type(model).__name__,
            expected="a forward that takes input_ids",
            found=", ".join(inspect.signature(model.forward).parameters) or "no arguments",
            remedy="give a model of text, or another --task",
        )
    return names


def positions(model: nn.Module, pad_id: int = 0) -> int | None:
    """How many positions a model has, if its config says so."""
    config: Any = getattr(model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    if isinstance(found, int) and getattr(config, "model_type", "") in _OFFSET_POSITIONS:
        found -= pad_id + 1
    return found if isinstance(found, int) else None


def row_length(max_length: int | None, usual: int, limit: int | None) -> int:
    """The longest row: the user's `--max-length`, else `usual` or the model's limit."""
    if max_length is None:
        return min(usual, limit or usual)
    if max_length < 4 or (limit is not None and max_length > limit):
        raise UsageError(
            "max_length",
            expected=f"4 to {limit} tokens" if limit else "at least 4 tokens",
            found=str(max_length),
        )
    return max_length


def vocabulary(model: nn.Module) -> int | None:
    """How many ids a model has embeddings for, if it has any."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(embedding, "num_embeddings", None)


def check_ids(where: str, rows: Sequence[Row], size: int | None) -> None:
    """Raise BadInputError for ids that a model has no embedding for, with the largest one."""
    largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
    if size is not None and largest >= size:
        raise BadInputError(
            where,
            expected=f"token ids below {size}",
            found=f"id {largest}",
            remedy="use the tokenizer of this model",
        )


def load_processor(auto: Any, directory: str, what: str, remedy: str, **options: Any) -> Any:
    """A tokenizer or an image processor of a model's directory, without the network."""
    with quiet_transformers():
        try:
            return auto.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False, **options
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            text = str(error).strip() or repr(error)
            raise BadInputError(
                directory,
                expected=f"{what} that transformers loads",
                found=text.splitlines()[0],
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
    ids = tokenizer("a 1 . the", add_special_tokens=False)["input_ids"]
    if set(ids) <= {tokenizer.unk_token_id}:
        raise BadInputError(
            directory,
            expected="a tokenizer with a vocabulary",
            found=f"one of {len(tokenizer)} entries that knows no English",
            remedy=remedy,
        )
    if words and not tokenizer.is_fast:
        raise BadInputError(
            directory,
            expected="a fast tokenizer, which knows the word that a token belongs to",
            found=type(tokenizer).__name__,
            remedy="add tokenizer.json to the model's directory",
        )
    return tokenizer
