"""Every setting of a training run, checked at once. No torch here: options are checked before it.

`None` means "by the rules of `defaults`".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import UsageError

SCHEDULES = ("linear", "cosine", "constant")
DTYPES = ("float32", "bfloat16", "float16")
KEEP = ("best", "last")
LAYER_RATES = ("shape", "same")
BIASES = ("none", "all", "fourier_only")

Names = str | tuple[str, ...] | list[str] | None


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Field names are the keys of a settings file and, with dashes, the options.

    `max_length` and `max_train_rows` are for whoever makes the task from files; the loop takes the
    task's rows as they are.

    Attributes:
        n_frequency: coefficients per layer.
        n_frequency_pattern: other values of it, by regular expression or full path of a layer.
        scaling: multiplies delta_W.
        entry_seed: decides where the coefficients sit in the spectrum (PEFT's random_loc_seed).
        target_modules: layers to adapt, as in `FourierFTConfig`.
        exclude_modules: layers to leave out.
        layers_to_transform: numbers of the blocks to adapt; all by default.
        modules_to_save: heads to train and save whole; by default the task's.
        bias: which biases learn too: "none", "all" or "fourier_only".
        init_weights: True starts the spectra at zero, False at standard normal numbers.
        epochs: passes over the rows.
        steps: steps in all, instead of `epochs`.
        batch_size: rows per step, over all processes and `accumulate` parts.
        accumulate: parts of a batch that go through the model one after another, to save memory;
            the gradient is that of the whole batch.
        learning_rate: of the spectra, for the adapter's median layer.
        layer_rates: "shape" gives layers of other shapes or n the rate at which their delta_W
            moves alike; "same" gives all of them the same.
        head_learning_rate: of heads and biases.
        weight_decay: AdamW's, on the matrices of heads.
        spectrum_weight_decay: AdamW's, on the spectra.
        warmup: share of the steps over which the rates rise from zero.
        schedule: what the rates do then: "linear" or "cosine" down to zero, or "constant".
        max_grad_norm: longer gradients are shortened to it; 0 leaves them as they are.
        seed: of the order of rows, of dropout, of heads and of spectra that start random.
        dtype: what the model computes in; spectra and heads are float32 always.
        device: "cpu", "cuda", "cuda:1", "mps"; by default a GPU where there is one.
        threads: of the CPU.
        dropout: keep the base's dropout. Off by default: an adapter of some thousand numbers hardly
            overfits, and without it several processes learn exactly as one does.
        gradient_checkpointing: compute activations twice to hold fewer of them.
        group_lengths: rows of like length meet in a batch, where the task knows lengths.
        eval_every: steps between evaluations; by default one after every epoch.
        patience: stop after this many evaluations without a better score.
        metric: which metric says what is best; by default the task's.
        keep: "best" or "last": which adapter the bundle holds.
        eval_share: share of the training rows to score by where no others are given.
        max_length: longer rows are cut to this many tokens.
        max_train_rows: use at most so many rows, drawn by `seed`.

    Raises:
        UsageError: values out of range; all of them are listed.
    """

    n_frequency: int | None = None
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    scaling: float | None = None
    entry_seed: int = 2024  # the paper's
    target_modules: Names = None
    exclude_modules: Names = None
    layers_to_transform: tuple[int, ...] | list[int] | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None
    bias: str = "none"
    init_weights: bool | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    accumulate: int = 1
    learning_rate: float | None = None
    layer_rates: str = "shape"
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    spectrum_weight_decay: float = 0.0
    warmup: float | None = None
    schedule: str | None = None
    max_grad_norm: float | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    threads: int | None = None
    dropout: bool = False
    gradient_checkpointing: bool = False
    group_lengths: bool = True
    eval_every: int | None = None
    patience: int | None = None
    metric: str | None = None
    keep: str = "best"
    eval_share: float = 0.1
    max_length: int | None = None
    max_train_rows: int | None = None

    def __post_init__(self) -> None:
        """Check every field; lists become tuples."""
        wrong = [
            f"{name}: expected {rule.expected}, found {getattr(self, name)!r}"
            for name, rule in _RULES.items()
            if not rule.accepts(getattr(self, name))
        ]
        if self.epochs is not None and self.steps is not None:
            wrong.append("epochs, steps: expected one of them, found both")
        if not wrong:
            if self.batch_size is not None and self.accumulate > self.batch_size:
                wrong.append(
                    f"accumulate: expected at most the batch size {self.batch_size}, "
                    f"found {self.accumulate}"
                )
            for name in _LISTS:
                value = getattr(self, name)
                if isinstance(value, list):
                    object.__setattr__(self, name, tuple(value))
        if wrong:
            raise UsageError(
                "training settings",
                expected="valid values",
                found=wrong[0] if len(wrong) == 1 else f"{len(wrong)} that are not",
                remedy="" if len(wrong) == 1 else "see the list",
                offenders=wrong if len(wrong) > 1 else (),
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        found = asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


@dataclass(frozen=True)
class _Rule:
    expected: str
    accepts: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _whole(least: int, most: float = math.inf, optional: bool = False) -> _Rule:
    limit = f"{least} to {most}" if most < math.inf else f"{least} or more"
    return _Rule(
        f"a whole number, {limit}",
        lambda v: (optional and v is None) or (_is_whole(v) and least <= v <= most),
    )


def _number(
    least: float = 0.0, most: float = math.inf, *, above: bool = False, optional: bool = False
) -> _Rule:
    limit = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
    return _Rule(
        f"a number above {least:g}" if above else f"a number {limit}",
        lambda v: (
            (optional and v is None)
            or (_is_number(v) and (least < v if above else least <= v) and v <= most)
        ),
    )


def _one_of(words: tuple[str, ...], optional: bool = False) -> _Rule:
    return _Rule(
        "one of " + ", ".join(words),
        lambda v: (optional and v is None) or (isinstance(v, str) and v in words),
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, str) and v for v in value)


_ANY_NUMBER = _Rule("a number other than 0", lambda v: v is None or (_is_number(v) and v != 0))
_SWITCH = _Rule("true or false", lambda v: isinstance(v, bool))
_TEXT = _Rule("a word", lambda v: v is None or (isinstance(v, str) and bool(v)))
_NAMES = _Rule(
    "a name or a list of names",
    lambda v: v is None or (isinstance(v, str) and v != "") or _is_names(v),
)
_LISTS = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
_RULES: dict[str, _Rule] = {
    "n_frequency": _whole(1, optional=True),
    "n_frequency_pattern": _Rule(
        "names with whole numbers from 1",
        lambda v: (
            isinstance(v, Mapping)
            and all(isinstance(k, str) and _is_whole(n) and n > 0 for k, n in v.items())
        ),
    ),
    "scaling": _ANY_NUMBER,
    "entry_seed": _whole(0, 2**32 - 1),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": _Rule(
        "a list of whole numbers from 0",
        lambda v: (
            v is None or (isinstance(v, (tuple, list)) and all(_is_whole(n) and n >= 0 for n in v))
        ),
    ),
    "modules_to_save": _Rule("a list of names", lambda v: v is None or _is_names(v)),
    "bias": _one_of(BIASES),
    "init_weights": _Rule("true or false", lambda v: v is None or isinstance(v, bool)),
    "epochs": _number(above=True, optional=True),
    "steps": _whole(1, optional=True),
    "batch_size": _whole(1, optional=True),
    "accumulate": _whole(1),
    "learning_rate": _number(optional=True),
    "layer_rates": _one_of(LAYER_RATES),
    "head_learning_rate": _number(optional=True),
    "weight_decay": _number(),
    "spectrum_weight_decay": _number(),
    "warmup": _number(0, 1, optional=True),
    "schedule": _one_of(SCHEDULES, optional=True),
    "max_grad_norm": _number(optional=True),
    "seed": _whole(0, 2**32 - 1),
    "dtype": _one_of(DTYPES),
    "device": _TEXT,
    "threads": _whole(1, optional=True),
    "dropout": _SWITCH,
    "gradient_checkpointing": _SWITCH,
    "group_lengths": _SWITCH,
    "eval_every": _whole(1, optional=True),
    "patience": _whole(1, optional=True),
    "metric": _TEXT,
    "keep": _one_of(KEEP),
    "eval_share": _Rule("a number from 0 to below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "max_length": _whole(1, optional=True),
    "max_train_rows": _whole(1, optional=True),
}
SETTING_NAMES = tuple(f.name for f in fields(TrainSettings))
