"""A lone process; what torchrun's environment may say; which parts of a model are spread."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import nn

from fourierft_export import FourierFTConfig, inject
from fourierft_export.errors import UsageError
from fourierft_export.train.processes import Processes, join
from fourierft_export.train.shard import blocks, whole_parameters
from fourierft_export.train.voice import one_voice

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_lone_process() -> None:
    alone = join("cpu")
    assert (alone.rank, alone.world, alone.is_writer) == (0, 1, True)
    assert alone.device == torch.device("cpu")
    model = nn.Linear(3, 2)
    assert alone.wrap(model) is model
    model(torch.ones(1, 3)).sum().backward()
    before = [p.grad for p in model.parameters()]
    alone.reduce_gradients(model.parameters())
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    number = torch.tensor([2.0, 3.0])
    total = alone.sum(number)
    assert torch.equal(total, number)
    assert total is not number
    assert alone.any(True) and not alone.any(False)
    alone.barrier()
    alone.close()


def test_one_process_under_torchrun_is_a_lone_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert join("cpu") == Processes(0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()


def test_the_default_device_is_cuda_where_there_is_one() -> None:
    assert join().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("device", "environment", "said"),
    [
        ("quantum", {}, "device quantum"),
        ("cuda:99", {}, "device cuda:99"),
        ("cpu", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK"),
        ("cpu", {"RANK": "2", "WORLD_SIZE": "2"}, "2 and 2"),
        ("cpu", {"RANK": "0", "WORLD_SIZE": "-2"}, "WORLD_SIZE"),
        ("cpu", {"WORLD_SIZE": "2"}, "RANK"),
        ("cuda:1", {"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ("cuda", {"RANK": "99", "WORLD_SIZE": "100"}, "cuda:99"),
        ("cuda", {"RANK": "1", "WORLD_SIZE": "100", "LOCAL_RANK": "98"}, "cuda:98"),
    ],
)
def test_what_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, device: str, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        join(device)


def test_a_lone_process_has_nobody_to_share_a_base_with() -> None:
    with pytest.raises(UsageError, match="torchrun"):
        join("cpu").wrap(nn.Linear(2, 2), shard_base=True)


def test_blocks_of_a_transformer() -> None:
    import transformers as tf

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    model = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, vocab_size=20))
    inject(model, FourierFTConfig(n_frequency=5, target_modules=["q", "v"]))
    assert blocks(model) == [*model.encoder.block, *model.decoder.block]


def test_blocks_of_other_models() -> None:
    class Lists(nn.Module):
        """Lists of lists, a part that stands twice, a lone layer."""

        def __init__(self) -> None:
            super().__init__()
            self.alone = nn.Linear(2, 2)
            shared = nn.Linear(2, 2)
            inner = nn.ModuleList([nn.Linear(2, 2), shared])
            self.lists = nn.ModuleList([inner, nn.ModuleList([shared])])
            self.row = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())

    model = Lists()
    assert blocks(model) == [*model.lists[0], *model.row]  # type: ignore[misc]
    assert blocks(nn.Linear(2, 2)) == []


def test_what_stays_whole_is_what_adapters_bring(make_classifier: Callable[[], nn.Module]) -> None:
    model = make_classifier()
    base = set(model.parameters())
    inject(model, FourierFTConfig(n_frequency=5, task_type="SEQ_CLS", bias="fourier_only"))
    inject(model, FourierFTConfig(n_frequency=7, target_modules=["key"]), "second")
    assert whole_parameters(model) == set(model.parameters()) - base
    model.bert.pooler.dense.weight.requires_grad_(True)  # type: ignore[union-attr]
    assert len(whole_parameters(model) & base) == 1


@pytest.fixture
def make_classifier() -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers as tf

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = tf.BertConfig(**sizes, intermediate_size=16, vocab_size=20)
        return tf.BertForSequenceClassification(config)

    return make


def test_a_lone_process_speaks() -> None:
    for _ in range(2):
        with one_voice() as mine:
            assert mine


def test_with_nobody_to_ask_every_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for _ in range(2):
        with one_voice() as mine:
            assert mine


def test_of_many_processes_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    order: list[str] = []

    def another() -> None:
        with one_voice() as mine:
            order.append("speaks" if mine else "is silent")

    with one_voice() as mine:
        assert mine
        others = [Thread(target=another) for _ in range(2)]
        for other in others:
            other.start()
        time.sleep(0.2)  # they would be done by now if they did not wait
        order.append("told")
    for other in others:
        other.join()
    assert order == ["told", "is silent", "is silent"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun started them all anew
    with one_voice() as mine:
        assert mine


def test_torch_is_not_needed_until_there_is_an_error() -> None:
    script = (
        "import sys; from fourierft_export.train import voice; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
