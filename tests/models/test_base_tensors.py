"""Bases on disk: module paths to tensor names, over prefixes, ties and layouts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fourierft_export.errors import BadInputError, BaseMismatchError
from fourierft_export.models.adapter_names_in_base import Bridge
from fourierft_export.models.base_tensors import open_base

MakeBase = Callable[..., Path]
QUERY = "encoder.layer.0.attention.self.query"


def matrix(out: int, into: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.arange(out * into).reshape(out, into).astype(dtype)


@pytest.fixture
def make_base(tmp_path: Path) -> MakeBase:
    """`make(tensors, **config)`: a model directory."""

    def make(tensors: Mapping[str, Any], **config: Any) -> Path:
        directory = tmp_path / str(len(os.listdir(tmp_path)))
        directory.mkdir()
        save_file(dict(tensors), directory / "model.safetensors")
        if config:
            (directory / "config.json").write_text(json.dumps(config), "utf-8")
        return directory

    return make


# --- prefixes ------------------------------------------------------------------------------------

PREFIXES = {
    "the same names": ("", ""),
    "the adapter has a prefix": ("bert.", ""),
    "the checkpoint has a prefix": ("", "bert."),
}


@pytest.mark.parametrize(("ours", "theirs"), PREFIXES.values(), ids=PREFIXES.keys())
def test_a_prefix_is_bridged(ours: str, theirs: str, make_base: MakeBase) -> None:
    weight = matrix(6, 4)
    base = open_base(make_base({f"{theirs}{QUERY}.weight": weight, "pooler.weight": matrix(2, 2)}))
    layer = base.layer(f"{ours}{QUERY}")
    assert layer.module == f"{ours}{QUERY}"
    assert layer.tensor == layer.own_tensor == f"{theirs}{QUERY}.weight"
    assert layer.shape == (6, 4)
    assert (layer.transposed, layer.dtype, layer.tied) == (False, "F32", False)
    assert base.weight(f"{ours}{QUERY}").tolist() == weight.tolist()


def test_the_prefix_that_fits_most_layers_is_taken(make_base: MakeBase) -> None:
    names = [f"encoder.{i}.q" for i in range(3)]
    stored = [*names, "a.encoder.0.q"]
    base = open_base(make_base({f"{n}.weight": matrix(2, 2) for n in stored}))
    assert base.bridge([f"bert.{n}" for n in names]) == Bridge(strip="bert")
    assert base.bridge(names) == Bridge()
    assert {x.tensor for x in base.layers(names).values()} == {f"{n}.weight" for n in names}


# --- layouts and ties ----------------------------------------------------------------------------


def test_conv1d_is_stored_transposed(make_base: MakeBase) -> None:
    tensors = {
        "transformer.h.0.attn.c_attn.weight": matrix(4, 12),
        "transformer.h.0.mlp.c_proj.weight": matrix(16, 4),
        "lm_head.weight": matrix(7, 4),
    }
    base = open_base(make_base(tensors, model_type="gpt2"))
    found = base.layers(["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "lm_head"])
    assert [(m.shape, m.transposed) for m in found.values()] == [
        ((12, 4), True),
        ((4, 16), True),
        ((7, 4), False),
    ]
    assert base.weight("transformer.h.0.attn.c_attn").shape == (4, 12)
    elsewhere = open_base(make_base({"h.0.c_proj.weight": matrix(3, 5)}, model_type="gpt_bigcode"))
    layer = elsewhere.layer("h.0.c_proj")
    assert (layer.shape, layer.transposed) == ((3, 5), False)


def test_without_a_config_nobody_knows_how_conv1d_is_stored(make_base: MakeBase) -> None:
    directory = make_base({"h.0.c_proj.weight": matrix(3, 5), "h.0.q.weight": matrix(3, 5)})
    for base in (open_base(directory), open_base(directory / "model.safetensors")):
        assert base.layer("h.0.q").shape == (3, 5)
        with pytest.raises(BaseMismatchError) as caught:
            base.layers(["h.0.c_proj", "h.0.q"])
        assert caught.value.offenders == (
            "h.0.c_proj: without a config.json it is unknown whether its weight is stored "
            "transposed",
        )


EMBED, HEAD = {"model.embed_tokens.weight": matrix(5, 3)}, {"lm_head.weight": matrix(5, 3)}


@pytest.mark.parametrize(
    ("tensors", "config", "tied", "tensor"),
    [
        (EMBED, {"tie_word_embeddings": True}, True, "model.embed_tokens.weight"),
        ({**EMBED, **HEAD}, {"tie_word_embeddings": True}, True, "lm_head.weight"),
        ({**EMBED, **HEAD}, {"tie_word_embeddings": False}, False, "lm_head.weight"),
        ({"wte.weight": matrix(5, 3)}, {}, True, "wte.weight"),
    ],
)
def test_ties(tensors: Any, config: Any, tied: bool, tensor: str, make_base: MakeBase) -> None:
    layer = open_base(make_base(tensors, **config)).layer("lm_head")
    assert (layer.tied, layer.tensor, layer.own_tensor) == (tied, tensor, "lm_head.weight")


def test_two_names_never_become_one_layer(make_base: MakeBase) -> None:
    """Without `bert`, both would be `x`: one of the two changes would be lost."""
    base = open_base(make_base({"x.weight": matrix(2, 2)}))
    with pytest.raises(BaseMismatchError) as caught:
        base.layers(["bert.x", "x"])
    assert [line.split(":")[0] for line in caught.value.offenders] == ["bert.x"]


# --- layers that are not there -------------------------------------------------------------------

BAD_LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "absent": ({}, "no tensor l.q.weight"),
    "absent, with a near name": ({"l.qq.weight": matrix(2, 2)}, "(near: l.qq.weight)"),
    "gptq": ({"l.q.qweight": matrix(2, 2, np.int32)}, "quantised"),
    "bitsandbytes int8": (
        {"l.q.weight": matrix(2, 2, np.int8), "l.q.SCB": matrix(2, 1)},
        "quantised: its weight l.q.weight is I8",
    ),
    "float8": ({"l.q.weight": matrix(2, 2, ml_dtypes.float8_e4m3fn)}, "is F8_E4M3"),
    "a vector": ({"l.q.weight": np.ones(3, np.float32)}, "has shape [3]"),
    "a convolution": ({"l.q.weight": np.ones((2, 2, 3, 3), np.float32)}, "has shape [2, 2, 3, 3]"),
}


@pytest.mark.parametrize(("tensors", "words"), BAD_LAYERS.values(), ids=BAD_LAYERS.keys())
def test_layers_that_are_no_float_matrices(
    tensors: dict[str, Any], words: str, make_base: MakeBase
) -> None:
    base = open_base(make_base({"l.k.weight": matrix(2, 2), **tensors}))
    with pytest.raises(BaseMismatchError) as caught:
        base.layers(["l.k", "l.q"])
    assert len(caught.value.offenders) == 1
    assert caught.value.offenders[0].startswith("l.q: ")
    assert words in caught.value.offenders[0]
    assert "1 of 2 layers" in caught.value.found


def test_near_names_are_looked_up_for_the_first_offenders_only(make_base: MakeBase) -> None:
    """A person reads twenty; among thousands of tensors each look-up would take a second."""
    experts = {
        f"model.layers.{i}.mlp.experts.{e}.up_proj.weight": matrix(1, 1)
        for i in range(20)
        for e in range(64)
    }
    names = [f"model.layers.{i}.mlp.expert.{e}.up_proj" for i in range(20) for e in range(64)]
    with pytest.raises(BaseMismatchError) as caught:
        open_base(make_base(experts)).layers(names)
    near = " (near: model.layers.0.mlp.experts.0.up_proj.weight)"
    assert [line.endswith(near) for line in caught.value.offenders] == [True] * 20 + [False] * 1260


# --- opening -------------------------------------------------------------------------------------


def test_a_single_file_is_a_base_without_a_config(make_base: MakeBase) -> None:
    directory = make_base({"l.q.weight": matrix(2, 3, np.float16)}, model_type="toy")
    base = open_base(directory / "model.safetensors")
    assert (base.config, base.model_type) == ({}, None)
    assert (base.layer("l.q").dtype, base.layer("l.q").shape) == ("F16", (2, 3))
    assert open_base(directory).model_type == "toy"
    assert open_base(make_base({"l.q.weight": matrix(2, 2)}, model_type=["x"])).model_type is None


@pytest.mark.parametrize("text", ["[]", "5", "{", '{"a":1,"a":2}', '{"model_type": NaN}'])
def test_bad_configs(text: str, make_base: MakeBase) -> None:
    directory = make_base({"l.q.weight": matrix(2, 2)})
    (directory / "config.json").write_text(text, "utf-8")
    with pytest.raises(BadInputError, match=r"config\.json"):
        open_base(directory)


@pytest.mark.parametrize("bare", [False, True])
def test_modules_that_transformers_renames_while_loading(
    bare: bool, tiny_model: Callable[[str], Any], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForImageClassification

    model = tiny_model("vit")
    (model.vit if bare else model).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    paths = [p for p, m in loaded.named_modules() if isinstance(m, torch.nn.Linear)][:-1]
    base = open_base(tmp_path)
    layers = base.layers(paths)
    assert len(paths) == 12
    assert not {f"{path}.weight" for path in paths} & set(base.tensors)
    for path in paths:
        there = base.checkpoint.read(layers[path].tensor)
        np.testing.assert_array_equal(there, loaded.get_parameter(f"{path}.weight").detach())
    bias = base.bridge(paths).to_base(f"{paths[0]}.bias")
    np.testing.assert_array_equal(
        base.checkpoint.read(bias), loaded.get_parameter(f"{paths[0]}.bias").detach()
    )
    with pytest.raises(BaseMismatchError, match="1 of 13 layers"):
        base.layers([*paths, "vit.layers.2.attention.q_proj"])


def test_a_config_of_endless_layers_is_not_built(tmp_path: Path) -> None:
    save_file(
        {"layers.0.mlp.fc1.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors"
    )
    for config in (
        {"num_hidden_layers": 1_000},
        {"num_hidden_layers": 1, "nested": {"num_hidden_layers": 1_000}},
    ):
        config |= {"architectures": ["ViTModel"], "model_type": "vit"}
        (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
        with pytest.raises(BaseMismatchError, match="1 of 1 layers"):
            open_base(tmp_path).layers(["layers.0.attention.q_proj"])
