"""Bundles by hand: written from FORMAT.md, without the package's writer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Tensor = tuple[str, str, list[int], bytes]
Craft = Callable[..., bytes]

# What the crafted bundle says when nobody asks for anything else: two unbound layers, n = 4.
SPEC: dict[str, Any] = {
    "version": 1,
    "seed": 777,
    "scaling": 150.0,
    "groups": [{"layers": ["block.{0-1}.lin"], "n_frequency": 4}],
}


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest_of(text: str, tensors: Sequence[Tensor]) -> str:
    table = canonical([[name, dtype, shape] for name, dtype, shape, _ in tensors])
    payload = b"".join(data for *_, data in tensors)
    return hashlib.sha256(text.encode() + b"\n" + table.encode() + b"\n" + payload).hexdigest()


def container(entries: Mapping[str, Any] | str, payload: bytes) -> bytes:
    """A safetensors file of this header (as JSON or as text) and this payload."""
    text = entries if isinstance(entries, str) else json.dumps(entries, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + payload


@pytest.fixture(scope="session")
def craft() -> Craft:
    """`craft(spec=..., tensors=..., text=..., digest=..., **fields)`: the bytes of a bundle file.

    `fields` replace fields of the usual spec (None: left out); `text` is the metadata itself.
    `digest` replaces the right hash. A tensor is (name, dtype, shape, bytes), put in the format's
    order unless `as_given`.
    """

    def make(
        *,
        text: str | None = None,
        tensors: Sequence[Tensor] | None = None,
        digest: str | None = None,
        as_given: bool = False,
        **fields: Any,
    ) -> bytes:
        spec = {key: value for key, value in {**SPEC, **fields}.items() if value is not None}
        text = canonical(spec) if text is None else text
        if tensors is None:
            values = np.arange(8, dtype="<f4").tobytes()
            tensors = [("fourierft.spectrum.0", "F32", [2, 4], values)]
        if not as_given:
            widths = {"U8": 1, "BOOL": 1, "F4": 0.5, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F64": 8}
            tensors = sorted(tensors, key=lambda t: (-widths.get(t[1], 4), t[0]))
        metadata = {"fourierft": text, "sha256": digest or digest_of(text, tensors)}
        entries: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        for name, dtype, shape, data in tensors:
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return container(entries, b"".join(data for *_, data in tensors))

    return make


@pytest.fixture(scope="session")
def spectrum_of() -> Callable[..., Tensor]:
    """`spectrum_of([L, n], dtype="F32", group=0)`: a stack of spectra with distinct values."""

    def make(shape: list[int], dtype: str = "F32", group: int = 0, start: int = 0) -> Tensor:
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
        values = np.arange(start, start + prod(shape), dtype=kind).tobytes()
        return (f"fourierft.spectrum.{group}", dtype, shape, values)

    return make


@pytest.fixture(scope="session")
def raw_container() -> Callable[..., bytes]:
    """`raw_container(header, payload)`: a safetensors file of any header, as JSON or as text."""
    return container


# --- small real models with adapters that PEFT made ----------------------------------------------


def tiny_model(kind: str, task: str) -> Any:
    """A seeded model of two layers, as transformers builds it."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    if kind == "bert":
        config = tf.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
            num_labels=3,
        )
        return getattr(tf, {"SEQ_CLS": "BertForSequenceClassification"}.get(task, "BertModel"))(
            config
        )
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                n_layer=2,
                n_head=2,
                n_embd=32,
                vocab_size=64,
                n_positions=32,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            max_position_embeddings=32,
            tie_word_embeddings=kind == "tied-llama",
        )
    )


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """`make(kind, task_type, dtype="float32", **fields)`: (base directory, PEFT adapter directory).

    kind: bert, llama, tied-llama or gpt2. fields: PEFT's FourierFTConfig; n_frequency is 24 unless
    given. Directories are shared: do not write into them.
    """
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str, task: str, dtype: str = "float32", **fields: Any) -> tuple[Path, Path]:
        key = repr((kind, task, dtype, sorted(fields.items())))
        if key in made:
            return made[key]
        import torch
        from peft import FourierFTConfig, get_peft_model

        base = tmp_path_factory.mktemp(f"{kind}_base")
        tiny_model(kind, task).to(getattr(torch, dtype)).save_pretrained(base)
        model = open_tiny(base, task, dtype)
        config = FourierFTConfig(task_type=task, **{"n_frequency": 24, **fields})
        torch.manual_seed(1)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=dtype == "float32")
        with torch.no_grad():  # as after training: biases and saved modules are not the base's
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "spectrum" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapter = tmp_path_factory.mktemp(f"{kind}_adapter")
        adapted.save_pretrained(adapter)
        made[key] = base, adapter
        return base, adapter

    return make


def open_tiny(base: Path, task: str, dtype: str = "float32") -> Any:
    import torch
    import transformers as tf

    auto = {
        "SEQ_CLS": tf.AutoModelForSequenceClassification,
        "CAUSAL_LM": tf.AutoModelForCausalLM,
    }.get(task, tf.AutoModel)
    return auto.from_pretrained(base, dtype=getattr(torch, dtype))


@pytest.fixture(scope="session")
def peft_model() -> Callable[..., Any]:
    """`load(base, adapter_dir, task, dtype="float32")`: PEFT's own model, in eval mode."""

    def load(base: Path, adapter: Path, task: str, dtype: str = "float32") -> Any:
        from peft import PeftModel

        model = open_tiny(base, task, dtype)
        own = dtype == "float32"
        return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=own).eval()

    return load


@pytest.fixture(scope="session")
def tiny_outputs() -> Callable[[Any], Any]:
    """`outputs(model)`: its first output on fixed tokens, as a torch tensor."""

    def outputs(model: Any) -> Any:
        import torch

        ids = torch.arange(20).reshape(2, 10) * 7 % 63 + 1
        with torch.no_grad():
            return model(input_ids=ids)[0]

    return outputs
