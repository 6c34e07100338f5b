"""Settings: checked at once, from one file, with defaults that follow from shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from fourierft_export.errors import BadInputError, FileAccessError, UsageError
from fourierft_export.spectral.delta import reference_delta
from fourierft_export.spectral.entries import spectral_entries
from fourierft_export.train import defaults
from fourierft_export.train.defaults import LayerSize
from fourierft_export.train.schedule import rate_factor
from fourierft_export.train.settings import _RULES, SETTING_NAMES, TrainSettings
from fourierft_export.train.toml_file import read_settings

SIZES = {
    "query": LayerSize((96, 64), 200),
    "value": LayerSize((64, 64), 200),
    "up": LayerSize((160, 48), 300),
    "wide": LayerSize((48, 160), 77),
}


def delta_rms(size: LayerSize, scaling: float, rms: float, seed: int = 0) -> float:
    """The root mean square of a real delta_W, from random coefficients of a given size."""
    spectrum = rms * np.random.default_rng(seed).standard_normal(size.n_frequency)
    entries = spectral_entries(5, size.shape, size.n_frequency)
    return float(np.sqrt((reference_delta(spectrum, entries, size.shape, scaling) ** 2).mean()))


def test_every_field_has_a_rule() -> None:
    assert set(_RULES) == set(SETTING_NAMES)


def test_all_that_is_wrong_is_listed() -> None:
    with pytest.raises(UsageError) as caught:
        TrainSettings(
            n_frequency=0,
            scaling=math.nan,
            epochs=-1,
            schedule="sideways",
            dtype="int8",
            target_modules=["q", 3],  # type: ignore[list-item]
            warmup=1.5,
            seed=True,
            n_frequency_pattern={"x": 0},
        )
    assert [line.split(":")[0] for line in caught.value.offenders] == [
        "n_frequency",
        "n_frequency_pattern",
        "scaling",
        "target_modules",
        "epochs",
        "warmup",
        "schedule",
        "seed",
        "dtype",
    ]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"epochs": 1, "steps": 5}, "expected one of them, found both"),
        ({"batch_size": 4, "accumulate": 5}, "expected at most the batch size 4, found 5"),
        ({"eval_share": 1}, "from 0 to below 1, found 1"),
        ({"max_grad_norm": -1.0}, "of at least 0, found -1.0"),
        ({"scaling": 0}, "a number other than 0"),
        ({"bias": "some"}, "one of none, all, fourier_only"),
    ],
)
def test_one_problem_is_told_in_the_summary(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        TrainSettings(**wrong)  # type: ignore[arg-type]
    assert caught.value.offenders == ()


def test_settings_are_json_and_lists_become_tuples() -> None:
    made = TrainSettings(target_modules=["q", "v"], layers_to_transform=[0, 2])
    assert made.target_modules == ("q", "v")
    found = json.loads(json.dumps(made.to_dict()))
    assert found["target_modules"] == ["q", "v"]
    assert TrainSettings(**found) == made


def test_a_file_of_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        'learning-rate = 0.1\nepochs = 2\ntarget_modules = ["q"]\n[n_frequency_pattern]\nq = 5\n'
    )
    found = read_settings(path, SETTING_NAMES)
    assert found == {
        "learning_rate": 0.1,
        "epochs": 2,
        "target_modules": ["q"],
        "n_frequency_pattern": {"q": 5},
    }
    assert TrainSettings(**found).n_frequency_pattern == {"q": 5}


def test_unknown_settings_are_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("lerning_rate = 0.1\nzzz = 1\nseed = 1\n")
    with pytest.raises(UsageError) as caught:
        read_settings(path, SETTING_NAMES)
    assert caught.value.offenders == (
        "lerning_rate: no such setting; did you mean learning_rate?",
        "zzz: no such setting",
    )
    kinds = {"data": str, "pack": bool, "text_column": list}
    path.write_text('data = ["a.tsv"]\npack = "no"\ntext_column = ["a", 1]\n')
    with pytest.raises(UsageError) as caught:
        read_settings(path, kinds, kinds)
    assert caught.value.offenders == (
        "data: expected a text, found ['a.tsv']",
        "pack: expected true or false, found 'no'",
        "text_column: expected a text or a list of texts, found ['a', 1]",
    )
    path.write_text('data = "a.tsv"\npack = false\ntext_column = "a"\n')
    assert read_settings(path, kinds, kinds)["text_column"] == "a"
    path.write_text("max-length = 1\nmax_length = 2\n")
    with pytest.raises(UsageError, match="max_length: given twice"):
        read_settings(path, SETTING_NAMES)


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    for content in (b"seed = \n", b"\xff\xfe", b"seed = " + b"9" * 5000, b"a = " + b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(BadInputError, match="a TOML file"):
            read_settings(path, SETTING_NAMES)
    with pytest.raises(FileAccessError):
        read_settings(tmp_path / "absent.toml", SETTING_NAMES)


def test_the_default_scaling_gives_the_median_layer_its_gain() -> None:
    scaling = defaults.scaling(SIZES)
    gains = {
        name: delta_rms(size, scaling, 1.0) * math.sqrt(size.shape[1])
        for name, size in SIZES.items()
    }
    assert median(gains.values()) == pytest.approx(defaults.GAIN, rel=0.1)


def test_layers_of_all_shapes_move_alike() -> None:
    """One step of AdamW moves each coefficient by its rate; so does delta_W, against 1/sqrt(N)."""
    scaling = defaults.scaling(SIZES)
    rates = defaults.spectrum_rates(SIZES, scaling)
    moves = {
        name: delta_rms(size, scaling, rates[name]) * math.sqrt(size.shape[1])
        for name, size in SIZES.items()
    }
    expected = defaults.LEARNING_RATE * defaults.GAIN
    assert moves == {name: pytest.approx(expected, rel=0.12) for name in SIZES}
    assert max(rates.values()) > 1.5 * min(rates.values())


def test_a_scaling_of_the_users_own_changes_the_rate_and_not_the_movement() -> None:
    usual = defaults.spectrum_rates(SIZES, defaults.scaling(SIZES))
    tripled = defaults.spectrum_rates(SIZES, -3 * defaults.scaling(SIZES))
    assert tripled == {name: pytest.approx(rate / 3, rel=1e-12) for name, rate in usual.items()}


def test_longer_runs_learn_at_a_lower_rate() -> None:
    scaling = defaults.scaling(SIZES)
    usual = defaults.spectrum_rates(SIZES, scaling)
    longer = defaults.spectrum_rates(SIZES, scaling, steps=4 * defaults.STEPS)
    for name in SIZES:
        assert longer[name] == pytest.approx(usual[name] / 2, rel=1e-12)
    endless = defaults.typical_rate(10**9), defaults.typical_rate(1)
    assert endless == (defaults.LEARNING_RATE / 8, defaults.LEARNING_RATE * 3)
    given = defaults.spectrum_rates(SIZES, scaling, 0.1, steps=10**6)
    assert given == defaults.spectrum_rates(SIZES, scaling, 0.1)


def test_a_rate_of_the_users_own_is_the_median_layers() -> None:
    rates = defaults.spectrum_rates(SIZES, 10.0, 0.2)
    gains = {name: size.unit_gain for name, size in SIZES.items()}
    products = [rates[name] * gains[name] for name in SIZES]
    assert products == pytest.approx([0.2 * median(gains.values())] * 4, rel=1e-12)
    alike = {"a": SIZES["up"], "b": SIZES["up"]}
    assert set(defaults.spectrum_rates(alike, 10.0, 0.2).values()) == {0.2}
    same = defaults.spectrum_rates(SIZES, 10.0, 0.2, same=True)
    assert set(same.values()) == {0.2}


def test_the_default_n_fits_the_smallest_layer() -> None:
    assert defaults.n_frequency([(768, 768), (3072, 768)]) == defaults.N_FREQUENCY
    assert defaults.n_frequency([(768, 768), (16, 8)]) == 16 * 8 // defaults.FILL
    assert defaults.n_frequency([(1, 1)]) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule: str) -> None:
    factors = [rate_factor(s, 100, warmup=0.1, schedule=schedule) for s in range(100)]
    assert factors[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert factors[10] == 1.0
    assert all(factor > 0 for factor in factors)
    halfway = {"linear": 0.5, "cosine": 0.5, "constant": 1.0}[schedule]
    assert factors[55] == pytest.approx(halfway)
    quarter = {"linear": 0.25, "cosine": (1 - math.sqrt(0.5)) / 2, "constant": 1.0}[schedule]
    assert rate_factor(325, 400, warmup=0.25, schedule=schedule) == pytest.approx(quarter)
    assert rate_factor(0, 1, warmup=0.0, schedule=schedule) == 1.0
