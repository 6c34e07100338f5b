"""Faults that users of PEFT and transformers reported; PEFT's own outputs are what is right."""

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
from fourierft_export.errors import BadInputError, BaseMismatchError

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


def test_biases_of_a_saved_module_that_peft_stores_three_times(
    tiny_base: Any, tiny_adapter: Any, load_peft: Any, run_verb: Any, tmp_path: Path
) -> None:
    base, fields = tiny_base("bert-cls"), {"target_modules": ["query"], "bias": "all"}
    adapter = tiny_adapter("bert-cls", **fields, scaling=60.0)
    copies = [
        name for name in load_file(adapter / "adapter_model.safetensors") if "_module" in name
    ]
    assert len(copies) == 1
    bundle = tmp_path / "a.fourierft.safetensors"
    packed = run_verb("pack", adapter, "--base", base, "-o", bundle)
    assert f"{copies[0]} is a second copy and was left out" in packed.json["notes"]
    merged = tmp_path / "merged"
    run_verb("merge", "--base", base, "--bundle", bundle, "-o", merged)
    assert (
        load_file(merged / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    run_verb("unpack", bundle, "-o", tmp_path / "unpacked")
    expected = logits(load_peft(base, adapter))
    assert torch.equal(logits(load_peft(base, tmp_path / "unpacked")), expected)
    words = ("--bundle", bundle, "--peft", adapter, "--merged", merged)
    assert run_verb("validate", "--base", base, *words, "--samples", 4).code == 0


def test_an_adapter_that_lies_in_the_folder_of_its_base(
    tiny_base: Any, tiny_adapter: Any, run_verb: Any, tmp_path: Path
) -> None:
    """transformers would load it into the base, for every verb."""
    base = Path(shutil.copytree(tiny_base("llama"), tmp_path / "base"))
    other = tiny_adapter("llama", 1, target_modules=["k_proj"], scaling=60.0)
    shutil.copytree(other, base, dirs_exist_ok=True)
    adapter = tiny_adapter("llama", target_modules=["q_proj"], scaling=60.0)
    merged, graph = tmp_path / "merged", tmp_path / "merged.onnx"
    # A directory that PEFT saved is a bundle for every verb.
    words = ("--base", base, "--bundle", adapter)
    assert run_verb("merge", *words, "-o", merged).code == 0
    exported = run_verb("export", *words, "--mode", "merged", "-o", graph)
    assert f"{base} holds an adapter as well: it is not loaded" in exported.json["notes"]
    words = ("--bundle", adapter, "--peft", adapter, "--merged", merged, "--onnx", graph)
    plain = ("--base", tiny_base("llama"), *words, "--samples", 4)
    assert run_verb("validate", *plain).code == 0
    assert run_verb("validate", "--base", base, *words, "--samples", 4).code == 0


def test_default_is_the_adapter_in_the_folder_itself(
    tiny_base: Any, tiny_adapter: Any, run_verb: Any, tmp_path: Path
) -> None:
    adapter = tiny_adapter("llama", target_modules=["q_proj"])
    words = ("pack", adapter, "--base", tiny_base("llama"), "-o")
    assert run_verb(*words, tmp_path / "a.st", "--adapter", "default").code == 0
    assert run_verb(*words, tmp_path / "b.st", "--adapter", "other").code == 2


@pytest.mark.parametrize("part", ["fourierft_spectrum", "classifier.weight"])
def test_tensors_that_zero3_left_empty(part: str, tiny_adapter: Any, tmp_path: Path) -> None:
    adapter = Path(
        shutil.copytree(tiny_adapter("bert-cls", target_modules=["query"]), tmp_path / "a")
    )
    tensors = load_file(adapter / "adapter_model.safetensors")
    empty = [name for name in tensors if name.endswith(part)]
    save_file(
        tensors | {name: torch.empty(0) for name in empty}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(BadInputError, match=r"empty tensors, as DeepSpeed ZeRO-3") as error:
        ff.from_peft(adapter)
    assert len(error.value.offenders) == len(empty)


def test_an_adapter_trained_after_the_vocabulary_grew(
    tiny_model: Any, tiny_base: Any, load_peft: Any, tmp_path: Path
) -> None:
    """The message says what to do, and doing it gives PEFT's outputs."""
    from peft import FourierFTConfig, get_peft_model

    model = tiny_model("llama")
    torch.manual_seed(0)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "resized")
    config = FourierFTConfig(
        n_frequency=24, scaling=60.0, target_modules=["q_proj"], task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens", "lm_head"],
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BaseMismatchError) as error:
        ff.merge_checkpoint(tiny_base("llama"), tmp_path / "adapter", tmp_path / "out")
    assert all("resize_token_embeddings(70)" in line for line in error.value.offenders)
    ff.merge_checkpoint(tmp_path / "resized", tmp_path / "adapter", tmp_path / "out")
    expected = logits(load_peft(tmp_path / "resized", tmp_path / "adapter"))
    found = logits(type(model).from_pretrained(tmp_path / "out").eval())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Translator(torch.nn.Module):
    """An encoder and a decoder, which tools export as two files."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(8, 8), torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.decoder(self.encoder(x)))


class Half(Translator):
    """One of the two, under its name in the whole."""

    def __init__(self, whole: Translator, part: str) -> None:
        super().__init__()
        self.load_state_dict(whole.state_dict())
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(getattr(self, self.part)(x))


def test_encoder_and_decoder_in_two_files(run_verb: Any, tmp_path: Path) -> None:
    import onnxruntime
    from peft import FourierFTConfig, get_peft_model

    torch.manual_seed(0)
    model, x = Translator(), torch.randn(3, 8)
    for part in ("encoder", "decoder"):
        torch.onnx.export(
            Half(model, part).eval(),
            (x,),
            tmp_path / f"{part}.onnx",
            input_names=["x"],
            verbose=False,
        )
    config = FourierFTConfig(n_frequency=8, scaling=60.0, target_modules=["encoder", "decoder"])
    peft = get_peft_model(model, config).eval()
    peft.save_pretrained(tmp_path / "adapter")
    value = x.numpy()
    for part, other in (("encoder", "decoder"), ("decoder", "encoder")):
        words = ("apply", "--onnx", tmp_path / f"{part}.onnx", "--bundle", tmp_path / "adapter")
        words += ("--mode", "merged", "-o", tmp_path / f"{part}.merged.onnx")
        assert run_verb(*words).code == 4
        ran = run_verb(*words, "--partial")
        assert (
            f"1 layers or tensors that this graph lacks are left out: {other}" in ran.json["notes"]
        )
        assert ran.json["apply"]["layers"] == [part]
        session = onnxruntime.InferenceSession(tmp_path / f"{part}.merged.onnx")
        (value,) = session.run(None, {"x": value})
    expected = peft(x).detach()
    torch.testing.assert_close(torch.tensor(value), expected, rtol=0, atol=1e-5)
    # At run time, too, each half takes its part of the whole adapter.
    value = x.numpy()
    for part in ("encoder", "decoder"):
        path = tmp_path / f"{part}.swap.onnx"
        options = {"mode": "swappable", "partial": True}
        ff.apply_onnx(tmp_path / f"{part}.onnx", tmp_path / "adapter", path, **options)
        session = ff.AdapterSession(path)
        session.load("whole", tmp_path / "adapter")
        (value,) = session.run({"x": value}, adapter="whole").values()
    torch.testing.assert_close(torch.tensor(value), expected, rtol=0, atol=1e-5)
