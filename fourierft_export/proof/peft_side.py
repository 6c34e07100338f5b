"""PEFT's own model of an adapter directory: the opinion of the code that trained it."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.peft import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_peft_config
from ..errors import BadInputError, BaseMismatchError, missing_extra
from .loading import quiet_transformers

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."


def adapter_directory(path: str | os.PathLike[str]) -> Path:
    """The directory at `path`, or its one subfolder, that holds a PEFT FourierFT adapter.

    Raises:
        FileAccessError: there is no such directory.
        UsageError: it holds several adapters.
        BadInputError: it holds none, one of another type, or pickled weights only.
    """
    directory = find_adapter(path)
    read_peft_config(directory / CONFIG_FILE)
    if not (directory / WEIGHTS_FILE).is_file():
        raise BadInputError(
            directory, expected=f"a PEFT adapter with {WEIGHTS_FILE}", found="no such file in it"
        )
    return directory


def task_type(directory: Path) -> str | None:
    """The adapter's task type as its config says."""
    value = read_peft_config(directory / CONFIG_FILE).get("task_type")
    return value if isinstance(value, str) else None


def saved_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the dense tensors that ride along, by name in the adapted model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / WEIGHTS_FILE, "np") as file:
            names = [name for name in file.keys() if not name.endswith("fourierft_spectrum")]  # noqa: SIM118
            return {
                name.removeprefix(_PREFIX): tuple(file.get_slice(name).get_shape())
                for name in names
            }
    except SafetensorError as error:
        raise BadInputError(
            directory / WEIGHTS_FILE, expected="a safetensors file", found=str(error)
        ) from error


def check_installed() -> None:
    """Raise MissingExtraError if peft is not there, before any model is loaded."""
    if find_spec("peft") is None:
        raise missing_extra("peft", "peft", "validate with PEFT's own model")


def peft_model(base: torch.nn.Module, directory: Path) -> tuple[torch.nn.Module, list[str]]:
    """PEFT's model, unmerged, in eval mode. `base` is changed: PEFT puts its layers into it.

    Returns:
        The model, and what PEFT said about keys that the file lacks: those spectra are random.

    Args:
        base: freshly loaded, float32.
        directory: from `adapter_directory`.

    Raises:
        BaseMismatchError: PEFT cannot put the adapter on this base.
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
                found=(str(error).splitlines() or [type(error).__name__])[0],
                remedy="give the base model that the adapter belongs to",
            ) from error
    lines = [(str(warning.message).splitlines() or [""])[0] for warning in caught]
    return model.eval(), [line for line in lines if "missing adapter keys" in line]
