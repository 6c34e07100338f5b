"""merge-llama: a checkpoint of Llama-2-7B's shapes, merged by whole processes.

Four layers in bfloat16, 2.1 GB in five shards, q_proj and v_proj, n 1000; made on the spot. The
toolkit's process against PEFT's (load, merge, save), both with what they import, and against
`cp -r` and `sync`. About 9 GB of a temporary folder (TMPDIR) are used and given back.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import Row, check_close, faster, within
from peers import SCALING, SEED
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from fourierft_export.bundle.peft import from_peft
from fourierft_export.files.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
CHILD = str(Path(__file__).with_name("merge_child.py"))
ROUNDS = 3
HIDDEN, INNER = 4096, 11008
TARGETS = ("q_proj", "v_proj")
# Layers and vocabulary that make about so many bytes.
SIZES = {"0.5 GB": (1, 4000), "1 GB": (2, 12000), "2 GB": (4, 32000)}


def weight(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


def make_model(folder: Path, layers: int, vocabulary: int) -> None:
    """Random weights in one shard for each layer and one for the rest, with an index."""
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    for number in range(layers + 1):
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        if number == layers:
            shard = {
                "model.embed_tokens.weight": weight(vocabulary, HIDDEN),
                "lm_head.weight": weight(vocabulary, HIDDEN),
                "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            }
        else:
            at = f"model.layers.{number}"
            shapes = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
            shapes |= {f"mlp.{p}_proj": (INNER, HIDDEN) for p in ("gate", "up")}
            shapes |= {"mlp.down_proj": (HIDDEN, INNER)}
            shard = {f"{at}.{part}.weight": weight(*shape) for part, shape in shapes.items()}
            for norm in ("input", "post_attention"):
                shard[f"{at}.{norm}_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder: Path, layers: int) -> None:
    """A PEFT adapter directory with random spectra."""
    folder.mkdir()
    config = {
        "peft_type": "FOURIERFT", "task_type": "CAUSAL_LM", "n_frequency": 1000,
        "scaling": SCALING, "random_loc_seed": SEED, "target_modules": list(TARGETS),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng()
    spectra = {
        f"base_model.model.model.layers.{i}.self_attn.{p}.fourierft_spectrum": (
            random.standard_normal(1000, np.float32)
        )
        for i in range(layers)
        for p in TARGETS
    }
    save_numpy(spectra, folder / "adapter_model.safetensors", {"format": "pt"})


def process(*command: str) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    return time.perf_counter() - start, done.stdout


def sides(folder: Path) -> dict[str, tuple[str, ...]]:
    """The command of each side; its output is `folder`/out-SIDE."""
    base, bundle, adapter = (str(folder / name) for name in ("base", "bundle", "adapter"))
    out = {side: str(folder / f"out-{side}") for side in ("ours", "peft", "cp", "timed")}
    merge = ("merge", "--base", base, "--bundle", bundle, "-o", out["ours"])
    return {
        "ours": (sys.executable, "-m", "fourierft_export", *merge),
        "peft": ("sh", "-c", f'"{sys.executable}" "{CHILD}" peft "$@" 2>/dev/null && sync',
                 "sh", base, adapter, out["peft"]),
        "cp": ("sh", "-c", 'cp -r "$1" "$2" && sync', "sh", base, out["cp"]),
        "timed": (sys.executable, CHILD, "timed", base, bundle, out["timed"]),
    }  # fmt: skip


def prepare(folder: Path, layers: int, vocabulary: int) -> None:
    folder.mkdir(exist_ok=True)
    make_model(folder / "base", layers, vocabulary)
    make_adapter(folder / "adapter", layers)
    from_peft(folder / "adapter", folder / "base").save(folder / "bundle")
    subprocess.run(["sync"], check=True)


def compare(folder: Path) -> None:
    """Stop where PEFT's output and ours differ by more than rounding does."""
    ours, theirs = (Checkpoint.open(folder / f"out-{side}") for side in ("ours", "peft"))
    for name in ours.tensors:
        found = [side.read(name) for side in (ours, theirs)]
        if any(f"{target}.weight" in name for target in TARGETS):
            check_close(f"merge-llama, {name}", *found, 1e-3)
        elif found[0].tobytes() != found[1].tobytes():
            raise SystemExit(f"merge-llama: {name} has changed")


def merge_llama() -> Iterator[Row]:
    name = "merge-llama"
    peaks: dict[str, float] = {}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "made"
        for size, (layers, vocabulary) in SIZES.items():
            shutil.rmtree(folder, ignore_errors=True)
            prepare(folder, layers, vocabulary)
            sizes[size] = sum(file.stat().st_size for file in folder.glob("base/*")) / 1e6
            peaks[size] = float(process(*sides(folder)["timed"])[1].split()[0])
        commands = sides(folder)
        results: dict[str, list[tuple[float, str]]] = {side: [] for side in commands}
        for turn in range(ROUNDS + 1):  # the first is the warm-up
            for side, command in commands.items():
                shutil.rmtree(folder / f"out-{side}", ignore_errors=True)
                subprocess.run(["sync"], check=True)
                result = process(*command)
                if turn:
                    results[side].append(result)
            if not turn:
                compare(folder)
            for side in ("peft", "cp", "timed"):
                shutil.rmtree(folder / f"out-{side}")
    wall = {side: statistics.median(r[0] for r in rows) for side, rows in results.items()}
    peft_peak = max(float(printed.split()[-1]) for _, printed in results["peft"])
    delta = statistics.median(float(printed.split()[1]) for _, printed in results["timed"])
    yield faster(name, "whole process", wall["ours"], wall["peft"], 2.0, "PEFT load, merge, save")
    yield within(name, "wall", wall["ours"], wall["cp"], 1.25, "cp -r and sync")
    yield within(name, "entries and deltas", delta, wall["timed"], 0.05, "the whole process")
    for size, peak in peaks.items():
        peer = f"the limit; PEFT's peak at 2 GB is {peft_peak:.0f} MB"
        yield within(name, f"peak memory at {size}", peak, 700.0, 1.0, peer, "MB")
    growth = peaks["2 GB"] - peaks["0.5 GB"]
    case = "peak memory growth, 0.5 to 2 GB"
    yield within(name, case, growth, sizes["2 GB"] - sizes["0.5 GB"], 0.05, "the weights'", "MB")


BARS = {"merge-llama": merge_llama}
