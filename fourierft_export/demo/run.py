"""`run_demo`: the whole job on real data, without a download."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ..errors import UsageError, missing_extra
from ..files.staging import check_output, staged_directory
from ..types import Progress
from .result import DemoResult

NEEDED = {"torch": "torch", "onnxscript": "torch", "onnxruntime": "ort", "sklearn": "demo"}
PICTURE = "demo.png"
REPORT = "report.json"


def run_demo(
    out_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    base_epochs: int = 20,
    adapter_epochs: int = 12,
    force: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Train a base and two adapters on scikit-learn's digits; pack, merge, export and prove them.

    A small vision transformer learns upright digits. Two FourierFT adapters, a few KB each, teach
    it inverted and rotated ones. Each adapter is packed into a bundle, merged into the checkpoint
    and exported to ONNX merged and unmerged; PyTorch, the merged checkpoint and both ONNX files
    must agree on all test images. The folder appears complete or not at all.

    Args:
        out_dir: the folder to make: `base/`, and per adapter `NAME.fourierft.safetensors`,
            `merged-NAME/`, `NAME.merged.onnx`, `NAME.unmerged.onnx`; `demo.png` (where matplotlib
            is installed) and `report.json`.
        seed: of the split, the base's weights and the order of the images; 0 to 2^32 - 1. The
            same seed gives the same numbers on the same machine.
        base_epochs: passes over the upright images.
        adapter_epochs: passes over the shifted images, for each adapter.
        force: replace an existing folder.
        progress: called with (what, done, total).

    Returns:
        Accuracies, sizes, differences and where the files are.

    Raises:
        UsageError: a value is out of range; the folder exists, without `force`.
        MissingExtraError: a package that this needs is not installed.
        ValidationError: the artifacts do not agree.
        FileAccessError: the folder cannot be written.
    """
    _check(seed, base_epochs, adapter_epochs)
    check_output(out_dir, force=force)
    tell = progress or _silent
    started = time.monotonic()
    seconds: dict[str, float] = {}

    with _timed(seconds, "imports"):
        tell("loading torch", 0, 1)
        from . import digits, learn, steps, vit
    with staged_directory(out_dir, force=force) as folder:
        training, test = digits.load(seed)
        with _timed(seconds, "base"):
            model = steps.pretrain(
                training, epochs=base_epochs, seed=seed, progress=_named(tell, "training the base")
            )
            vit.save(model, folder / steps.BASE)
        seen = learn.predict(model, test.images)
        views = {"upright": steps.Views(test.images, seen, seen)}
        adapters = []
        for number, (name, shift) in enumerate(digits.SHIFTS.items()):
            with _timed(seconds, f"adapter {name}"):
                bundle = steps.learn_adapter(
                    model,
                    training,
                    name,
                    epochs=adapter_epochs,
                    seed=seed,
                    progress=_named(tell, f"training the adapter {name}"),
                )
                file = bundle.save(folder / f"{name}.fourierft.safetensors").name
            tell("merging, exporting, proving", number, len(digits.SHIFTS))
            with _timed(seconds, f"ship {name}"):
                adapter, views[name] = steps.ship(folder, file, name, test.shifted(shift))
            adapters.append(adapter)
        tell("merging, exporting, proving", len(adapters), len(adapters))
        result = DemoResult(
            directory=Path(out_dir).absolute(),
            seed=seed,
            images={"train": len(training.labels), "test": len(test.labels)},
            accuracy=learn.accuracy(seen, test.labels),
            parameters=sum(p.numel() for p in vit.load(folder / steps.BASE).parameters()),
            base=steps.BASE,
            base_bytes=(folder / steps.BASE / "model.safetensors").stat().st_size,
            adapters=tuple(adapters),
            picture=PICTURE if find_spec("matplotlib") else None,
            seconds=seconds,
        )
        if result.picture:
            with _timed(seconds, "picture"):
                from .picture import draw

                draw(result, views, test.labels, folder / PICTURE)
        seconds["total"] = round(time.monotonic() - started, 2)
        result = replace(result, seconds=dict(seconds))
        text = json.dumps(result.to_dict() | {"directory": "."}, indent=2)
        (folder / REPORT).write_text(text + "\n", "utf-8")
    return result


def _check(seed: int, base_epochs: int, adapter_epochs: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError("seed", expected="0 to 2^32 - 1", found=str(seed))
    for name, epochs in (("base_epochs", base_epochs), ("adapter_epochs", adapter_epochs)):
        if epochs < 1:
            raise UsageError(name, expected="1 or more", found=str(epochs))
    for package, extra in NEEDED.items():
        if find_spec(package) is None:
            raise missing_extra(package, extra, "demo")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - started, 2)


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""
