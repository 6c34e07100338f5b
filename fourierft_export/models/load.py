"""Loads a base model as a torch module with transformers."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import BadInputError, BaseMismatchError, first_line, missing_extra
from ..files.hub import local_model
from .task import auto_class_for, get_task, read_config

if TYPE_CHECKING:
    import torch


def load_model(
    directory: str | os.PathLike[str],
    task: str,
    *,
    num_labels: int | None = None,
    dtype: str | None = "float32",
    provided: Collection[str] = (),
) -> torch.nn.Module:
    """Loads the model of a directory in eval mode on the CPU; the network is never used.

    Args:
        directory: the checkpoint.
        task: one of `models.task.TASKS`.
        num_labels: size of the head; None is what the config says.
        dtype: name of a torch dtype, or None for the config's.
        provided: names of tensors that the adapter has (its head). Other tensors that the
            checkpoint lacks, or has in another shape, would be random: they are an error.
    """
    model, missing, mismatched = from_pretrained(
        directory, task, num_labels=num_labels, dtype=dtype
    )
    missing, mismatched = (sorted({*one} - {*provided}) for one in (missing, mismatched))
    pooler = [name for name in missing if name.startswith("pooler.")]
    if pooler and get_task(task).auto_class == "AutoModel":
        # Encoders such as roberta-base are published without: they give no pooler_output.
        missing = [name for name in missing if name not in pooler]
        model.register_module("pooler", None)
    if missing or mismatched:
        raise BaseMismatchError(
            directory,
            expected=f"every weight of {type(model).__name__}",
            found=f"{len(missing)} missing and {len(mismatched)} of another shape",
            remedy="give a base for this task, or name another task with --task (task=...)",
            offenders=[*missing, *mismatched],
        )
    return model.eval()


def from_pretrained(
    directory: str | os.PathLike[str],
    task: str,
    *,
    num_labels: int | None = None,
    dtype: str | None = "float32",
) -> tuple[torch.nn.Module, list[str], list[str]]:
    """Loads the model of a directory, and lists tensors that the checkpoint did not give.

    Args:
        directory: a Hugging Face model directory with safetensors weights.
        task: one of `models.task.TASKS`; decides the class.
        num_labels: rows of a classification head that the checkpoint lacks.
        dtype: name of a torch dtype to load in; None keeps the checkpoint's.

    Returns:
        The model; names of tensors that the checkpoint lacks; names of tensors that it has in
        another shape. Both kinds are random, from torch's global CPU generator.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise missing_extra(str(error.name), "torch,hf", "loading the base model") from None
    directory = local_model(directory)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    options["ignore_mismatched_sizes"] = True  # transformers would not say which
    # An adapter in the model's folder is no part of the base: transformers finds none in there.
    options["adapter_kwargs"] = {"subfolder": os.devnull}
    options["dtype"] = "auto" if dtype is None else getattr(torch, dtype)
    auto = getattr(transformers, auto_class_for(read_config(directory), get_task(task)))
    with quiet_transformers():
        try:  # the code of many model families raises many kinds of errors
            model, info = auto.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except MemoryError:
            raise
        except Exception as error:
            raise BadInputError(
                directory,
                expected=f"a model that transformers loads for {task}",
                found=first_line(error),
                remedy="check the directory, or name the task with --task",
            ) from error
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    return model, sorted(info["missing_keys"]), sorted(mismatched)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars, load reports and advice within the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
