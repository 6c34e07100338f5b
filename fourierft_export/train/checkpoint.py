"""The folder beside a run's bundle: its checkpoint, what must be the same to resume from it."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

from ..bundle.bundle import SUFFIX, Bundle
from ..errors import BadInputError, FileAccessError, UsageError
from ..files.staging import staged_file

FOLDER_SUFFIX = ".train"
METRICS, PICTURE, FACTS = "metrics.json", "curve.png", "run.json"
ADAPTER, STATE = f"adapter{SUFFIX}", "trainer_state.json"
LAST_STEP = f"last_step{SUFFIX}"  # beside an adapter that is a mean over steps
AGAIN = "begin again with --force in place of --resume"
STEPS = "steps of an epoch, which also follow from --accumulate and the number of processes"
PLAN = ("rows", "rows to score", STEPS)
# Settings that may differ when a run is resumed: they change how, not what, is computed.
FREE = frozenset(
    {
        *("accumulate", "device", "eval_every", "gradient_checkpointing"),
        *("patience", "report_to", "threads"),
    }
)


def folder_of(out: str | os.PathLike[str]) -> Path:
    """Where the checkpoint, metrics and picture of a run lie: beside its bundle."""
    path = Path(out)
    return path.with_name(path.name + FOLDER_SUFFIX)


def last_checkpoint(out: str | os.PathLike[str]) -> Path:
    """The newest whole checkpoint of a run; `trainer_state.json` is written last into one."""
    found = {}
    for path in folder_of(out).glob("checkpoint-*"):
        try:
            json.loads((path / STATE).read_text("utf-8"))
            found[int(path.name.partition("-")[2])] = path
        except (OSError, ValueError):
            continue
    if not found:
        raise FileAccessError(
            folder_of(out),
            expected="the checkpoint of a run that was stopped",
            found="none",
            remedy="leave --resume out to begin one",
        )
    return found[max(found)]


def read_history(checkpoint: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the Trainer logged until a checkpoint, which must be whole and of the same run."""
    for path in checkpoint.glob("*.p*"):
        if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():
            raise BadInputError(path, expected="a whole file", remedy=AGAIN)
    for path in checkpoint.glob(f"*{SUFFIX}"):
        Bundle.load(path)
    folder = checkpoint.parent
    try:
        found: list[dict[str, Any]] = json.loads((checkpoint / STATE).read_text())["log_history"]
        _check_same_run(json.loads((folder / FACTS).read_text("utf-8")), facts, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        lacks = f"one that lacks something: {error!r}"
        raise BadInputError(
            folder, expected="the whole state of a run", found=lacks, remedy=AGAIN
        ) from error
    return found


def _check_same_run(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to resume with another model, data, settings or plan than the run began with."""
    old, new = before["settings"], now["settings"]
    wrong = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted({*old, *new} - FREE)
        if old.get(key) != new.get(key)
    ]
    if before["adapter"] != now["adapter"]:
        wrong.append("adapter: another than then")
    for key in PLAN:
        if not wrong and before[key] != now[key]:
            wrong.append(f"{key}: {before[key]} then, {now[key]} now")
    if wrong:
        raise UsageError(
            where,
            expected="the settings, model and data that the run began with",
            found=f"{len(wrong)} that differ",
            remedy=f"give the same ones, or {AGAIN}",
            offenders=wrong,
        )


def publish(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint's bundle to `out`, which is the old file or the new one at any moment."""
    content = (checkpoint / ADAPTER).read_bytes()
    with staged_file(out, force=True) as partial:
        partial.write_bytes(content)
