"""Faults that users of PEFT, transformers and ONNX Runtime reported: judged by PEFT's own outputs."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fourierft_export as ff

TOKENS = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=TOKENS, **more).logits)


def edit_config(base: Path, *dropped: str, **changed: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in dropped}
    (base / "config.json").write_text(json.dumps(kept | changed))


def keep_lm_head_alone(base: Path) -> None:
    """What safetensors' save_model leaves of two tied embeddings: the alphabetically first name."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def as_published(base: Path) -> None:
    """T5's published configs lack both fields; False there means "do not scale the outputs"."""
    edit_config(base, "tie_word_embeddings", "scale_decoder_outputs")


def as_version_1_1(base: Path) -> None:
    """T5 1.1 has an output embedding of its own, and does not scale the decoder's outputs."""
    edit_config(base, "scale_decoder_outputs", tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["shared.weight"].flip(0).contiguous()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


LM_HEAD, SAVED = {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}
# The base's kind; what is changed in its folder; PEFT's fields; tensors that the output gets.
HEADS: dict[str, tuple[str, Callable[[Path], None] | None, dict[str, Any], set[str]]] = {
    "embed_out adapted": ("neox", None, LM_HEAD, set()),
    "embed_out saved": ("neox", None, {"target_modules": ["dense"]} | SAVED, set()),
    "T5, lm_head saved": ("t5", as_published, {"target_modules": ["q"]} | SAVED,
                          {"lm_head.weight"}),
    "T5, lm_head adapted": ("t5", as_published, LM_HEAD, {"lm_head.weight"}),
    "T5 1.1, lm_head saved": ("t5", as_version_1_1, {"target_modules": ["q"]} | SAVED, set()),
    "tied, stored as lm_head, adapted": ("llama-tied", keep_lm_head_alone, LM_HEAD,
                                         {"model.embed_tokens.weight"}),
    "tied, stored as lm_head, saved": (
        "llama-tied", keep_lm_head_alone, {"target_modules": ["q_proj"]} | SAVED,
        {"model.embed_tokens.weight"}),
    "tied, stored as lm_head, embedding saved": (
        "llama-tied", keep_lm_head_alone,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"model.embed_tokens.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("row", HEADS)
def test_output_embeddings(
    row: str, tiny_base: Any, tiny_adapter: Any, load_peft: Any, tmp_path: Path
) -> None:
    kind, change, fields, added = HEADS[row]
    base = Path(shutil.copytree(tiny_base(kind), tmp_path / "base"))
    if change is not None:
        change(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights
        adapter = tiny_adapter(kind, **fields, scaling=60.0)
        peft = load_peft(base, adapter)
    expected = logits(peft)
    with peft.disable_adapter():
        assert (logits(peft) - expected).abs().max() > 1e-4
    report = ff.merge_checkpoint(base, ff.from_peft(adapter, base), tmp_path / "out")
    assert set(report.added) == added
    model_class = type(peft.base_model.model)
    model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = logits(model.eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
