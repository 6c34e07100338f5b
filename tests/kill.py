"""Kills the command line at random moments: `python tests/kill.py --rounds 100 [VERB ...]`.

Every second kill comes right before an operation on the output's files: the last one, the one
before, and so on. After every kill the output must be absent or complete, and the next run must end
with the bytes of an undisturbed one and leave nothing else. Prints how many kills found what. The
command line runs in forks of one warm process, which spares the imports; torch's exporter traces
once.
"""

from __future__ import annotations

import argparse
import json
import mmap
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

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
DATA = Path(__file__).resolve().parent / "data"
WARM = ["bundle.peft", "cli.pack", "cli.unpack", "merge.merge", "recover.from_checkpoint"]
WARM = [f"fourierft_export.{name}" for name in (*WARM, "onnx_graph.apply")] + ["onnx", "onnx_ir"]
TORCH = ["fourierft_export.onnx_graph.trace.pretrained", "fourierft_export.train.training_run"]
TORCH += ["transformers.trainer", "transformers.models.llama.modeling_llama", "torch.onnx"]
TORCH += ["datasets", "sklearn.metrics", "matplotlib.pyplot", "onnxscript", "torch._dynamo"]


class Forks:
    """Runs the command line in forks of one warm process, killed on demand.

    Attributes:
        operations: how many the last run with `before` has counted.
    """

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
        before: tuple[int, str] | None = None,
        fork: bool = True,
        vanish: bool = False,
    ) -> int:
        """The exit code, negative for a signal.

        Args:
            words: of the command line.
            kill_after: seconds until SIGKILL.
            at_shard: a signal, and after how many finished weight files of a merge it comes.
            stderr: a file for what the command writes there.
            before: SIGKILL comes right before the so-many-th (0: none) operation on files below
                a folder.
            fork: False runs it in the warm process itself, which is then warmer.
            vanish: instead of SIGKILL, the folder of `before` is removed.
        """
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None and stdout is not None
        message = [[*map(str, words)], kill_after, at_shard, str(stderr), before, fork, vanish]
        stdin.write(json.dumps(message) + "\n")
        stdin.flush()
        code, self.operations = map(int, stdout.readline().split())
        return code

    def close(self) -> None:
        """End the process that forks."""
        self._server.communicate()


def serve(modules: list[str]) -> None:
    """Run each line of stdin, a message of `Forks.run`, in a fork, and print its exit code."""
    import importlib

    from fourierft_export.cli.main import run
    from fourierft_export.merge import run as merging

    counted = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the forks
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for module in modules:
        importlib.import_module(module)
    if "torch.onnx" in modules:
        import pytest

        from tests.exporter_cache import remember_exports

        remember_exports(pytest.MonkeyPatch())
    record, finished = merging.record_finished, 0
    for line in sys.stdin:
        words, kill_after, at_shard, stderr, before, fork, vanish = json.loads(line)

        def record_and_signal(*shard: Any, at_shard: Any = at_shard) -> None:
            nonlocal finished
            record(*shard)
            finished += 1
            if at_shard and finished == at_shard[1]:
                os.kill(os.getpid(), at_shard[0])
                time.sleep(20)  # for Ctrl-C to arrive

        if not fork:
            print(run(words), 0, file=answers, flush=True)
            continue
        counted[:8] = bytes(8)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for fd, name in enumerate((os.devnull, os.devnull, stderr)):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), fd)
            merging.record_finished = record_and_signal
            if before:
                disturb_before(*before, counted, vanish)
            os._exit(run(words))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)  # it is still there, if only to be waited for
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, int.from_bytes(counted[:8], "little"), file=answers, flush=True)


def disturb_before(number: int, folder: str, counted: mmap.mmap, vanish: bool) -> None:
    """Kill this process, or remove a folder, right before the so-many-th operation below it."""

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(folder):
            done = int.from_bytes(counted[:8], "little") + 1
            counted[:8] = done.to_bytes(8, "little")
            if done == number and vanish:
                shutil.rmtree(folder)
            elif done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by its relative path."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def survive(
    forks: Forks, words: list[str], out: Path, rounds: int, seed: int, old: list[str] | None = None
) -> dict[str, int]:
    """Kill a verb so many times; returns how often what was seen.

    Args:
        forks: runs it.
        words: of the command line, without the output.
        out: the output, in a folder of its own.
        rounds: how many kills.
        seed: of the random moments.
        old: a command line whose output is there before, and is replaced with --force.
    """
    folder, end, times = out.parent, ["-o", str(out)], []
    before: dict[str, bytes] = {}
    if old:
        empty(folder)
        assert forks.run([*old, *end], fork=False) == 0, old
        before, end = files_in(folder), ["--force", *end]
    words = [*words, *end]

    def begin() -> None:
        empty(folder)
        for name, data in before.items():
            (folder / name).write_bytes(data)

    begin()
    assert forks.run(words, fork=False) == 0, words
    for _ in range(2):
        begin()
        started = time.perf_counter()
        assert forks.run(words) == 0, words
        times.append(time.perf_counter() - started)
    whole, moments = files_in(folder), random.Random(seed)
    kinds = ("killed", "before an operation", "complete", "absent", "old", "only in part in place")
    seen = dict.fromkeys((*kinds, "left over", "finished by the next"), 0)
    begin()
    assert forks.run(words, before=(0, str(folder))) == 0
    begun, turn, operations = False, -1, forks.operations
    while seen["killed"] < rounds:
        if not begun:
            begin()
        turn += 1
        if turn % 2:
            operation = operations - turn // 2 % operations
            code = forks.run(words, before=(operation, str(folder)))
        else:
            code = forks.run(words, kill_after=moments.uniform(0.1, 1) * min(times))
        assert code in (0, -signal.SIGKILL), code
        there = files_in(folder)
        found = {name: data for name, data in there.items() if ".partial-" not in name}
        begun = False
        if code == 0:  # it was faster, or what a killed run left took other operations
            assert found == whole
            continue
        state = "complete" if found == whole else "old" if out.exists() else "absent"
        assert state != "old" or found == before, (turn, sorted(there))
        seen[state] += 1
        seen["killed"] += 1
        seen["before an operation"] += turn % 2
        seen["only in part in place"] += state == "absent" and bool(found)
        seen["left over"] += any(".partial-" in path.name for path in folder.iterdir())
        if state != "complete" and moments.random() < 0.7 and seen["killed"] < rounds:
            begun = True  # the next run is killed, too
            continue
        # An output that exists is refused; what is left over goes all the same.
        assert forks.run(words) == (2 if state == "complete" and not old else 0)
        seen["finished by the next"] += state != "complete"
        assert files_in(folder) == whole
    return seen


def survive_training(forks: Forks, words: list[str], out: Path, rounds: int) -> dict[str, int]:
    """Kill training, whose output is the best bundle so far, and resume it where it was."""
    import fourierft_export as ff

    words, moments = [*words, "-o", str(out)], random.Random(0)
    empty(out.parent)
    assert forks.run(words, fork=False) == 0
    empty(out.parent)
    started = time.perf_counter()
    assert forks.run(words, before=(0, str(out.parent))) == 0
    took, whole = time.perf_counter() - started, out.read_bytes()
    seen = {"killed": 0, "before an operation": 0, "bundle": 0, "absent": 0}
    seen |= {"resumed": 0, "begun anew": 0}
    turn, operations = -1, forks.operations
    while seen["killed"] < rounds:
        empty(out.parent)
        turn += 1
        if turn % 2:
            operation = operations - turn // 2 * 3 % operations
            code = forks.run(words, before=(operation, str(out.parent)))
        else:
            code = forks.run(words, kill_after=moments.uniform(0.1, 1) * took)
        if code == 0:
            continue
        assert code == -signal.SIGKILL, code
        seen["killed"] += 1
        seen["before an operation"] += turn % 2
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
    for name in ("graph", "old"):
        bundle(names[:4]).save(folder / f"{name}.bundle")
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
    "export-paired": "export --base @small --bundle @small.bundle --mode paired",
    "export-genai": "export --base @small --bundle @small.bundle --mode merged --genai",
    "apply-paired": "apply --onnx @graph.onnx --bundle @graph.bundle --mode paired",
    "train": "train --model @small --task text-generation --data @rows.jsonl --steps 3",
}
# What is there before, and is replaced.
OLD = {"apply-paired": "apply --onnx @graph.onnx --bundle @old.bundle --mode paired"}


def kill_verb(forks: Forks, verb: str, folder: Path, rounds: int) -> dict[str, int]:
    """Kill one of `VERBS` so many times; `folder` is that of `make_inputs`."""
    words, old = (table.get(verb, "").replace("@", f"{folder}/").split() for table in (VERBS, OLD))
    out = folder / f"{verb}-outputs" / ("out.onnx" if words[0] in ("apply", "export") else "out")
    if verb == "train":
        return survive_training(forks, words, out, rounds)
    return survive(forks, words, out, rounds, len(verb), old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verbs", nargs="*", help=f"of {', '.join(VERBS)}; all by default")
    parser.add_argument("--rounds", type=int, default=100, help="kills of each verb")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name))
        for verb in arguments.verbs or VERBS:
            started = time.perf_counter()
            forks = Forks(*(TORCH if verb.startswith(("export", "train")) else []))
            seen = kill_verb(forks, verb, Path(name), arguments.rounds)
            print(verb, seen, f"{time.perf_counter() - started:.0f} s", flush=True)
            forks.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2:])
    else:
        main()
