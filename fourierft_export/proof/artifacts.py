"""Finds and checks the artifacts of a validation that are models, without loading them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..bundle.bundle import Bundle
from ..bundle.peft import CONFIG_FILE, WEIGHTS_FILE, BundleSource, find_adapter, open_bundle
from ..bundle.peft_config import read_peft_config
from ..errors import BadInputError, FileAccessError, FourierFTError, missing_extra
from ..files.hub import local_model
from ..models.task import Task, choose_task, get_task, head_labels, read_config
from .inputs import has_tokenizer

PathLike = str | os.PathLike[str]
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Artifacts:
    """The models and adapters to validate; None for those that were not given."""

    base: Path | None  # Hugging Face directory
    bundle: Bundle | None
    source: str  # the base and the bundle, for the report
    peft: Path | None  # PEFT adapter directory
    merged: Path | None  # Hugging Face directory
    task: Task | None  # what the models are for; None without a model directory and a name

    @classmethod
    def open(
        cls,
        *,
        base: PathLike | None,
        bundle: BundleSource | None,
        peft: PathLike | None,
        merged: PathLike | None,
        task: str | None,
    ) -> Artifacts:
        """Checks paths and installed packages, reads the bundle and chooses the task."""
        needed = [("torch", "torch"), ("transformers", "hf")] if base or merged else []
        for package, extra in [*needed, ("peft", "peft")] if peft else needed:
            if find_spec(package) is None:
                raise missing_extra(package, extra, "validate")
        base_dir = None if base is None else _model_directory(Path(local_model(base)))
        merged_dir = None if merged is None else _model_directory(Path(local_model(merged)))
        peft_dir = None if peft is None else find_adapter(peft)
        opened = None if bundle is None else open_bundle(bundle)
        task_type = opened.spec.task_type if opened else None
        if peft_dir is not None:
            found = read_peft_config(peft_dir / CONFIG_FILE).get("task_type")
            task_type = task_type or (found if isinstance(found, str) else None)
            if not (peft_dir / WEIGHTS_FILE).is_file():
                expected = f"a PEFT adapter with {WEIGHTS_FILE}"
                raise BadInputError(peft_dir, expected=expected, found="no such file in it")
        # The merged checkpoint's architecture is that of the adapted model.
        config_dir = merged_dir or base_dir
        chosen = None if task is None else get_task(task)
        if config_dir is not None:
            chosen = choose_task(task, read_config(config_dir), task_type)
        source = f"{base_dir} + {'bundle' if bundle is opened else bundle}"
        return cls(base_dir, opened, source, peft_dir, merged_dir, chosen)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sides that these artifacts give."""
        rebuilt = self.base if self.bundle is not None else None
        given = {"base": self.base, "torch": rebuilt, "peft": self.peft, "merged": self.merged}
        return tuple(name for name, path in given.items() if path is not None)

    @property
    def tokenizer(self) -> Path | None:
        """The first model directory that holds a tokenizer."""
        return next((place for place in self._models() if has_tokenizer(place)), None)

    @property
    def num_labels(self) -> int | None:
        """Number of labels of the adapter's classification head; None if it has none."""
        if self.bundle is not None:
            return head_labels({name: a.shape for name, a in self.bundle.saved.items()})
        return None if self.peft is None else head_labels(tensor_shapes(self.peft))

    def config_number(self, *keys: str) -> int | None:
        """Finds the first of these config fields that is a positive integer, base before merged."""
        values = [read_config(place).get(key) for place in self._models() for key in keys]
        return next((value for value in values if type(value) is int and value > 0), None)

    def _models(self) -> Iterator[Path]:
        return (place for place in (self.base, self.merged) if place is not None)


def tensor_shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shapes of a PEFT adapter's tensors, by name in the adapted model."""
    from safetensors import SafetensorError, safe_open

    path = adapter / WEIGHTS_FILE
    try:
        with safe_open(path, "np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BadInputError(path, expected="a safetensors file", found=str(error)) from error
    return {name.removeprefix(_PREFIX): tuple(shape) for name, shape in shapes.items()}


def _model_directory(directory: Path) -> Path:
    """Checks that `directory` holds a config.json; nothing is downloaded."""
    if (directory / "config.json").is_file():
        return directory
    kind: type[FourierFTError] = BadInputError
    found = "no config.json in it" if directory.is_dir() else "a file"
    if not os.path.lexists(directory):
        kind, found = FileAccessError, "no such directory"
    remedy = "give the folder that holds the model's config.json"
    raise kind(directory, expected="a model directory", found=found, remedy=remedy)
