from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from fourierft_export import FourierFTConfig
from fourierft_export.errors import UsageError


def test_fields_and_defaults_are_pefts() -> None:
    from peft import FourierFTConfig as PeftConfig

    theirs = PeftConfig()
    for field in dataclasses.fields(FourierFTConfig):
        assert getattr(FourierFTConfig(), field.name) == getattr(theirs, field.name), field.name
    own = {f.name for f in dataclasses.fields(PeftConfig)}
    own -= {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"}
    own -= {"revision", "inference_mode"}
    assert {f.name for f in dataclasses.fields(FourierFTConfig)} == own


def test_is_frozen_copied_and_pickled() -> None:
    config = FourierFTConfig(target_modules=["q", "v"], n_frequency_pattern={"q": 5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_frequency = 3  # type: ignore[misc]
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_lists_and_numpy_integers_become_plain() -> None:
    config = FourierFTConfig(
        n_frequency=np.int64(7),  # type: ignore[arg-type]
        target_modules={"v", "q"},
        modules_to_save=["head"],
        layers_to_transform=range(3),  # type: ignore[arg-type]
    )
    assert type(config.n_frequency) is int
    assert config.target_modules == ("q", "v")
    assert config.modules_to_save == ("head",)
    assert config.layers_to_transform == (0, 1, 2)


def test_the_callers_pattern_is_not_shared() -> None:
    pattern = {"q": 5}
    config = FourierFTConfig(n_frequency_pattern=pattern)
    pattern["q"] = 6
    assert config.n_frequency_pattern == {"q": 5}


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_seeds_at_the_ends_are_fine(seed: int) -> None:
    assert FourierFTConfig(random_loc_seed=seed).random_loc_seed == seed


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n_frequency": 0}, "n_frequency"),
    ({"n_frequency": True}, "n_frequency"),
    ({"n_frequency": 1.5}, "n_frequency"),
    ({"random_loc_seed": -1}, "random_loc_seed"),
    ({"random_loc_seed": 2**32}, "random_loc_seed"),
    ({"random_loc_seed": None}, "random_loc_seed"),
    ({"scaling": float("nan")}, "scaling"),
    ({"scaling": "150"}, "scaling"),
    ({"bias": "lora_only"}, "bias"),
    ({"init_weights": 1}, "init_weights"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": [1]}, "target_modules"),
    ({"target_modules": "(q"}, "target_modules"),
    ({"exclude_modules": "*"}, "exclude_modules"),
    ({"modules_to_save": "head"}, "modules_to_save"),
    ({"n_frequency_pattern": {"q": 0}}, "n_frequency_pattern"),
    ({"n_frequency_pattern": {"(": 3}}, "n_frequency_pattern"),
    ({"layers_to_transform": -1}, "layers_to_transform"),
    ({"layers_to_transform": ["a"]}, "layers_to_transform"),
    ({"layers_pattern": "h"}, "layers_pattern"),
    ({"layers_pattern": "(", "layers_to_transform": 1}, "layers_pattern"),
    ({"target_modules": "q", "layers_to_transform": 1}, "layers_to_transform"),
    ({"target_modules": "all-linear", "layers_to_transform": 1}, "layers_to_transform"),
    (
        {"target_modules": "q", "layers_pattern": "h", "layers_to_transform": 1},
        "layers_pattern",
    ),
    ({"task_type": 3}, "task_type"),
]


@pytest.mark.parametrize(("fields", "culprit"), WRONG)
def test_wrong_fields_are_named(fields: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UsageError) as caught:
        FourierFTConfig(**fields)
    assert any(line.startswith(culprit) for line in caught.value.offenders)


def test_all_that_is_wrong_is_reported_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        FourierFTConfig(n_frequency=0, random_loc_seed=-1, bias="some")
    assert len(caught.value.offenders) == 3
    assert caught.value.exit_code == 2


def test_combinations_that_peft_refuses_are_refused() -> None:
    from peft import FourierFTConfig as PeftConfig

    for fields in (
        {"target_modules": "q", "layers_to_transform": [1]},
        {"target_modules": "q", "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_pattern": "h"},
    ):
        with pytest.raises(ValueError, match="layers"):
            PeftConfig(**fields)
        with pytest.raises(UsageError):
            FourierFTConfig(**fields)  # type: ignore[arg-type]
