"""Small models with PEFT adapters, and adapted models made by the definition alone, for planting.

Nothing here goes through the package's merge or export: entries come from torch.randperm and the
delta from torch.fft, so that what is planted is known from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import fourierft_export as ff
from fourierft_export.spectral.entries import spectral_entries

HIDDEN, LABELS, SCALING, SEED, N = 32, 3, 4.0, 777, 60


class Adapted(NamedTuple):
    """A base directory, a PEFT adapter on it, and the same adapter as a bundle."""

    base: Path
    adapter: Path
    bundle: Any


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """A bare BERT encoder of 2 layers, with an adapter and head for 3 labels made by PEFT."""
    from peft import FourierFTConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("classifier")
    config = BertConfig(
        vocab_size=120,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(out / "base")
    model = AutoModelForSequenceClassification.from_pretrained(out / "base", num_labels=LABELS)
    model.classifier.bias.data.normal_()
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    fourier = FourierFTConfig(**fields, n_frequency=N, scaling=SCALING, random_loc_seed=SEED)
    get_peft_model(model, fourier).save_pretrained(out / "adapter")
    return Adapted(out / "base", out / "adapter", ff.from_peft(out / "adapter", base=out / "base"))


def adapted_model(adapted: Adapted, fault: str = "", scaling: float = SCALING) -> Any:
    """The classifier with its adapter added as the paper defines it, or with a planted fault."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(99)
    model = AutoModelForSequenceClassification.from_pretrained(adapted.base, num_labels=LABELS)
    for name, value in load_file(adapted.adapter / "adapter_model.safetensors").items():
        path = name.removeprefix("base_model.model.")
        if not path.endswith(".fourierft_spectrum"):
            value = torch.randn_like(value) if fault == "another head" else value
            if fault != "head dropped":
                model.get_parameter(path).data = value * (1 + 0.01 * (fault == "head * 1.01"))
            continue
        owner = path.removesuffix(".fourierft_spectrum")
        weight = model.get_submodule(owner).weight
        value = torch.randn_like(value) if fault == "another adapter" else value
        value = value.bfloat16().float() if fault == "spectrum rounded" else value
        rows, columns = weight.shape
        offset = {"seed + 1": 1, "seed + 5000": 5000}.get(fault, 0)
        draw = torch.Generator().manual_seed(SEED + offset)
        picks = torch.randperm(rows * columns, generator=draw)[: len(value)]
        if fault == "entry rule":
            rule = spectral_entries(SEED, (rows, columns), len(value), "r64")
            picks = torch.from_numpy(rule[:, 0] * columns + rule[:, 1])
        dense = torch.zeros(rows * columns, dtype=torch.complex128)
        dense[picks] = value.to(torch.complex128)
        delta = torch.fft.ifft2(dense.reshape(rows, columns)).real * scaling
        last = path.startswith("bert.encoder.layer.1.attention.self.value")
        delta = {
            "adapter zeroed": delta * 0,
            "layer left out": delta * (not last),
            "layer twice": delta * (1 + last),
            "delta transposed": delta.T,
            "scaling * 1.01": delta * 1.01,
        }.get(fault, delta)
        if fault == "rounded" or (fault == "layer rounded" and last):
            delta = (weight.data.double() + delta).bfloat16().double() - weight.data.double()
        if fault == "another base" and last:
            weight.data += 0.05 * torch.randn_like(weight)
        if fault == "base rounded":
            weight.data = weight.data.bfloat16().float()
        weight.data = (weight.data.double() + delta).float()
        if fault == "layer added" and last:
            model.get_submodule(owner.replace("value", "key")).weight.data += delta.float()
    if fault == "another embedding":
        model.bert.embeddings.word_embeddings.weight.data *= 1.05
    return model.eval()


@pytest.fixture(scope="session")
def plant(classifier: Adapted, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`plant(fault="", dtype=None)`: a merged directory of the classifier."""
    made: dict[tuple[str, Any], Path] = {}

    def directory(fault: str = "", dtype: torch.dtype | None = None) -> Path:
        if (fault, dtype) not in made:
            out = tmp_path_factory.mktemp("merged")
            adapted_model(classifier, fault).to(dtype or torch.float32).save_pretrained(out)
            made[fault, dtype] = out
        return made[fault, dtype]

    return directory


@pytest.fixture(scope="session")
def clean_onnx(classifier: Adapted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clean adapted classifier, exported by torch.onnx itself."""
    path = tmp_path_factory.mktemp("onnx") / "clean.onnx"
    ids = torch.arange(32).reshape(2, 16) + 1
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    torch.onnx.export(
        adapted_model(classifier),
        (),
        path,
        kwargs={
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": ids * 0,
        },
        input_names=names,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(names, axes),
        dynamo=True,
        verbose=False,
        external_data=False,
    )
    return path


@pytest.fixture
def plant_onnx(classifier: Adapted, clean_onnx: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`plant_onnx(fault)`: the clean file with the values of its initializers exchanged."""

    def file(fault: str) -> Path:
        right = dict(adapted_model(classifier).named_parameters())
        wrong = dict(adapted_model(classifier, fault).named_parameters())
        swaps = [
            (value.detach().numpy(), wrong[name].detach().numpy())
            for name, value in right.items()
            if not torch.equal(value, wrong[name])
        ]
        path = tmp_path / "planted.onnx"
        assert exchange(clean_onnx, path, swaps) == len(swaps) > 0
        return path

    return file


def exchange(source: Path, out: Path, swaps: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Write `source` with initializers replaced that hold one of the arrays, or its transpose."""
    import onnx
    from onnx import numpy_helper

    model, done = onnx.load(source), 0
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        for old, new in swaps:
            for a, b in ((old, new), (old.T, new.T)):
                if value.shape == a.shape and (value == a).all():
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(b), tensor.name))
                    done += 1
                    break
            else:
                continue
            break
    onnx.save(model, out)
    return done


@pytest.fixture(scope="session")
def padded_ids() -> Mapping[str, Any]:
    """Token ids of 12 rows, padded on the right to 20."""
    draw = np.random.default_rng(3)
    lengths = draw.integers(3, 21, size=12)
    mask = (np.arange(20) < lengths[:, None]).astype(np.int64)
    return {
        "input_ids": draw.integers(1, 120, size=(12, 20)) * mask,
        "attention_mask": mask,
        "token_type_ids": np.zeros((12, 20), np.int64),
    }


@pytest.fixture(scope="session")
def make_adapted(classifier: Adapted) -> Callable[..., Any]:
    """`make_adapted(fault="", scaling=...)`: the adapted classifier as a torch model."""
    return partial(adapted_model, classifier)
