"""Merge an adapter into a sharded checkpoint: plan, processes, Dask, a kill, verify, recover.

    python samples/large_checkpoint/merge.py [-o DIR]

The checkpoint is a Llama of 24 million random weights in six shards of bfloat16. The commands are
those for a real one of hundreds of gigabytes.
"""

from __future__ import annotations

import argparse
import filecmp
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

import fourierft_export as ff

# torch, transformers and distributed are imported where they are used: the processes that merge
# import this file again, and need none of them.

KILLED = 9


def make_checkpoint(folder: Path) -> tuple[Path, Path]:
    """A base in several shards, and a bundle for its q_proj and v_proj."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=2000,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base", max_shard_size="8MB")
    ff.inject(model, ff.FourierFTConfig(n_frequency=500, target_modules=["q_proj", "v_proj"]))
    bundle = ff.capture(model).save(folder / "adapter.fourierft.safetensors")
    return folder / "base", bundle


def die_half_way(what: str, done: int, total: int) -> None:
    """A progress callback that ends the process at once, as a kill or a power cut does."""
    if what == "merging" and done > total / 2:
        os._exit(KILLED)


def merge_until_killed(base: Path, bundle: Path, out: Path) -> None:
    ff.merge_checkpoint(base, bundle, out, progress=die_half_way)


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    equal, _, _ = filecmp.cmpfiles(one, other, names, shallow=False)
    return sorted(equal) == names == sorted(path.name for path in other.iterdir())


def main(folder: Path) -> None:
    from distributed import LocalCluster

    base, bundle = make_checkpoint(folder)

    plan = ff.merge_checkpoint(base, bundle, folder / "merged", dry_run=True)
    print(
        f"plan: {len(plan.layers)} layers, {plan.disk_bytes / 1e6:.0f} MB on disk, "
        f"{plan.memory_bytes / 1e6:.0f} MB of memory"
    )

    report = ff.merge_checkpoint(base, bundle, folder / "merged")
    least = min(layer.survival or 0 for layer in report.layers)
    print(f"merged: {len(report.shards)} shards; at least {least:.1%} of the weights changed")

    ff.merge_checkpoint(base, bundle, folder / "by-processes", workers=2)
    print("two processes wrote the same:", same_files(folder / "merged", folder / "by-processes"))

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address  # yours: tcp://HOST:8786
        ff.merge_checkpoint(base, bundle, folder / "by-dask", scheduler=address)
    print("a Dask cluster wrote the same:", same_files(folder / "merged", folder / "by-dask"))

    child = multiprocessing.get_context("spawn").Process(
        target=merge_until_killed, args=(base, bundle, folder / "resumed")
    )
    child.start()
    child.join()
    print(f"killed half-way: exit code {child.exitcode}, output: {(folder / 'resumed').exists()}")
    again = ff.merge_checkpoint(base, bundle, folder / "resumed")
    print(f"resumed: {len(again.resumed)} of {len(again.shards)} shards were finished already")
    print("it wrote the same:", same_files(folder / "merged", folder / "resumed"))

    print("verify merged:", ff.verify_merged(folder / "merged").ok)
    damaged = shutil.copytree(folder / "merged", folder / "damaged")
    shard = min(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")  # the last byte
    print("verify damaged:", *ff.verify_merged(damaged).problems)

    recovered, _ = ff.recover_bundle(base, folder / "merged", like=ff.Bundle.load(bundle))
    path = recovered.save(folder / "recovered.fourierft.safetensors")
    print(f"recovered: {path.stat().st_size:,} bytes from {report.nbytes:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, help="new folder to keep the files in")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
