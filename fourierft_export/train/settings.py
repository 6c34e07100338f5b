"""Every setting of a training run, defined once.

The fields' types say what values are allowed, SETTINGS.md says what they mean; checks, keys of a
settings file and options of the command line follow. No torch is imported, so that options are
checked before anything slow begins.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..errors import BadInputError, UsageError
from . import defaults

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_BYTES = 1 << 20
OF_ADAPTER = (
    *("budget", "n_frequency", "n_frequency_pattern", "scaling", "entry_seed", "target_modules"),
    *("exclude_modules", "layers_to_transform", "modules_to_save", "bias", "init_weights"),
)


@dataclass(frozen=True)
class Kind:
    """What a value may be."""

    type: type  # what the command line makes of its text; list for names
    words: str  # what a value must be, for people
    test: Callable[[Any], bool] = bool
    choices: tuple[str, ...] = ()  # the words that it may be, if it is one of a few

    def accepts(self, value: Any) -> bool:
        """Whether a value is of the type and passes the test; true and false are no numbers."""
        types_of = {float: (int, float), list: (str, list, tuple), tuple: (list, tuple)}
        types = types_of.get(self.type, self.type)
        is_type = isinstance(value, types) and isinstance(value, bool) == (self.type is bool)
        return is_type and self.test(value)


def _whole(words: str, least: float, most: float = math.inf) -> Kind:
    return Kind(int, f"a whole number {words}", lambda n: least <= n <= most)


def _number(words: str, least: float, most: float = sys.float_info.max) -> Kind:
    return Kind(float, f"a number {words}", lambda x: least <= x <= most)


def _all(kind: Kind, values: Any) -> bool:
    return not isinstance(values, str) and all(map(kind.accepts, values))


_TEXT = Kind(str, "a text")
_COUNT, _FROM_0 = _whole("of at least 1", 1), _whole("from 0", 0)
_NAMES = Kind(list, "a text or a list of texts", lambda v: _TEXT.accepts(v) or _all(_TEXT, v))
_BLOCKS = Kind(tuple, "a list of whole numbers from 0", lambda v: _all(_FROM_0, v))
_COUNTS = Kind(Mapping, "names with whole numbers from 1", lambda v: _all(_COUNT, v.values()))
Text = Annotated[str, _TEXT]
Flag = Annotated[bool, Kind(bool, "true or false", lambda _: True)]
Names = Annotated[str | tuple[str, ...] | list[str], _NAMES]
Paths = Annotated[tuple[str, ...] | list[str], _NAMES]
Blocks = Annotated[tuple[int, ...] | list[int], _BLOCKS]
Counts = Annotated[Mapping[str, int], _COUNTS]
Count = Annotated[int, _COUNT]
Seed = Annotated[int, _whole("from 0 to 4294967295", 0, 2**32 - 1)]
NotZero = Annotated[float, Kind(float, "a number other than 0", lambda x: 0 < abs(x) < math.inf)]
Positive = Annotated[float, _number("above 0", math.ulp(0.0))]
NotNegative = Annotated[float, _number("of at least 0", 0)]
Share = Annotated[float, _number("from 0 to 1", 0, 1)]
PartialShare = Annotated[float, _number("from 0 to 0.999", 0, 0.999)]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


def kinds(settings: type) -> dict[str, tuple[Kind, bool]]:
    """Field of a class of settings -> what its values may be, and whether None is allowed."""
    found = {}
    for name, hint in get_type_hints(settings, include_extras=True).items():
        parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
        if get_origin(parts[0]) is Literal:
            choices = get_args(parts[0])
            kind = Kind(str, "one of " + ", ".join(choices), choices.__contains__, choices)
        else:
            kind = get_args(parts[0])[1]
        found[name] = (kind, len(parts) > 1)
    return found


class _Checked:
    """Checks every field by its type; lists become tuples."""

    def __post_init__(self) -> None:
        wrong = self.problems()
        if wrong:
            raise _usage_error("training settings", "valid values", wrong, "see the list")
        for name, (kind, _) in kinds(type(self)).items():
            value = getattr(self, name)
            expression = name in ("target_modules", "exclude_modules")
            if kind is _NAMES and isinstance(value, str) and not expression:
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        given = [(name, getattr(self, name), *kind) for name, kind in kinds(type(self)).items()]
        return [
            f"{name}: expected {kind.words}, found {value!r}"
            for name, value, kind, optional in given
            if not (value is None and optional) and not kind.accepts(value)
        ]


@dataclass(frozen=True)
class TrainSettings(_Checked):
    """The settings of a training run: of its adapter, its steps and its evaluation.

    Args: the keys of a settings file, and with dashes the options of `fourierft-export train`;
    `train/SETTINGS.md` describes each. None means "by the rules of `train.defaults`".

    Raises:
        UsageError: values out of range; all of them are listed.
    """

    budget: Count | None = None
    n_frequency: Count | None = None
    n_frequency_pattern: Counts = field(default_factory=dict)
    scaling: NotZero | None = None
    entry_seed: Seed = 2024
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    layers_to_transform: Blocks | None = None
    modules_to_save: Paths | None = None
    bias: Literal["none", "all", "fourier_only"] = "none"
    init_weights: Flag = defaults.INIT_ZEROS
    epochs: Positive | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    learning_rate: NotNegative | None = None
    layer_rates: Literal["shape", "same"] = "shape"
    head_learning_rate: NotNegative = defaults.HEAD_LEARNING_RATE
    weight_decay: NotNegative = 0.0
    spectrum_weight_decay: NotNegative = 0.0
    warmup: Share = defaults.WARMUP
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    average: Share = defaults.AVERAGE
    max_grad_norm: NotNegative = defaults.MAX_GRAD_NORM
    seed: Seed = 0
    dropout: Flag = False
    group_lengths: Flag = True
    device: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: Count | None = None
    accumulate: Count = 1
    gradient_checkpointing: Flag = False
    eval_every: Count | None = None
    metric: Text | None = None
    keep: Literal["best", "last"] = "best"
    patience: Count | None = None
    report_to: Paths | None = None
    eval_share: PartialShare = 0.1
    max_length: Count | None = None
    max_train_rows: Count | None = None

    def problems(self) -> list[str]:
        """What is wrong with the values, and with values that do not go together."""
        wrong = super().problems()
        if self.epochs is not None and self.steps is not None:
            wrong.append("epochs, steps: expected one of them, found both")
        if self.budget is not None and (self.n_frequency or self.n_frequency_pattern):
            wrong.append("budget, n_frequency: expected one of them, found both")
        if not wrong and self.accumulate > (self.batch_size or math.inf):
            expected = f"at most the batch size {self.batch_size}"
            wrong.append(f"accumulate: expected {expected}, found {self.accumulate}")
        return wrong

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        found = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


@dataclass(frozen=True)
class DataSettings(_Checked):
    """The options of the verb `train` that say which model learns from which rows."""

    model: Text | None = None
    module: Text | None = None
    task: Text | None = None
    data: Text | None = None
    eval: Text | None = None
    text_column: Paths | None = None
    label_column: Text | None = None
    problem_type: ProblemType | None = None
    pack: Flag = False
    bundle: Text | None = None
    output: Text | None = None


class Option(NamedTuple):
    """A setting on the command line; `metavar` is the word for its value."""

    name: str
    section: str
    metavar: str
    help: str
    kind: Kind


def options() -> Iterator[Option]:
    """The settings that the command line takes, in the order of its help, from SETTINGS.md."""
    found, section = kinds(DataSettings) | kinds(TrainSettings), ""
    for line in Path(__file__).with_name("SETTINGS.md").read_text("utf-8").splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        if line.startswith("## "):
            section = line[3:]
        elif cells and cells[0] in found and not section.startswith("Only in"):
            name, metavar, text, default = cells
            note = default if default in ("", "required") else f"default: {default}"
            text += f"  [{note}]" if note else ""
            yield Option(name, section, metavar, text, found[name][0])


def _usage_error(where: Any, expected: str, wrong: list[str], remedy: str) -> UsageError:
    if len(wrong) == 1:
        return UsageError(where, expected=expected, found=wrong[0])
    found = f"{len(wrong)} that are not"
    return UsageError(where, expected=expected, found=found, remedy=remedy, offenders=wrong)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a settings file; dashes in keys count as underscores."""
    from ..files.safetensors_reader import read_file  # needs numpy, which --help does not load

    try:
        found = tomllib.loads(read_file(path, MAX_TOML_BYTES).decode("utf-8"))
    # A ValueError for what is not UTF-8 or not TOML, and for numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise BadInputError(path, expected="a TOML file", found=str(error)) from error
    known = kinds(TrainSettings) | kinds(DataSettings)
    wrong = []
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            wrong.append(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        elif name in values:
            wrong.append(f"{key}: given twice")
        elif not known[name][0].accepts(value):
            wrong.append(f"{key}: expected {known[name][0].words}, found {value!r}")
        values[name] = value
    if wrong:
        remedy = "see fourierft-export train --help for their names"
        raise _usage_error(path, "known settings", wrong, remedy)
    return values
