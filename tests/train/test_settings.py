"""Settings are checked at once; the rules of the defaults hold for all shapes."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import fourierft_export as ff
from fourierft_export.errors import BadInputError, UsageError
from fourierft_export.train import defaults
from fourierft_export.train.defaults import LayerSize
from fourierft_export.train.epoch_batches import rate_factor
from fourierft_export.train.settings import DataSettings, kinds, options, read_settings
from fourierft_export.train.train import resolved

SIZES = {
    "a": LayerSize((384, 384), 1000),
    "b": LayerSize((768, 768), 500),
    "c": LayerSize((64, 4096), 2000),
}


def test_all_that_is_wrong_is_listed() -> None:
    wrong: dict[str, Any] = {
        "n_frequency": 0,
        "scaling": 0,
        "entry_seed": 2**32,
        "target_modules": [""],
        "layers_to_transform": [-1],
        "bias": "some",
        "init_weights": 1,
        "epochs": 0,
        "batch_size": True,
        "learning_rate": math.nan,
        "warmup": 1.5,
        "schedule": "step",
        "dtype": "int8",
        "eval_share": 1,
        "keep": None,
        "n_frequency_pattern": {"q": 0},
    }
    with pytest.raises(UsageError) as caught:
        ff.TrainSettings(**wrong)
    assert {line.partition(":")[0] for line in caught.value.offenders} == set(wrong)
    for one, message in (
        ({"budget": 9, "n_frequency": 1}, "budget, n_frequency: expected one of them"),
        ({"epochs": 1, "steps": 1}, "epochs, steps: expected one of them, found both"),
        ({"batch_size": 2, "accumulate": 3}, "accumulate: expected at most the batch size 2"),
        ({"warmup": -0.1}, "warmup: expected a number from 0 to 1, found -0.1"),
        ({"scaling": 0}, "scaling: expected a number other than 0, found 0"),
        ({"bias": "x"}, "bias: expected one of none, all, fourier_only, found 'x'"),
        ({"steps": 1.5}, "steps: expected a whole number of at least 1, found 1.5"),
        ({"epochs": 0}, "epochs: expected a number above 0, found 0"),
    ):
        with pytest.raises(UsageError, match=message):
            ff.TrainSettings(**one)  # type: ignore[arg-type]


def test_settings_are_json_and_lists_become_tuples() -> None:
    settings = ff.TrainSettings(target_modules=["a", "b"], modules_to_save="head")
    assert settings.target_modules == ("a", "b") and settings.modules_to_save == ("head",)
    assert ff.TrainSettings(target_modules="a|b").target_modules == "a|b"  # an expression
    assert settings.to_dict()["target_modules"] == ["a", "b"]
    assert DataSettings(text_column="x").text_column == ("x",)


def test_the_page_of_settings_has_each_with_its_default() -> None:
    found = {option.name: option for option in options()}
    hidden = {"n_frequency_pattern", "layers_to_transform"}
    assert set(found) == set(kinds(ff.TrainSettings) | kinds(DataSettings)) - hidden
    settings = resolved(ff.TrainSettings()).to_dict()
    for name, option in found.items():
        shown = option.help.partition("  [default: ")[2].rstrip("]")
        assert shown or name in ("model", "module", "task", "data", "output"), name
        if isinstance(settings.get(name), float | int) and not isinstance(settings[name], bool):
            assert float(shown) == settings[name]
        elif option.kind.choices and name in settings:
            assert shown == settings[name]
        # A whole phrase.
        assert option.help[0].isupper() and len(option.help.partition("  [")[0].split()) > 2, name


def test_a_file_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('model = "m"\nn-frequency = 7\ntext_column = ["a", "b"]\npack = true\n')
    assert read_settings(path) == {
        "model": "m", "n_frequency": 7, "text_column": ["a", "b"], "pack": True,
    }  # fmt: skip
    cases = {
        "epoch = 1": "epoch: no such setting; did you mean epochs?",
        "nonsense = 1": "nonsense: no such setting",
        "n-frequency = 1\nn_frequency = 2": "n_frequency: given twice",
        "data = 1": "data: expected a text, found 1",
        "pack = 'yes'": "pack: expected true or false, found 'yes'",
        "text_column = [1]": r"text_column: expected a text or a list of texts, found \[1\]",
    }
    for text, message in cases.items():
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_settings(path)
    for content in (b"a = ", b"\xff", b"x = " + b"[" * 3000, b"n = " + b"9" * 5000):
        path.write_bytes(content)
        with pytest.raises(BadInputError):
            read_settings(path)


def test_the_default_scaling_gives_the_median_layer_its_gain() -> None:
    scaling = defaults.scaling(SIZES)
    gains = [
        scaling * math.sqrt(size.n_frequency / 2) / (size.shape[0] * math.sqrt(size.shape[1]))
        for size in SIZES.values()
    ]
    assert median(gains) == pytest.approx(0.4, rel=1e-3)
    assert defaults.scaling({"a": SIZES["a"]}) == 134.6
    assert defaults.n_frequency([(384, 384), (64, 40)]) == 640
    assert defaults.n_frequency([(384, 384)]) == 1000
    assert defaults.n_frequency([(1, 1)]) == 1


def test_a_budget_is_spent_alike_but_for_small_layers() -> None:
    shapes = {"b": (100, 100), "a": (10, 10), "c": (100, 100)}
    assert defaults.spend(30, shapes) == {"a": 10, "b": 10, "c": 10}
    assert defaults.spend(100, shapes) == {"a": 25, "b": 37, "c": 37}
    assert defaults.spend(10**6, shapes) == {"a": 25, "b": 2500, "c": 2500}


def test_suggestions_for_shapes() -> None:
    found = ff.suggest([(384, 384)] * 12, steps=190)
    assert found.pop("learning_rate") == pytest.approx(0.15, rel=1e-3)
    assert found == {"n_frequency": 1000, "scaling": 134.6, "init_weights": True}
    few = ff.suggest([(384, 384)], 250)
    # Half the gain of n = 1000, made up by twice the scaling.
    assert few["scaling"] == pytest.approx(2 * 134.6, rel=1e-3)
    assert few["learning_rate"] == pytest.approx(0.15, rel=1e-3)
    with pytest.raises(UsageError, match="n_frequency: expected a whole number of at least 1"):
        ff.suggest([(384, 384)], 0)


def test_layers_of_all_shapes_move_alike() -> None:
    rates = defaults.spectrum_rates(SIZES, 50.0)
    moves = [rates[name] * 50.0 * size.unit_gain for name, size in SIZES.items()]
    assert moves == pytest.approx([defaults.LEARNING_RATE * 0.4] * 3)
    # A scaling of the user's own changes the rate and not the movement.
    other = defaults.spectrum_rates(SIZES, 100.0)
    assert [other[k] * 2 for k in SIZES] == pytest.approx([rates[k] for k in SIZES])
    typical = median(size.unit_gain for size in SIZES.values())
    own = defaults.spectrum_rates(SIZES, 50.0, 0.07)
    assert own["a"] == pytest.approx(0.07 * typical / SIZES["a"].unit_gain)
    assert set(defaults.spectrum_rates(SIZES, 50.0, 0.07, same=True).values()) == {0.07}


def test_longer_runs_learn_at_a_lower_rate() -> None:
    found = [defaults.typical_rate(steps) for steps in (1, 48, 190, 760, 10**6)]
    assert found == pytest.approx([0.45, 0.15 * math.sqrt(190 / 48), 0.15, 0.075, 0.15 / 8])
    assert defaults.typical_rate() == 0.15
    constant = [defaults.typical_rate(steps, "constant") for steps in (48, 10**6)]
    assert constant == pytest.approx([found[1] / 2, found[-1] / 2])


def test_schedules() -> None:
    for schedule in ("linear", "cosine", "constant"):
        settings = ff.TrainSettings(warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
        factors = [rate_factor(s, 50, settings) for s in range(50)]
        assert factors[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
        assert factors[5] == 1.0 and min(factors) > 0
        middle = {"linear": 1 - 20 / 45, "constant": 1.0}
        middle["cosine"] = 0.5 * (1 + math.cos(math.pi * 20 / 45))
        assert factors[25] == pytest.approx(middle[schedule])
