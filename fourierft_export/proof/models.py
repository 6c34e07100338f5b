"""Loads models with transformers and PEFT themselves, and runs them."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInputError, BaseMismatchError, UsageError, first_line
from ..files.checkpoint import Checkpoint
from ..models.task import Task, auto_class_for, read_config
from ..types import Array
from .artifacts import tensor_shapes

if TYPE_CHECKING:
    import torch

_PLAIN_NAME = re.compile(r"[\w.-]+")
DECODER_TOKENS = 8


def load_model(
    directory: Path, task: Task, num_labels: int | None = None
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Loads a model through transformers' Auto class for the task, in float32 and eval mode.

    Returns:
        The model, and the parameters that the directory lacks or holds in another shape: their
        values are random.
    """
    import torch
    import transformers

    # transformers follows any path that an index names, so the strict reader checks it first.
    Checkpoint.open(directory)
    auto = getattr(transformers, auto_class_for(read_config(directory), task))
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    # An adapter in the model's folder is no part of the base: transformers finds none in there.
    options["adapter_kwargs"] = {"subfolder": os.devnull}
    with quiet_transformers():
        try:
            model, info = auto.from_pretrained(
                directory,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:
            expected = f"a model that transformers loads for {task.name}"
            raise BadInputError(directory, expected=expected, found=first_line(error)) from error
    mismatched = {entry[0] for entry in info["mismatched_keys"]}
    return model.eval(), tuple(sorted({*info["missing_keys"], *mismatched}))


def load_peft_model(base: torch.nn.Module, directory: Path) -> tuple[torch.nn.Module, list[str]]:
    """Loads an adapter onto a freshly loaded model with PEFT itself, unmerged, in eval mode.

    Returns:
        The model, and PEFT's warnings about keys that the file lacks: those spectra are random.
    """
    from peft import PeftConfig, PeftModel

    with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config = PeftConfig.from_pretrained(directory)
            _replace_expressions(config, directory)
            model: torch.nn.Module = PeftModel.from_pretrained(base, directory, config=config)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise BaseMismatchError(
                directory,
                expected="an adapter that PEFT loads on the base",
                found=first_line(error),
                remedy="give the base model that the adapter belongs to",
            ) from error
    lines = [(str(warning.message).splitlines() or [""])[0] for warning in caught]
    return model.eval(), [line for line in lines if "missing adapter keys" in line]


def _replace_expressions(config: Any, directory: Path) -> None:
    """Names layers in PEFT's config one by one, where it has regular expressions.

    One of a file can take longer than anybody waits, so none is run. The layers are those that the
    file of weights has spectra for.
    """
    pattern = config.layers_pattern or []
    names = [*([pattern] if isinstance(pattern, str) else pattern), *config.n_frequency_pattern]
    for saved in config.modules_to_save or ():
        if not _PLAIN_NAME.fullmatch(saved):
            expected = "names in modules_to_save, no expressions"
            raise BadInputError(directory, expected=expected, found=repr(saved))
    texts = isinstance(config.target_modules, str) and config.target_modules != "all-linear"
    texts = texts or isinstance(config.exclude_modules, str)
    if texts or not all(_PLAIN_NAME.fullmatch(name) for name in names):
        end = ".fourierft_spectrum"
        shapes = tensor_shapes(directory).items()
        sizes = {n.removesuffix(end): shape[0] for n, shape in shapes if n.endswith(end)}
        config.target_modules, config.n_frequency_pattern = set(sizes), sizes
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def run_model(
    model: torch.nn.Module, task: Task, inputs: Mapping[str, Array], *, batch_size: int
) -> dict[str, Array]:
    """Computes a model's outputs in its dtype, by name; those that it gives as None are left out.

    They are the task's, and of a model with a decoder also its logits on a few tokens. A model
    that has none of them (such as CLIP) gives all its tensors, on all rows at once, since they may
    relate rows to each other.

    Args:
        model: transformers' or PEFT's.
        task: whose outputs to keep.
        inputs: name -> (rows, ...); names that the model does not take are left out.
        batch_size: rows per call.
    """
    import torch

    # PEFT's wrapper itself accepts any argument.
    plain = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(plain.forward).parameters
    taken = {name: array for name, array in inputs.items() if name in known}
    if not taken:
        raise UsageError(
            "inputs", expected=f"some of: {', '.join(known)}", found=", ".join(inputs) or "none"
        )
    options = {"use_cache": False} if "use_cache" in known else {}
    if task.encoder_only and "decoder_input_ids" in known:
        taken.setdefault("decoder_input_ids", _decoder_ids(plain.config, taken))
    dtype = next(model.parameters()).dtype
    rows = next(iter(taken.values())).shape[0]
    parts: dict[str, list[Array]] = {}
    start = 0
    while start < rows:
        try:
            batch = {}
            for name, array in taken.items():
                tensor = torch.from_numpy(np.array(array[start : start + batch_size]))
                batch[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            with torch.no_grad():
                result = model(**batch, **options, return_dict=True)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise BadInputError(
                f"inputs {', '.join(taken)}",
                expected=f"arrays that {type(model).__name__} can be run on",
                found=first_line(error),
                remedy="check the arrays' shapes and dtypes, and ids against the vocabulary",
            ) from error
        found = {name: result.get(name) for name in task.outputs}
        if task.encoder_only and "encoder_last_hidden_state" in result:
            found = {"last_hidden_state": result["encoder_last_hidden_state"]}
            found["logits"] = result.get("logits")
        if not any(value is not None for value in found.values()):
            found = dict(_tensors("", result))
            if batch_size < rows:
                batch_size = rows
                continue
        for name, value in found.items():
            if value is not None:
                parts.setdefault(name, []).append(value.numpy())
        start += batch_size
    return {name: np.concatenate(chunks) for name, chunks in parts.items()}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields the tensors of an output; those of a nested one are NAME.KEY, as in exported files."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), inner)
    elif hasattr(value, "is_floating_point"):
        yield name, value


def _decoder_ids(config: Any, inputs: Mapping[str, Array]) -> Array:
    """Makes inputs of a decoder: its start token, then the first tokens of `input_ids`, if any."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    tokens = (getattr(config, name, None) for name in names)
    first = next((token for token in tokens if token is not None), 0)
    rows = next(iter(inputs.values())).shape[0]
    start = np.full((rows, 1), first, np.int64)
    ids = inputs.get("input_ids", start[:, :0])
    return np.concatenate([start, ids[:, : DECODER_TOKENS - 1]], axis=1)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' logs, warnings and progress bars, and restores the settings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def find_module(model: torch.nn.Module, path: str) -> tuple[str, Any]:
    """Finds a module, with or without transformers' prefix: its path there, and it or None."""
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    return "", None
