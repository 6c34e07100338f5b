"""Loads models with transformers and PEFT themselves, and runs them."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInputError, BaseMismatchError, UsageError
from ..files.checkpoint import Checkpoint
from ..models.task import Task, auto_class_for, read_config
from ..types import Array
from .report import first_line

if TYPE_CHECKING:
    import torch


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
    from peft import PeftModel

    with quiet_transformers(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model: torch.nn.Module = PeftModel.from_pretrained(base, directory)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise BaseMismatchError(
                directory,
                expected="an adapter that PEFT loads on the base",
                found=first_line(error),
                remedy="give the base model that the adapter belongs to",
            ) from error
    lines = [(str(warning.message).splitlines() or [""])[0] for warning in caught]
    return model.eval(), [line for line in lines if "missing adapter keys" in line]


def run_model(
    model: torch.nn.Module, task: Task, inputs: Mapping[str, Array], *, batch_size: int
) -> dict[str, Array]:
    """Computes the task's outputs in the model's dtype, leaving out those that it gives as None.

    Args:
        model: transformers' or PEFT's; for a task of the encoder alone, only that is run.
        task: whose outputs to keep.
        inputs: name -> (rows, ...); names that the model does not take are left out.
        batch_size: rows per call.
    """
    import torch

    if task.encoder_only:
        model = model.get_encoder()  # type: ignore[operator]  # of PEFT's wrapper, too
    # PEFT's wrapper itself accepts any argument.
    plain = getattr(model, "get_base_model", lambda: model)()
    known = inspect.signature(plain.forward).parameters
    taken = {name: array for name, array in inputs.items() if name in known}
    if not taken:
        raise UsageError(
            "inputs", expected=f"some of: {', '.join(known)}", found=", ".join(inputs) or "none"
        )
    options = {"use_cache": False} if "use_cache" in known else {}
    dtype = next(model.parameters()).dtype
    parts: dict[str, list[Array]] = {}
    for start in range(0, next(iter(taken.values())).shape[0], batch_size):
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
        for name in task.outputs:
            if result.get(name) is not None:
                parts.setdefault(name, []).append(result[name].numpy())
    return {name: np.concatenate(chunks) for name, chunks in parts.items()}


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
