"""`FourierFTConfig`: which layers to adapt and how, with the field names of PEFT.

Field names, meanings and defaults are those of PEFT's `FourierFTConfig`
(tuners/fourierft/config.py), so that a configuration can move between the two as a dictionary.
This one is frozen and checked when it is made: all that is wrong is reported at once.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from ..bundle.peft import CONFIG_FILE, find_adapter
from ..bundle.peft_config import read_peft_config
from ..errors import UsageError

ALL_LINEAR = "all-linear"
BIAS_MODES = ("none", "all", "fourier_only")
MAX_SEED = 2**32 - 1
TASK_TYPES = (
    "SEQ_CLS",
    "SEQ_2_SEQ_LM",
    "CAUSAL_LM",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
# Fields that PEFT writes as well; they do not affect which layers are adapted, or how.
_OTHER_PEFT_FIELDS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
}


@dataclass(frozen=True)
class FourierFTConfig:
    """The settings of a new adapter, with the names, meanings and defaults of PEFT's.

    Lists and sets become tuples. Patterns are regular expressions, which `inject` runs; reading a
    bundle or a PEFT adapter runs none.

    Attributes:
        n_frequency: learnable coefficients per layer.
        scaling: multiplies delta_W.
        random_loc_seed: decides where the coefficients sit in the spectrum; 0 to 2^32 - 1.
        target_modules: which linear layers: a regular expression that matches the whole module
            path, a list of paths or last segments, "all-linear", or None for the architecture's
            usual ones.
        exclude_modules: the same, for layers to leave out.
        n_frequency_pattern: other values of n_frequency, by regular expression or full path.
        modules_to_save: modules trained and saved whole, by the end of their path.
        layers_to_transform: block numbers to adapt; all by default.
        layers_pattern: name of the list that those numbers count in, where it is unusual.
        fan_in_fan_out: kept for PEFT's sake; the layer's own type decides how it stores its weight.
        bias: which biases are trained too: "none", "all" of the model, or "fourier_only", those of
            the adapted layers.
        init_weights: True starts the spectra at zero (the model is unchanged at first), False at
            standard normal numbers.
        task_type: one of PEFT's task types, as text or PEFT's enumeration; "SEQ_CLS" and
            "TOKEN_CLS" add `classifier` and `score` to modules_to_save, "QUESTION_ANS" adds
            `qa_outputs`.

    Raises:
        UsageError: a value is out of range, or options contradict each other; all are listed.

    Example:
        >>> import fourierft_export as ff
        >>> config = ff.FourierFTConfig(n_frequency=100, target_modules=["q_proj", "v_proj"])
        >>> config.scaling, config.target_modules
        (150.0, ('q_proj', 'v_proj'))
    """

    n_frequency: int = 1000
    scaling: int | float = 150.0
    random_loc_seed: int = 777
    target_modules: str | tuple[str, ...] | list[str] | set[str] | None = None
    exclude_modules: str | tuple[str, ...] | list[str] | set[str] | None = None
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] | list[str] | None = None
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    layers_pattern: str | tuple[str, ...] | list[str] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = False
    task_type: str | None = None

    def __post_init__(self) -> None:
        """Check every field and bring lists into one form."""
        wrong: list[str] = []

        def refuse(name: str, expected: str) -> None:
            wrong.append(f"{name}: expected {expected}, found {getattr(self, name)!r}")

        for name, low, high in (("n_frequency", 1, None), ("random_loc_seed", 0, MAX_SEED)):
            number = _integer(getattr(self, name))
            if number is None:
                refuse(name, "an integer")
            elif number < low or (high is not None and number > high):
                refuse(name, f"at least {low}" if high is None else f"{low} to {high}")
            else:
                self._set(name, number)
        if isinstance(self.scaling, bool) or not (
            isinstance(self.scaling, int | float) and math.isfinite(self.scaling)
        ):
            refuse("scaling", "a finite number")
        for name in ("fan_in_fan_out", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                refuse(name, "True or False")
        if self.bias not in BIAS_MODES:
            refuse("bias", f"one of {', '.join(BIAS_MODES)}")
        kind: object = self.task_type
        if isinstance(kind, Enum):  # peft.TaskType
            self._set("task_type", kind.value)
        if self.task_type not in (None, *TASK_TYPES):
            refuse("task_type", f"one of {', '.join(TASK_TYPES)}, or None")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value, may_be_text = getattr(self, name), name != "modules_to_save"
            if isinstance(value, list | tuple | set | frozenset) and all(
                isinstance(v, str) and v for v in value
            ):
                ordered = sorted(value) if isinstance(value, set | frozenset) else value
                self._set(name, tuple(ordered))
            elif value is not None and not (isinstance(value, str) and may_be_text):
                refuse(name, f"{'a string or ' if may_be_text else ''}a list of names")
                self._set(name, None)
        layers: Any = self.layers_to_transform
        many = isinstance(layers, list | tuple | set | frozenset | range)
        numbers = tuple(layers if many else [] if layers is None else [layers])
        if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            self._set("layers_to_transform", numbers if many else layers)
        else:
            refuse("layers_to_transform", "whole numbers from 0")
        pattern: Any = self.n_frequency_pattern or {}
        if isinstance(pattern, Mapping) and all(
            isinstance(key, str) and (_integer(n) or 0) >= 1 for key, n in pattern.items()
        ):
            self._set("n_frequency_pattern", {key: _integer(n) for key, n in pattern.items()})
            wrong += _regex_problems("n_frequency_pattern", *pattern)
        else:
            refuse("n_frequency_pattern", "a dictionary of names with values from 1")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() != ALL_LINEAR:
                wrong += _regex_problems(name, value)
        patterns = self.layers_pattern or ()
        wrong += _regex_problems(
            "layers_pattern", *([patterns] if isinstance(patterns, str) else patterns)
        )
        wrong += self._contradictions()
        if wrong:
            raise UsageError(
                "FourierFTConfig",
                expected="valid settings",
                found=f"{len(wrong)} problem{'s'[: len(wrong) > 1]}",
                remedy=wrong[0] if len(wrong) == 1 else "see the list",
                offenders=wrong,
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _contradictions(self) -> list[str]:
        """PEFT's incompatible combinations."""
        wrong = []
        if isinstance(self.target_modules, str):
            wrong += [
                f"{name}: cannot be used when target_modules is a regular expression or "
                f"{ALL_LINEAR!r}; give target_modules as a list"
                for name in ("layers_to_transform", "layers_pattern")
                if getattr(self, name) is not None
            ]
        elif self.layers_pattern and self.layers_to_transform is None:
            wrong.append("layers_pattern: needs layers_to_transform")
        if self.target_modules == ():
            wrong.append("target_modules: expected at least one name, found none")
        return wrong


ConfigSource = FourierFTConfig | Mapping[str, Any] | str | os.PathLike[str] | Any


def load_config(source: ConfigSource) -> FourierFTConfig:
    """Makes a `FourierFTConfig` from an object, a dictionary or a file.

    Args:
        source: a `FourierFTConfig`; PEFT's object of that name; a dictionary of the fields of
            either; the path of an adapter_config.json or of a directory that holds one.
    """
    if isinstance(source, FourierFTConfig):
        return source
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        source = read_peft_config(find_adapter(path) / CONFIG_FILE if path.is_dir() else path)
    elif (to_dict := getattr(source, "to_dict", None)) is not None:
        source = to_dict()
    if not isinstance(source, Mapping):
        raise UsageError(
            "FourierFTConfig",
            expected="a FourierFTConfig, a dictionary of its fields or a path",
            found=type(source).__name__,
        )
    known = {one.name for one in fields(FourierFTConfig)}
    unknown = sorted(set(map(str, source)) - known - _OTHER_PEFT_FIELDS)
    if unknown:
        raise UsageError(
            "FourierFTConfig",
            expected=f"fields among {', '.join(sorted(known))}",
            found=", ".join(unknown),
        )
    return FourierFTConfig(**{k: v for k, v in source.items() if k in known and v is not None})


def _integer(value: object) -> int | None:
    """`value` as a plain int, numpy's integers too; None if it is none (bools are not)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _regex_problems(name: str, *patterns: str) -> list[str]:
    problems = []
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{name}: {pattern!r} is not a regular expression: {error}")
    return problems
