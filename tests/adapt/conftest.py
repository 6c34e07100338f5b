"""Small models of real architectures, and PEFT's own adapters on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TINY

MakeModel = Callable[[str], nn.Module]


def _make(kind: str) -> nn.Module:
    """A model of the root's `TINY` with three layers, or one that is here only."""
    import transformers

    torch.manual_seed(0)
    if kind == "sequential":
        layers = (nn.Linear(12, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 5, bias=False))
        return nn.Sequential(*layers).eval()
    small = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "vocab_size": 60}
    more = {
        "distilbert-cls": ("DistilBertConfig", "DistilBertForSequenceClassification", "", small)
    }
    config, name, _, fields = (TINY | more)[kind]
    three = {"gpt2": {"n_layer": 3}, "t5": {}, "distilbert-cls": {}}
    fields = fields | {"vocab_size": 60} | three.get(kind, {"num_hidden_layers": 3})
    if kind == "bert-token":
        fields |= {"num_labels": 4}
    made: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**fields))
    return made.eval()


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make(kind)`: a fresh small model, seeded, in eval mode."""
    made: dict[str, nn.Module] = {}

    def make(kind: str) -> nn.Module:
        if kind not in made:
            made[kind] = _make(kind)
        return copy.deepcopy(made[kind])

    return make


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Token ids (3, 9) that every small model knows."""
    return torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(5))


def peft_model(model: nn.Module, seed: int = 3, **fields: Any) -> Any:
    """PEFT's model with a random adapter drawn from `seed`."""
    from peft import FourierFTConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, FourierFTConfig(**fields)).eval()


@pytest.fixture(scope="session")
def with_peft() -> Callable[..., Any]:
    """`with_peft(model, seed=3, **fields)`: the model wrapped by PEFT itself."""
    return peft_model
