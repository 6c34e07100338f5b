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
from collections.abc import Iterable, Mapping
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
        for name in ("n_frequency", "random_loc_seed"):
            self._set(name, _integer(getattr(self, name), name, wrong))
        if isinstance(self.n_frequency, int) and self.n_frequency < 1:
            wrong.append(f"n_frequency: expected at least 1, found {self.n_frequency}")
        if isinstance(self.random_loc_seed, int) and not 0 <= self.random_loc_seed <= MAX_SEED:
            wrong.append(f"random_loc_seed: expected 0 to {MAX_SEED}, found {self.random_loc_seed}")
        if not _is_finite_number(self.scaling):
            wrong.append(f"scaling: expected a finite number, found {self.scaling!r}")
        for name in ("fan_in_fan_out", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                wrong.append(f"{name}: expected True or False, found {getattr(self, name)!r}")
        if self.bias not in BIAS_MODES:
            wrong.append(f"bias: expected one of {', '.join(BIAS_MODES)}, found {self.bias!r}")
        kind: object = self.task_type
        if isinstance(kind, Enum):  # peft.TaskType
            self._set("task_type", kind.value)
        if self.task_type not in (None, *TASK_TYPES):
            known = ", ".join(TASK_TYPES)
            wrong.append(f"task_type: expected one of {known}, or None, found {self.task_type!r}")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            may_be_text = name != "modules_to_save"
            self._set(name, _names(getattr(self, name), name, may_be_text, wrong))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lower() != ALL_LINEAR:
                _check_regex(value, name, wrong)
        patterns = self.layers_pattern or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            _check_regex(pattern, "layers_pattern", wrong)
        self._set("layers_to_transform", _layer_numbers(self.layers_to_transform, wrong))
        self._set("n_frequency_pattern", _frequencies(self.n_frequency_pattern, wrong))
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

    Raises:
        FileAccessError, BadInputError: the path leads to no FourierFT configuration.
        UsageError: fields that neither has, or values that `FourierFTConfig` refuses.
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


def _integer(value: object, name: str, wrong: list[str]) -> object:
    """`value` as a plain int; numpy's integers are welcome, bools are not."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    wrong.append(f"{name}: expected an integer, found {value!r}")
    return value


def _is_finite_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names(value: object, name: str, may_be_text: bool, wrong: list[str]) -> object:
    if value is None or (isinstance(value, str) and may_be_text):
        return value
    if isinstance(value, list | tuple | set | frozenset) and all(
        isinstance(v, str) and v for v in value
    ):
        return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    kinds = "a string or a list of names" if may_be_text else "a list of names"
    wrong.append(f"{name}: expected {kinds}, found {value!r}")
    return None


def _layer_numbers(value: object, wrong: list[str]) -> object:
    if value is None:
        return None
    many = isinstance(value, list | tuple | set | frozenset | range)
    numbers: Iterable[object] = value if many else (value,)  # type: ignore[assignment]
    if all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        return tuple(numbers) if many else value
    wrong.append(f"layers_to_transform: expected whole numbers from 0, found {value!r}")
    return None


def _frequencies(value: object, wrong: list[str]) -> dict[str, int]:
    if not isinstance(value, Mapping | None):
        wrong.append(f"n_frequency_pattern: expected a dictionary, found {value!r}")
        return {}
    pattern = {}
    for key, n in (value or {}).items():
        if not isinstance(key, str) or not isinstance(n, int) or isinstance(n, bool) or n < 1:
            wrong.append(
                f"n_frequency_pattern: expected names with values from 1, found {key!r}: {n!r}"
            )
        elif _check_regex(key, "n_frequency_pattern", wrong):
            pattern[key] = n
    return pattern


def _check_regex(pattern: str, name: str, wrong: list[str]) -> bool:
    try:
        re.compile(pattern)
    except re.error as error:
        wrong.append(f"{name}: {pattern!r} is not a regular expression: {error}")
        return False
    return True
