"""PEFT's own model of an adapter directory: the opinion of the code that trained it."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BadInputError, BaseMismatchError, FileAccessError, missing_extra
from .loading import quiet_transformers

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


def adapter_directory(path: str | os.PathLike[str]) -> Path:
    """`path`, which must hold a PEFT FourierFT adapter with safetensors weights.

    Raises:
        FileAccessError: there is no such directory.
        BadInputError: it is not such an adapter; pickled weights are refused.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise FileAccessError(
            directory,
            expected="an adapter directory",
            found="no such directory",
            remedy="check the path",
        )
    for name in ("adapter_config.json", _WEIGHTS):
        if not (directory / name).is_file():
            raise BadInputError(directory, expected=f"a PEFT adapter with {name}", found="none")
    config = _config(directory)
    kind = config.get("peft_type")
    if kind != "FOURIERFT":
        raise BadInputError(directory, expected="a FOURIERFT adapter", found=f"peft_type {kind!r}")
    return directory


def task_type(directory: Path) -> str | None:
    """The adapter's task type as its config says."""
    value = _config(directory).get("task_type")
    return value if isinstance(value, str) else None


def saved_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the dense tensors that ride along, by name in the adapted model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / _WEIGHTS, "np") as file:
            names = [name for name in file.keys() if not name.endswith("fourierft_spectrum")]  # noqa: SIM118
            return {
                name.removeprefix(_PREFIX): tuple(file.get_slice(name).get_shape())
                for name in names
            }
    except SafetensorError as error:
        raise BadInputError(
            directory / _WEIGHTS, expected="a safetensors file", found=str(error)
        ) from error


def peft_model(base: torch.nn.Module, directory: Path) -> tuple[torch.nn.Module, list[str]]:
    """PEFT's model, unmerged, in eval mode. `base` is changed: PEFT puts its layers into it.

    Returns:
        The model, and what PEFT said about keys that the file lacks: those spectra are random.

    Args:
        base: freshly loaded, float32.
        directory: from `adapter_directory`.

    Raises:
        MissingExtraError: peft is not installed.
        BaseMismatchError: PEFT cannot put the adapter on this base.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise missing_extra("peft", "test", "validate with PEFT's own model") from error
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


def _config(directory: Path) -> dict[str, object]:
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError(path, expected="a JSON object", found="something else") from error
    if not isinstance(config, dict):
        raise BadInputError(path, expected="a JSON object", found=type(config).__name__)
    return config
