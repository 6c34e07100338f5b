"""Every setting of a training run, defined once.

Checks, keys of a settings file and options of the command line all follow from the fields here.
No torch is imported, so that options are checked before anything slow begins.
"""

# ruff: noqa: RUF009 - the fields' defaults come from `_setting`

from __future__ import annotations

import difflib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any

from ..errors import BadInputError, UsageError
from ..files.container import read_file

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_BYTES = 1 << 20
WHAT, ADAPTER, LEARNING, MACHINE, SCORES = (
    "What is trained on what",
    "The adapter",
    "How it learns",
    "On what machine",
    "Scores and outputs",
)
SECTIONS = (WHAT, ADAPTER, LEARNING, MACHINE, SCORES)
Names = str | tuple[str, ...] | list[str]


@dataclass(frozen=True)
class Setting:
    """What a setting may be, and how the command line shows it.

    Attributes:
        kind: int, float, bool, str; list for names, dict for names with whole numbers, tuple for
            a list of whole numbers.
        help: one line for `--help`.
        section: of the help; "" for a setting that only a file or Python can give.
        metavar: the word for its value in the help; by default from its kind.
        choices: the words that it may be.
        least, most: limits of a number; with `above` it must be larger than `least`.
        optional: None is allowed, and means the default that the help names.
        flag: the option's words, where they are not the field's name.
    """

    kind: type
    help: str = ""
    section: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    optional: bool = True
    flag: str = ""

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {
            bool: "true or false",
            str: "a text",
            list: "a text or a list of texts",
            dict: "names with whole numbers from 1",
            tuple: "a list of whole numbers from 0",
            int: "a whole number",
            float: "a number",
        }[self.kind]
        if self.above:
            return f"{words} above {self.least:g}"
        if self.most < math.inf:
            return f"{words} from {self.least:g} to {self.most:.10g}"
        return words + (f" of at least {self.least:g}" if self.least > -math.inf else "")

    def accepts(self, value: Any) -> bool:
        """Whether `value` may stand here."""
        if value is None:
            return self.optional
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is dict:
            return isinstance(value, Mapping) and all(
                isinstance(k, str) and _is_whole(n) and n > 0 for k, n in value.items()
            )
        if self.kind is tuple:
            return isinstance(value, tuple | list) and all(_is_whole(n) and n >= 0 for n in value)
        if self.kind is list and isinstance(value, tuple | list):
            return all(isinstance(name, str) and name for name in value)
        if self.kind in (list, str):
            return isinstance(value, str) and value != ""
        if self.kind is bool:
            return isinstance(value, bool)
        whole = _is_whole(value)
        if not whole and (self.kind is int or not isinstance(value, float)):
            return False
        in_range = self.least < value if self.above else self.least <= value
        return math.isfinite(value) and in_range and value <= self.most


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _setting(section: str, kind: type, text: str, default: Any = None, **limits: Any) -> Any:
    rule = Setting(kind, text, section, optional=default is None, **limits)
    if kind is dict:
        return field(default_factory=dict, metadata={"rule": rule})
    return field(default=default, metadata={"rule": rule})


def _usage_error(where: Any, expected: str, wrong: list[str], remedy: str) -> UsageError:
    one = len(wrong) == 1
    found = wrong[0] if one else f"{len(wrong)} that are not"
    offenders = () if one else wrong
    return UsageError(where, expected=expected, found=found, remedy=remedy, offenders=offenders)


class _Checked:
    """Checks every field by its rule; lists become tuples."""

    def __post_init__(self) -> None:
        wrong = self.problems()
        if wrong:
            remedy = "" if len(wrong) == 1 else "see the list"
            raise _usage_error("training settings", "valid values", wrong, remedy)
        for name, rule in rules(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list) or (rule.kind is list and isinstance(value, str)):
                kept = (value,) if isinstance(value, str) else tuple(value)
                if name not in ("target_modules", "exclude_modules") or isinstance(value, list):
                    object.__setattr__(self, name, kept)

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        return [
            f"{name}: expected {rule.expected}, found {getattr(self, name)!r}"
            for name, rule in rules(type(self)).items()
            if not rule.accepts(getattr(self, name))
        ]


@dataclass(frozen=True)
class TrainSettings(_Checked):
    """The settings of a training run: of its adapter, its steps and its evaluation.

    Args: the keys of a settings file, and with dashes the options of `fourierft-export train`,
    whose `--help` describes each. None means "by the rules of `train.defaults`".

    Raises:
        UsageError: values out of range; all of them are listed.
    """

    n_frequency: int | None = _setting(
        ADAPTER,
        int,
        "Coefficients per layer.  [default: 1000, at most a quarter of the smallest layer]",
        least=1,
    )
    n_frequency_pattern: Mapping[str, int] = _setting(
        "", dict, "Other values of it, by regular expression or full path of a layer."
    )
    scaling: float | None = _setting(
        ADAPTER, float, "Of delta W, not 0.  [default: by the layers' shapes]"
    )
    entry_seed: int = _setting(
        ADAPTER, int, "Places the coefficients.  [default: 2024]", 2024, least=0, most=2**32 - 1
    )
    target_modules: Names | None = _setting(
        ADAPTER,
        list,
        "Ends of the paths of layers to adapt, or all-linear, or one regular expression.",
    )
    exclude_modules: Names | None = _setting(ADAPTER, list, "Layers to leave out.")
    layers_to_transform: tuple[int, ...] | list[int] | None = _setting(
        "", tuple, "Numbers of the blocks to adapt; all by default."
    )
    modules_to_save: tuple[str, ...] | list[str] | None = _setting(
        ADAPTER, list, "Trained whole: heads."
    )
    bias: str = _setting(
        ADAPTER, str, "Biases that learn.", "none", choices=("none", "all", "fourier_only")
    )
    init_weights: bool | None = _setting(
        ADAPTER,
        bool,
        "Spectra start at zero, or at standard normal numbers.",
        flag="--init-weights/--init-normal",
    )
    epochs: float | None = _setting(LEARNING, float, "Passes over the rows.", least=0, above=True)
    steps: int | None = _setting(LEARNING, int, "Instead of --epochs.", least=1)
    batch_size: int | None = _setting(LEARNING, int, "Rows per step, over all processes.", least=1)
    learning_rate: float | None = _setting(
        LEARNING, float, "Of the spectra.  [default: by shapes]", least=0
    )
    layer_rates: str = _setting(
        LEARNING,
        str,
        "Whether layers of other shapes get the rate at which they move alike.  [default: shape]",
        "shape",
        choices=("shape", "same"),
    )
    head_learning_rate: float | None = _setting(LEARNING, float, "Of heads and biases.", least=0)
    weight_decay: float = _setting(LEARNING, float, "Of heads.  [default: 0]", 0.0, least=0)
    spectrum_weight_decay: float = _setting(LEARNING, float, "[default: 0]", 0.0, least=0)
    warmup: float | None = _setting(LEARNING, float, "Share of the steps.", least=0, most=1)
    schedule: str | None = _setting(LEARNING, str, "", choices=("linear", "cosine", "constant"))
    max_grad_norm: float | None = _setting(
        LEARNING, float, "0 leaves gradients as they are.", least=0
    )
    seed: int = _setting(LEARNING, int, "[default: 0]", 0, least=0, most=2**32 - 1)
    dropout: bool = _setting(
        LEARNING, bool, "The base's own.  [default: no]", False, flag="--dropout/--no-dropout"
    )
    group_lengths: bool = _setting(
        LEARNING,
        bool,
        "Rows of like length meet in a batch.  [default: yes]",
        True,
        flag="--group-lengths/--no-group-lengths",
    )
    device: str | None = _setting(MACHINE, str, "cpu, cuda, mps.  [default: a GPU if there is one]")
    dtype: str = _setting(
        MACHINE,
        str,
        "What the model computes in; what learns is float32.  [default: float32]",
        "float32",
        choices=("float32", "bfloat16", "float16"),
    )
    threads: int | None = _setting(MACHINE, int, "Of the CPU.", least=1)
    accumulate: int = _setting(MACHINE, int, "Parts of a batch, to save memory.", 1, least=1)
    gradient_checkpointing: bool = _setting(
        MACHINE, bool, "Compute activations twice, to save memory.", False
    )
    eval_every: int | None = _setting(SCORES, int, "Steps.  [default: an epoch]", least=1)
    metric: str | None = _setting(SCORES, str, "Which score says what is best.")
    keep: str = _setting(SCORES, str, "[default: best]", "best", choices=("best", "last"))
    patience: int | None = _setting(
        SCORES, int, "Stop after N scores without a better one.", least=1
    )
    report_to: Names | None = _setting(SCORES, list, "Also log to tensorboard, wandb, mlflow, ...")
    eval_share: float = _setting(
        WHAT, float, "Held out without --eval.  [default: 0.1]", 0.1, least=0, most=0.999
    )
    max_length: int | None = _setting(WHAT, int, "Cut longer rows to so many tokens.", least=1)
    max_train_rows: int | None = _setting(
        WHAT, int, "Use at most so many rows, drawn by the seed.", least=1
    )

    def problems(self) -> list[str]:
        """What is wrong with the values, and with values that do not go together."""
        wrong = super().problems()
        if self.scaling == 0:
            wrong.append("scaling: expected a number other than 0, found 0")
        if self.epochs is not None and self.steps is not None:
            wrong.append("epochs, steps: expected one of them, found both")
        if not wrong and self.accumulate > (self.batch_size or math.inf):
            wrong.append(
                f"accumulate: expected at most the batch size {self.batch_size}, "
                f"found {self.accumulate}"
            )
        return wrong

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        found = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


@dataclass(frozen=True)
class DataSettings(_Checked):
    """What the verb `train` trains on what; see `fourierft-export train --help`."""

    model: str | None = _setting(
        WHAT, str, "A Hugging Face model directory, or a Hub id.", metavar="DIR"
    )
    module: str | None = _setting(
        WHAT,
        str,
        "A callable that gives a torch model and its data sets, in place of --model and --data.",
        metavar="PKG.MOD:FACTORY",
    )
    task: str | None = _setting(
        WHAT,
        str,
        "text-classification, token-classification, image-classification, text-generation.",
        metavar="TASK",
    )
    data: str | None = _setting(
        WHAT,
        str,
        "Rows to learn from: tsv, csv, jsonl, parquet, a folder of images, or a Hub id[:config].",
        metavar="FILE",
    )
    eval: str | None = _setting(
        WHAT, str, "Rows to score.  [default: a share of --data is held out]", metavar="FILE"
    )
    text_column: Names | None = _setting(WHAT, list, "May be given twice, for pairs.")
    label_column: str | None = _setting(WHAT, str, "")
    problem_type: str | None = _setting(
        WHAT,
        str,
        "text-classification: what labels are.  [default: one class, or by lists several]",
        choices=("single_label_classification", "multi_label_classification", "regression"),
    )
    pack: bool = _setting(WHAT, bool, "text-generation: several texts in a row.", False)
    bundle: str | None = _setting(ADAPTER, str, "Train this adapter further.", metavar="BUNDLE")
    output: str | None = _setting(
        SCORES, str, "The bundle to write.  [required]", metavar="BUNDLE", flag="-o --output"
    )
    metrics_file: str | None = _setting(
        SCORES, str, "[default: OUT.train/metrics.json]", metavar="FILE"
    )


def rules(settings: type) -> dict[str, Setting]:
    """Field name -> what it may be."""
    found: tuple[Field[Any], ...] = fields(settings)
    return {f.name: f.metadata["rule"] for f in found}


SETTING_NAMES = tuple(rules(TrainSettings))


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a settings file; dashes in keys count as underscores."""
    try:
        found = tomllib.loads(read_file(path, MAX_TOML_BYTES).decode("utf-8"))
    # A ValueError for what is not UTF-8 or not TOML, and for numbers of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise BadInputError(path, expected="a TOML file", found=str(error)) from error
    known = rules(TrainSettings) | rules(DataSettings)
    wrong = []
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            wrong.append(f"{key}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        elif name in values:
            wrong.append(f"{key}: given twice")
        elif not known[name].accepts(value):
            wrong.append(f"{key}: expected {known[name].expected}, found {value!r}")
        values[name] = value
    if wrong:
        remedy = "see fourierft-export train --help for their names"
        raise _usage_error(path, "known settings", wrong, remedy)
    return values
