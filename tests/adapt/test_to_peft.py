"""An adapter trained here, captured and unpacked, is one that PEFT loads and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fourierft_export import capture, from_peft, to_peft
from tests.adapt.helpers import MakeModel, adapted

CASES: list[tuple[str, dict[str, Any]]] = [
    ("bert-cls", {"task_type": "SEQ_CLS", "n_frequency_pattern": {"query": 7}}),
    ("bert-cls", {"task_type": "SEQ_CLS", "bias": "fourier_only"}),
    ("bert-cls", {"bias": "all", "modules_to_save": ["pooler"]}),
    ("roberta-cls", {"task_type": "SEQ_CLS"}),
    ("distilbert-cls", {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "lin1"]}),
    ("llama", {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear", "bias": "fourier_only"}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_peft_loads_what_was_trained_here(
    make_model: MakeModel,
    tokens: Tensor,
    tmp_path: Path,
    kind: str,
    fields: dict[str, Any],
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file

    model = adapted(make_model(kind), **fields)
    bundle = capture(model)
    directory = to_peft(bundle, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(make_model(kind), directory).eval()
    expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=2e-6)

    again = tmp_path / "again"
    theirs.save_pretrained(again)
    before = load_file(directory / "adapter_model.safetensors")
    after = load_file(again / "adapter_model.safetensors")
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    back = from_peft(again)
    assert back.spectra.keys() == bundle.spectra.keys()
