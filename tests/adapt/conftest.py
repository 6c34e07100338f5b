"""Small models of real architectures, and PEFT's own adapters on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

MakeModel = Callable[[str], nn.Module]


def _make(kind: str) -> nn.Module:
    import transformers as tf

    bert = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    }
    llama = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    }
    gpt2 = {"n_layer": 3, "n_head": 2, "n_embd": 32, "vocab_size": 60, "n_positions": 32}
    gpt2 |= {"bos_token_id": 0, "eos_token_id": 0}
    makers: dict[str, Callable[[], nn.Module]] = {
        "bert": lambda: tf.BertModel(tf.BertConfig(**bert)),
        "bert-cls": lambda: tf.BertForSequenceClassification(tf.BertConfig(**bert, num_labels=3)),
        "bert-token": lambda: tf.BertForTokenClassification(tf.BertConfig(**bert, num_labels=4)),
        "bert-qa": lambda: tf.BertForQuestionAnswering(tf.BertConfig(**bert)),
        "roberta-cls": lambda: tf.RobertaForSequenceClassification(
            tf.RobertaConfig(**bert, num_labels=3)
        ),
        "distilbert-cls": lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=60)
        ),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama)),
        "llama-tied": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**llama, tie_word_embeddings=True)
        ),
        "llama-cls": lambda: tf.LlamaForSequenceClassification(
            tf.LlamaConfig(**llama, num_labels=3, pad_token_id=0)
        ),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)),
        "t5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=60)
        ),
        "sequential": lambda: nn.Sequential(
            nn.Linear(12, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 5, bias=False)
        ),
    }
    torch.manual_seed(0)
    return makers[kind]().eval()


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
