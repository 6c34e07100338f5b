"""What two processes do together for `test_distributed.py`; torchrun runs this file.

Usage: together.py FOLDER. Every process writes what it saw to FOLDER/rank-N.json. FOLDER/stopped
holds what a lone process left of the run "classifier" when it died.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourierft_export import FourierFTConfig, attach, capture, inject
from fourierft_export.errors import FourierFTError
from fourierft_export.spectral import cost
from fourierft_export.train.processes import Processes, join
from fourierft_export.train.settings import TrainSettings
from fourierft_export.train.task import Batch, StepResult, Sums, TrainingTask
from fourierft_export.train.train import train_adapter

SHAPES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}


def classifier() -> nn.Module:
    """A BERT without dropout, whose masks no two processes would share with one."""
    import transformers as tf

    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tf.BertForSequenceClassification(tf.BertConfig(**SHAPES, **still, num_labels=3)).eval()


def language_model() -> nn.Module:
    import transformers as tf

    torch.manual_seed(0)
    tied = {"num_key_value_heads": 2, "tie_word_embeddings": True}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPES, **tied)).eval()


def rows_of_tokens(count: int, seed: int) -> list[list[int]]:
    """Rows of 3 to 12 tokens, so that processes get as many rows but not as many tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (count,), generator=draw).tolist()
    return [torch.randint(1, 60, (n,), generator=draw).tolist() for n in lengths]


def collate(rows: Any) -> Batch:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def classify(model: nn.Module, batch: Batch) -> StepResult:
    """The label is the first token modulo three."""
    labels = batch["input_ids"][:, 0] % 3
    logits: Tensor = model(**batch).logits
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return StepResult(loss, len(labels), {"right": (logits.argmax(-1) == labels).sum()})


def predict(model: nn.Module, batch: Batch) -> StepResult:
    """The next token of every token."""
    goal = batch["input_ids"][:, 1:]
    logits: Tensor = model(**batch).logits[:, :-1]
    goal = goal.masked_fill(goal == 0, -100)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="sum")
    count = int((goal != -100).sum())
    return StepResult(loss, count, {"rows": torch.tensor(len(goal))})


def make_task(kind: str, rows: int = 37) -> TrainingTask:
    """37 rows and batches of 8: the last one of an epoch has 5 rows, 2 and 3 for two processes."""
    is_classifier = kind == "classifier"

    def metrics(sums: Sums) -> dict[str, float]:
        return {name: float(value) for name, value in sums.items()}

    return TrainingTask(
        model=classifier() if is_classifier else language_model(),
        train=rows_of_tokens(rows, 1),
        eval=rows_of_tokens(11, 2),
        collate=collate,
        step=classify if is_classifier else predict,
        metrics=metrics,
        task_type="SEQ_CLS" if is_classifier else "CAUSAL_LM",
        modules_to_save=("classifier",) if is_classifier else (),
    )


SETTINGS: dict[str, Any] = {
    "n_frequency": 40,
    "scaling": 60.0,
    "learning_rate": 0.2,
    "head_learning_rate": 0.03,
    "epochs": 3,
    "batch_size": 8,
    "eval_every": 10,
    "device": "cpu",
}
# name -> model, settings, whether two processes share the base.
RUNS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "classifier": ("classifier", {}, False),
    "classifier, sharded": ("classifier", {"bias": "fourier_only"}, True),
    "classifier, sharded, dense": ("classifier", {"target_modules": "all-linear"}, True),
    "language model": ("language model", {"accumulate": 2}, False),
    "language model, sharded": ("language model", {"gradient_checkpointing": True}, True),
    "language model, fewer rows than processes": ("language model", {"batch_size": 3}, True),
    "sharded in bfloat16": ("classifier", {"dtype": "bfloat16"}, True),
}
ROWS = {"language model, fewer rows than processes": 7}


class DiedError(Exception):
    """A process that died between two steps."""


def train(
    name: str,
    folder: Path,
    processes: Processes | None = None,
    *,
    stop_at: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """One of RUNS, by as many processes as there are."""

    def progress(what: str, done: int, total: int) -> None:
        if done == stop_at:
            raise DiedError

    kind, more, sharded = RUNS[name]
    task = make_task(kind, ROWS.get(name, 37))
    many = processes is not None and processes.world > 1
    with cost.force(form="dense" if "dense" in name else "token"):
        report = train_adapter(
            task,
            folder / f"{name}.fourierft.safetensors",
            TrainSettings(**(SETTINGS | more)),
            shard_base=sharded and many,
            processes=processes,
            resume=resume,
            progress=progress,
        )
    return {
        "loss": report.history.losses,
        "norm": report.history.norms,
        "evaluations": report.history.evaluations,
        "processes": report.processes,
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def collectives(processes: Processes) -> dict[str, Any]:
    """Sums, flags, gradients, levelling: each process brings other numbers."""
    rank = processes.rank
    number = torch.tensor([1.5, 2.0], dtype=torch.float64) + rank
    learning = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    learning[0].grad = torch.arange(6.0).view(3, 2).T + rank  # not contiguous
    half.grad = torch.tensor([0.5, 1.0], dtype=torch.bfloat16)
    if rank == 1:
        learning[1].grad = torch.ones(2, 3)
    parameters = [*learning, half, frozen]
    processes.reduce_gradients(parameters)
    values = [torch.full((2, 3), float(rank)).T, torch.arange(3), torch.tensor(rank == 1)]
    kept = values[1]
    processes.level(values)
    total = processes.sum(number)
    processes.barrier()
    return {
        "identity": [rank, processes.world, processes.is_writer, str(processes.device)],
        "sum": total.tolist(),
        "left alone": number.tolist(),
        "any": [processes.any(rank == 1), processes.any(False), processes.any(True)],
        "gradients": [None if p.grad is None else p.grad.tolist() for p in parameters],
        "dtype": str(half.grad.dtype),
        "levelled": [v.tolist() for v in values],
        "same": kept is values[1],
    }


def other_models(processes: Processes) -> str:
    """What is said when processes hold different models."""
    try:
        processes.wrap(nn.Linear(3, 2 + processes.rank))
    except FourierFTError as error:
        return error.summary
    return "nothing"


def frozen_values(processes: Processes, sharded: bool) -> float:
    """A base that every process drew for itself ends up as the writer's."""
    torch.manual_seed(processes.rank)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(model, FourierFTConfig(n_frequency=3, target_modules=["1"], init_weights=True))
    total: float = processes.wrap(model, sharded)(torch.ones(1, 4)).sum().item()
    return total


def state_dicts(processes: Processes) -> dict[str, Any]:
    """Bundles and state dicts of models in DDP and FSDP2, against those of the plain model."""
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    config = FourierFTConfig(n_frequency=40, scaling=20.0, task_type="SEQ_CLS", bias="fourier_only")
    torch.manual_seed(5)
    plain = inject(classifier(), config)
    bundle = capture(plain)
    expected = digest(bundle.to_bytes())
    ids = torch.tensor(rows_of_tokens(1, 3))
    output = plain(input_ids=ids).logits

    parallel = DistributedDataParallel(plain)
    attached = attach(DistributedDataParallel(inject(classifier(), config, "other")), bundle)
    torch.manual_seed(5)
    sharded = processes.wrap(inject(classifier(), config), shard_base=True)
    parts = [p for p in sharded.parameters() if isinstance(p, DTensor)]
    named = dict(sharded.named_parameters())
    split = {
        "local": sum(p.to_local().numel() for p in parts),
        "all": sum(p.numel() for p in parts),
        "learn": sorted(n for n, p in named.items() if p.requires_grad),
        "whole": sorted(n for n, p in named.items() if not isinstance(p, DTensor)),
    }
    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = dcp.get_model_state_dict(sharded, options=whole)
    again = inject(classifier(), config)  # other spectra
    if processes.is_writer:
        again.load_state_dict(gathered)
    captured = capture(sharded)

    empty = processes.wrap(inject(classifier(), config), shard_base=True)
    dcp.set_model_state_dict(empty, plain.state_dict(), options=whole)
    spectra_only = FourierFTConfig(n_frequency=40, scaling=20.0)
    torch.manual_seed(5)
    users = inject(classifier(), config)  # a user's own call, which spreads the adapter as well
    for part in (*users.bert.encoder.layer, users):  # type: ignore[union-attr, misc]
        fully_shard(part, mesh=init_device_mesh("cpu", (processes.world,)))
    with cost.force(form="dense"):
        users(input_ids=ids).logits.sum().backward()

    later = processes.wrap(inject(classifier(), spectra_only, "other"), shard_base=True)
    torch.manual_seed(6)
    late = inject(classifier(), spectra_only)
    attach(later, capture(late))
    try:
        attach(later, bundle, "with a head")
        refused = "nothing"
    except FourierFTError as error:
        refused = error.summary
    return {
        "expected": expected,
        "ddp": digest(capture(parallel).to_bytes()),
        "attached to ddp": digest(capture(attached).to_bytes()),
        "sharded": digest(captured.to_bytes()),
        "user's fsdp": digest(capture(users).to_bytes()),
        "from fsdp": digest(capture(again).to_bytes()),
        "into fsdp": digest(capture(empty).to_bytes()),
        "attached to fsdp": capture(later).to_bytes() == capture(late).to_bytes(),
        "keys": sorted(gathered) == sorted(plain.state_dict()),
        "output": [
            float((model(input_ids=ids).logits - other).abs().max())
            for model, other in (
                (attached, output),
                (sharded, output),
                (empty, output),
                (later, late(input_ids=ids).logits),
            )
        ],
        "split": split,
        "refused": refused,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    processes = join("cpu")
    seen: dict[str, Any] = {"collectives": collectives(processes)}
    seen["other models"] = other_models(processes)
    seen["frozen"] = [frozen_values(processes, sharded) for sharded in (False, True)]
    seen["state dicts"] = state_dicts(processes)
    for name in RUNS:
        seen[name] = train(name, folder, processes)
    seen["resumed"] = train("classifier", folder / "stopped", processes, resume=True)
    (folder / f"rank-{processes.rank}.json").write_text(json.dumps(seen), "utf-8")
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
