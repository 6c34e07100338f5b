"""The artifacts of a validation that are models: found, checked, not loaded yet."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle.file import Bundle
from ..errors import BadInputError
from ..models.task import Task, choose_task, get_task, head_labels
from . import loading, peft_side
from .inputs import has_tokenizer

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Artifacts:
    """What was given.

    Attributes:
        base, merged: Hugging Face directories.
        bundle: the adapter, and where it came from.
        peft: PEFT adapter directory.
        task: what the models are for; None if there is no model directory and nobody said.
    """

    base: Path | None
    bundle: Bundle | None
    bundle_source: str
    peft: Path | None
    merged: Path | None
    task: Task | None

    @classmethod
    def open(
        cls,
        *,
        base: PathLike | None = None,
        bundle: PathLike | Bundle | None = None,
        peft: PathLike | None = None,
        merged: PathLike | None = None,
        task: str | None = None,
    ) -> Artifacts:
        """Check the paths, read the bundle, settle the task.

        Raises:
            MissingExtraError: a model is given and torch or transformers is not installed.
            UsageError: unknown task, or none that can be inferred.
            FileAccessError, BadInputError: a path that is not what it should be.
        """
        if base is not None or merged is not None:
            loading.require_transformers()
        if peft is not None:
            peft_side.check_installed()
        base_dir = None if base is None else loading.model_directory(base)
        merged_dir = None if merged is None else loading.model_directory(merged)
        peft_dir = None if peft is None else peft_side.adapter_directory(peft)
        source = "" if isinstance(bundle, Bundle) or bundle is None else os.fspath(bundle)
        opened = bundle if isinstance(bundle, Bundle) or bundle is None else Bundle.load(bundle)
        task_type = opened.spec.task_type if opened else None
        if task_type is None and peft_dir is not None:
            task_type = peft_side.task_type(peft_dir)
        # A merged checkpoint's architecture already says what the adapter's head made of the base.
        config_dir = merged_dir or base_dir
        chosen = None if task is None else get_task(task)
        if config_dir is not None:
            chosen = choose_task(task, read_config(config_dir), task_type)
        return cls(base_dir, opened, source, peft_dir, merged_dir, chosen)

    def check_base(self) -> None:
        """Compare the base with what a bound bundle remembers of it.

        Raises:
            BaseMismatchError: layers that are absent, of another shape or with other weights.
        """
        if self.base is not None and self.bundle is not None and self.bundle.is_bound:
            self.bundle.bind(self.base)

    @property
    def names(self) -> tuple[str, ...]:
        """The sides these artifacts give."""
        torch_side = self.base is not None and self.bundle is not None
        given = {
            "base": self.base is not None,
            "torch": torch_side,
            "peft": self.peft is not None,
            "merged": self.merged is not None,
        }
        return tuple(name for name, present in given.items() if present)

    @property
    def tokenizer(self) -> Path | None:
        """The first model directory with a tokenizer."""
        places = [place for place in (self.base, self.merged) if place is not None]
        return next((place for place in places if has_tokenizer(place)), None)

    @property
    def num_labels(self) -> int | None:
        """The labels of the head that the adapter brings; None if it brings none."""
        if self.bundle is not None:
            return head_labels({name: a.shape for name, a in self.bundle.saved.items()})
        return None if self.peft is None else head_labels(peft_side.saved_shapes(self.peft))

    def config_number(self, *keys: str) -> int | None:
        """The first of these config fields that is a whole number above 0, base before merged."""
        for directory in (self.base, self.merged):
            config = {} if directory is None else read_config(directory)
            for key in keys:
                value = config.get(key)
                if type(value) is int and value > 0:
                    return value
        return None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory.

    Raises:
        BadInputError: it is not a JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError(path, expected="a JSON object", found="something else") from error
    if not isinstance(config, dict):
        raise BadInputError(path, expected="a JSON object", found=type(config).__name__)
    return config
