"""Two processes against one: curves, gradients, a base spread over both, state dicts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).with_name("together.py")
ROOT = SCRIPT.parent.parent.parent
EXACT = {"rel": 1e-6}
STOPPED_AT = 14  # the last state is that of step 10
HALF = {"rel": 2.0**-8}  # in bfloat16 a batch of another size is rounded otherwise


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("together", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


together = load_script()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "stopped").mkdir()
    with pytest.raises(together.DiedError):
        together.train("classifier", folder / "stopped", stop_at=STOPPED_AT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(SCRIPT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text("utf-8")) for rank in (0, 1)]


@pytest.mark.parametrize("name", together.RUNS)
def test_two_processes_learn_as_one(seen: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    alone = together.train(name, tmp_path)
    two = seen[0][name]
    assert (alone["processes"], two["processes"]) == (1, 2)
    assert alone["loss"][-1] < 0.99 * alone["loss"][0]
    close = HALF if "bfloat16" in name else EXACT
    assert two["loss"] == pytest.approx(alone["loss"], **close)
    for mine, other in zip(two["evaluations"], alone["evaluations"], strict=True):
        assert mine["step"] == other["step"]
        assert mine["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], **close)
        counted = {k: v for k, v in other["metrics"].items() if k != "loss"}
        assert counted.items() <= mine["metrics"].items()
    assert seen[1][name] == two, "both processes must know the same"


def test_two_processes_go_on_where_one_stopped(seen: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = together.train("classifier", tmp_path)
    resumed = seen[0]["resumed"]
    assert len(alone["loss"]) > STOPPED_AT
    assert resumed["loss"][:10] == alone["loss"][:10]
    assert resumed["loss"] == pytest.approx(alone["loss"], **EXACT)
    assert seen[1]["resumed"] == resumed


def test_sums_and_flags(seen: list[dict[str, Any]]) -> None:
    for rank, process in enumerate(seen):
        found = process["collectives"]
        assert found["identity"] == [rank, 2, rank == 0, "cpu"]
        assert found["sum"] == [1.5 + 2.5, 2.0 + 3.0]
        assert found["left alone"] == [1.5 + rank, 2.0 + rank]
        assert found["any"] == [True, False, True]


def test_gradients_are_added_up(seen: list[dict[str, Any]]) -> None:
    first = (2 * torch.arange(6.0).view(3, 2).T + 1).tolist()
    second = torch.ones(2, 3).tolist()  # from one process; the other had no gradient
    for process in seen:
        found = process["collectives"]
        assert found["gradients"] == [first, second, None, [1.0, 2.0], None]
        assert found["dtype"] == "torch.bfloat16"


def test_everybody_gets_the_writers_values(seen: list[dict[str, Any]]) -> None:
    for process in seen:
        assert process["collectives"]["levelled"] == [[[0.0] * 2] * 3, [0, 1, 2], False]
        assert process["collectives"]["same"], "values are set in place"
    # Each process drew its own base.
    torch.manual_seed(0)
    writers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    expected = writers(torch.ones(1, 4)).sum().item()
    for process in seen:
        assert process["frozen"] == pytest.approx([expected, expected], rel=1e-6)


def test_different_models_are_refused_everywhere(seen: list[dict[str, Any]]) -> None:
    for rank, process in enumerate(seen):
        assert process["other models"].startswith(f"process {rank} of 2: expected the same model")


def test_bundles_and_state_dicts_of_wrapped_models(seen: list[dict[str, Any]]) -> None:
    for process in seen:
        found = process["state dicts"]
        same = ("ddp", "attached to ddp", "sharded", "into fsdp", "user's fsdp")
        assert [found[key] for key in same] == [found["expected"]] * len(same)
        assert found["attached to fsdp"]
        assert max(found["output"]) <= 1e-6
        assert "put the adapter on the model first" in found["refused"]
    # A full state dict is gathered for the writer alone.
    assert seen[0]["state dicts"]["keys"]
    assert seen[0]["state dicts"]["from fsdp"] == seen[0]["state dicts"]["expected"]


def test_a_sharded_base_is_halved_and_the_adapter_is_whole(seen: list[dict[str, Any]]) -> None:
    splits = [process["state dicts"]["split"] for process in seen]
    assert sum(split["local"] for split in splits) == splits[0]["all"]
    for split in splits:
        assert split["whole"] == split["learn"]
        assert split["local"] == pytest.approx(split["all"] / 2, rel=0.01)  # odd numbers of rows
    torch.manual_seed(5)
    base = together.classifier()
    assert splits[0]["all"] == sum(p.numel() for p in base.parameters())
