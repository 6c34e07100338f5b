"""The files by which onnxruntime-genai runs an exported causal model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model_parts import CachedModel

CONFIG = "genai_config.json"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def list_genai_files(folder: Path, base: Path) -> list[Path]:
    """The files that onnxruntime-genai needs in the graph's folder; the first is its config."""
    tokenizer = (name for name in _TOKENIZER if (base / name).is_file())
    return [folder / name for name in (CONFIG, *tokenizer)]


def write_genai_files(folder: Path, graph: str, model: CachedModel, base: Path) -> None:
    """Writes the config of a graph of this file name, and copies the tokenizer of `base`."""
    config, *tokenizer = list_genai_files(folder, base)
    text = json.dumps(describe_for_genai(graph, model), indent=2) + "\n"
    config.write_text(text, encoding="utf-8")
    for target in tokenizer:
        shutil.copyfile(base / target.name, target)


def describe_for_genai(filename: str, model: CachedModel) -> dict[str, Any]:
    """The content of genai_config.json for a graph that lies beside it.

    The model type is genai's generic "decoder", so that families that it does not know run, too.
    """
    config = model.config.get_text_config()
    end = config.eos_token_id
    first_end = end[0] if isinstance(end, list) and end else end
    pad = first_end if config.pad_token_id is None else config.pad_token_id
    keys, _ = model.past[0]
    names = {name: name for name in model.input_names() if "." not in name}
    decoder = {
        "filename": filename,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(model.past),
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": keys.shape[1],
        "head_size": keys.shape[3],
        "session_options": {"provider_options": []},
        "inputs": names
        | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
        "outputs": {"logits": "logits"}
        | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
    }
    length = getattr(config, "max_position_embeddings", None) or 2048
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": config.bos_token_id or 0,
            "eos_token_id": 0 if end is None else end,
            "pad_token_id": pad or 0,
            "vocab_size": config.vocab_size,
            "context_length": length,
            "decoder": decoder,
        },
        "search": {"max_length": length, "past_present_share_buffer": False},
    }
