"""Two processes of torchrun with a base in pieces: `sharded.py OUT KILLED_AT` (see test_cli).

accelerate offers FSDP on accelerators only; its state is changed here so that it does on CPUs.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM

import fourierft_export as ff
from fourierft_export.train.data import losses_and_scores as scores

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def shard(state: Any) -> None:
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
    )


def make_task(killed_at: int) -> ff.TrainingTask:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=40, **SHAPE)).eval()
    ids = torch.randint(1, 60, (24, 12), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    calls = 0

    def loss(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if torch.is_grad_enabled() and calls == killed_at:
            os._exit(9)
        return scores.next_token_loss(*args, **kwargs)

    return ff.TrainingTask(
        model,
        rows,
        rows[:7],
        compute_loss_func=loss,
        preprocess_logits_for_metrics=scores.keep_sums,
        compute_metrics=scores.score_text,
    )


def main(out: str, killed_at: int) -> None:
    torch.set_num_threads(1)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        plain = AcceleratorState.__init__

        def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            shard(self)

        AcceleratorState.__init__ = sharded
    settings = ff.TrainSettings(
        device="cpu", steps=6, batch_size=8, eval_every=2, average=0.5, modules_to_save=("lm_head",)
    )
    resume = os.path.exists(f"{out}.train")
    report = ff.train_adapter(make_task(killed_at), out, settings, resume=resume, picture=False)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"losses": report.curves["loss"], "processes": report.processes}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
