"""Kills the command line at random moments: `python tests/kill.py --rounds 100 [VERB ...]`.

After every kill the output must be absent or complete, and the next run must end with the bytes of
an undisturbed one and leave nothing else. Prints how many kills found what. The command line runs
in forks of one warm process, which spares the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
WARM = ["bundle.peft", "cli.pack", "cli.unpack", "merge.merge", "recover.from_checkpoint"]
WARM = [f"fourierft_export.{name}" for name in (*WARM, "onnx_graph.apply")] + ["onnx", "onnx_ir"]
TORCH = ["fourierft_export.onnx_graph.trace.pretrained", "fourierft_export.train.training_run"]
TORCH += ["transformers.trainer", "transformers.models.llama.modeling_llama", "torch.onnx"]
TORCH += ["datasets", "sklearn.metrics", "matplotlib.pyplot", "onnxscript", "torch._dynamo"]


class Forks:
    """Runs the command line in forks of one warm process, killed on demand."""

    def __init__(self, *modules: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, "--serve", *WARM, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=DATA.parent.parent,
        )

    def run(
        self,
        words: list[Any],
        kill_after: float | None = None,
        at_shard: tuple[int, int] | None = None,
        stderr: Path | str = os.devnull,
    ) -> int:
        """The exit code, negative for a signal.

        Args:
            words: of the command line.
            kill_after: seconds until SIGKILL.
            at_shard: a signal, and after how many finished weight files of a merge it comes.
            stderr: a file for what the command writes there.
        """
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        message = [[*map(str, words)], kill_after, at_shard, str(stderr)]
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()
        return int(stdout.readline())

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate()


def serve(modules: list[str]) -> None:
    """Run each line of stdin, a message of `Forks.run`, in a fork, and print its exit code."""
    import importlib

    from fourierft_export.cli.main import run
    from fourierft_export.merge import run as merging

    for module in modules:
        importlib.import_module(module)
    record, finished = merging.record_finished, 0
    for line in sys.stdin:
        words, kill_after, at_shard, stderr = json.loads(line)

        def record_and_signal(*shard: Any, at_shard: Any = at_shard) -> None:
            nonlocal finished
            record(*shard)
            finished += 1
            if at_shard and finished == at_shard[1]:
                os.kill(os.getpid(), at_shard[0])
                time.sleep(20)  # for Ctrl-C to arrive

        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd, name in enumerate((os.devnull, os.devnull, stderr)):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
            merging.record_finished = record_and_signal
            os._exit(run(words))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # it is still there, if only to be waited for
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its relative path."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def survive(forks: Forks, words: list[str], out: Path, rounds: int, seed: int) -> dict[str, int]:
    """Kill a verb so many times; returns how often what was seen.

    Args:
        forks: runs it.
        words: of the command line, without the output.
        out: the output, in a folder of its own.
        rounds: how many kills.
        seed: of the random moments.
    """
    folder, words, times = out.parent, [*words, "-o", str(out)], []
    for _ in range(2):
        empty(folder)
        started = time.perf_counter()
        assert forks.run(words) == 0, words
        times.append(time.perf_counter() - started)
    whole, moments = files_in(folder), random.Random(seed)
    seen = {"killed": 0, "complete": 0, "absent": 0, "left over": 0, "finished by the next": 0}
    while seen["killed"] < rounds:
        if out.exists():
            empty(folder)
        code = forks.run(words, kill_after=moments.uniform(0.1, 1) * min(times))
        assert code in (0, -signal.SIGKILL), code
        seen["killed"] += code != 0
        if out.exists():
            assert {k: v for k, v in files_in(folder).items() if ".partial-" not in k} == whole
            seen["complete"] += code != 0
            assert forks.run(words) == 2  # the output exists; what is left over goes all the same
        else:
            assert code != 0
            seen["absent"] += 1
            seen["left over"] += any(".partial-" in p.name for p in folder.iterdir())
            if moments.random() < 0.7 and seen["killed"] < rounds:
                continue  # the next run is killed, too
            assert forks.run(words) == 0
            seen["finished by the next"] += 1
        assert files_in(folder) == whole
    return seen


def survive_training(forks: Forks, words: list[str], out: Path, rounds: int) -> dict[str, int]:
    """Kill training, whose output is the best bundle so far, and resume it where it was."""
    import fourierft_export as ff

    words, moments = [*words, "-o", str(out)], random.Random(0)
    empty(out.parent)
    started = time.perf_counter()
    assert forks.run(words) == 0
    took, whole = time.perf_counter() - started, out.read_bytes()
    seen = {"killed": 0, "bundle": 0, "absent": 0, "resumed": 0, "begun anew": 0}
    while seen["killed"] < rounds:
        empty(out.parent)
        if forks.run(words, kill_after=moments.uniform(0.1, 1) * took) == 0:
            continue
        seen["killed"] += 1
        seen["bundle" if out.exists() else "absent"] += 1
        if out.exists():
            ff.Bundle.load(out)
        resumed = forks.run([*words, "--resume"]) == 0
        assert resumed or forks.run([*words, "--force"]) == 0
        seen["resumed" if resumed else "begun anew"] += 1
        assert out.read_bytes() == whole
    return seen


def make_inputs(folder: Path) -> None:
    """Write a sharded base, one of a single layer, adapters, a graph with external data, rows."""
    import numpy as np
    import onnx
    from safetensors.numpy import load_file, save_file

    import fourierft_export as ff
    from fourierft_export.bundle.spec import AdapterSpec, LayerSpec

    weights = load_file(DATA / "stories260k" / "model.safetensors")
    config = json.loads((DATA / "stories260k" / "config.json").read_text())
    drawn = np.random.default_rng(0)

    def write_base(base: Path, layers: int, shards: int) -> None:
        shutil.copytree(DATA / "stories260k", base)
        (base / "model.safetensors").unlink()
        (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
        kept = [n for n in sorted(weights) if "layers." not in n or int(n.split(".")[2]) < layers]
        index: dict[str, str] = {}
        for i in range(shards):
            shard = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({n: weights[n] for n in kept[i::shards]}, base / shard, {"format": "pt"})
            index |= dict.fromkeys(kept[i::shards], shard)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (base / "model.safetensors.index.json").write_text(text)

    def bundle(layers: list[str]) -> ff.Bundle:
        spectra = {name: drawn.standard_normal(100, np.float32) for name in layers}
        spec = AdapterSpec(777, 50.0, tuple(LayerSpec(name, 100) for name in layers))
        return ff.Bundle.build(spec, spectra)

    for name, layers in (("base", 5), ("small", 1)):
        write_base(folder / name, layers, shards=4)
        modules = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(layers) for p in "qv"]
        made = bundle(modules).bind(folder / name)
        made.save(folder / ("bundle" if name == "base" else "small.bundle"))
        if name == "base":
            ff.to_peft(made, folder / "adapter")
            ff.merge_checkpoint(folder / "base", made, folder / "merged")

    names = [f"l{i}" for i in range(8)]
    bundle(names[:4]).save(folder / "graph.bundle")
    stored = [
        onnx.numpy_helper.from_array(drawn.standard_normal((384, 384), np.float32), f"{n}.weight")
        for n in names
    ]
    nodes = [
        onnx.helper.make_node("MatMul", [f"x{i}", f"l{i}.weight"], [f"x{i + 1}"]) for i in range(8)
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 1, ["n", 384]) for n in ("x0", "x8")]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, folder / "graph.onnx", save_as_external_data=True, location="weights")

    rows = [json.dumps({"input_ids": [1, *range(5, 20 + i)]}) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


VERBS = {
    "pack": "pack @adapter --base @base",
    "unpack": "unpack @bundle",
    "merge": "merge --base @base --bundle @bundle",
    "recover": "recover --base @base --merged @merged --like @bundle",
    "apply": "apply --onnx @graph.onnx --bundle @graph.bundle --mode merged",
    "export": "export --base @small --bundle @small.bundle --mode merged",
    "train": "train --model @small --task text-generation --data @rows.jsonl --steps 3",
}
OUTPUTS = {"export": "out.onnx", "apply": "out.onnx"}


def kill_verb(forks: Forks, verb: str, folder: Path, rounds: int) -> dict[str, int]:
    """Kill one of `VERBS` so many times; `folder` is that of `make_inputs`."""
    words = VERBS[verb].replace("@", f"{folder}/").split()
    out = folder / f"{verb}-outputs" / OUTPUTS.get(verb, "out")
    if verb == "train":
        return survive_training(forks, words, out, rounds)
    return survive(forks, words, out, rounds, seed=len(verb))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verbs", nargs="*", help=f"of {', '.join(VERBS)}; all by default")
    parser.add_argument("--rounds", type=int, default=100, help="kills of each verb")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for verb in arguments.verbs or VERBS:
            forks = Forks(*(TORCH if verb in ("export", "train") else []))
            print(verb, kill_verb(forks, verb, Path(name), arguments.rounds), flush=True)
            forks.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    else:
        main()
