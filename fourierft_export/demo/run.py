"""`run_demo`: the whole job on real data, without a download, on the package's public names."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, missing_extra
from ..files.staging import check_output, staged_directory
from ..types import Progress

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from .digits import Digits

NEEDED = {"torch": "torch", "onnxscript": "torch", "onnxruntime": "ort"}
NEEDED |= {"transformers": "hf", "datasets": "hf", "sklearn": "hf"}
BASE, PICTURE, REPORT = "base", "demo.png", "report.json"
MODES = ("merged", "unmerged")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


@dataclass(frozen=True)
class DemoResult:
    """The whole demo: the base's figures, and what `ship` says of each adapter.

    Files are named relative to `directory`; `picture` is None without matplotlib; `seconds` are by
    phase and "total".
    """

    directory: Path
    seed: int
    images: Mapping[str, int]
    accuracy: float
    parameters: int
    base: str
    base_bytes: int
    adapters: tuple[Mapping[str, Any], ...]
    picture: str | None
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"directory": str(self.directory), "adapters": list(self.adapters)}


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
    it inverted and rotated ones. Each is merged into the checkpoint and exported to ONNX merged and
    unmerged; PyTorch, the merged checkpoint and both ONNX files must agree on all test images. The
    folder appears complete or not at all.

    Args:
        out_dir: the folder to make: `base/`, and per adapter `NAME.fourierft.safetensors`,
            `merged-NAME/`, `NAME.merged.onnx`, `NAME.unmerged.onnx`; `demo.png` (where matplotlib
            is installed) and `report.json`.
        seed: of the split, the base's weights and the order of the images; 0 to 2^32 - 1.
        base_epochs: passes over the upright images.
        adapter_epochs: passes over the changed images, for each adapter.
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
    for name, value, least in (
        ("seed", seed, 0), ("base_epochs", base_epochs, 1), ("adapter_epochs", adapter_epochs, 1)
    ):  # fmt: skip
        if not least <= value < 2**32:
            raise UsageError(name, expected=f"{least} to 2^32 - 1", found=str(value))
    for package, extra in NEEDED.items():
        if find_spec(package) is None:
            raise missing_extra(package, extra, "demo")
    check_output(out_dir, force=force)
    report = progress or (lambda _what, _done, _total: None)
    started = time.monotonic()
    seconds: dict[str, float] = {}
    with staged_directory(out_dir, force=force) as folder, _one_thread():
        report("loading torch", 0, 1)
        from . import digits

        training, test = digits.load(seed)
        model: Any = digits.pretrain(
            training,
            epochs=base_epochs,
            seed=seed,
            progress=lambda done, total: report("training the base", done, total),
        )
        model.save_pretrained(folder / BASE)
        seconds["base"] = round(time.monotonic() - started, 2)
        seen, adapters = _predict(model, test), []
        views: dict[str, Any] = {"upright": (test.images, seen, seen)}
        for number, name in enumerate(digits.CHANGES):
            bundle = learn_adapter(
                folder, training, name, epochs=adapter_epochs, seed=seed, progress=report
            )
            report("merging, exporting, proving", number, len(digits.CHANGES))
            adapter, views[name] = ship(folder, bundle, name, test.changed(name))
            adapters.append(adapter)
            seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 2)
        report("merging, exporting, proving", len(adapters), len(adapters))
        result = DemoResult(
            directory=Path(out_dir).absolute(),
            seed=seed,
            images={"train": len(training.labels), "test": len(test.labels)},
            accuracy=float((seen == test.labels).double().mean()),
            parameters=sum(p.numel() for p in model.parameters()),
            base=BASE,
            base_bytes=(folder / BASE / "model.safetensors").stat().st_size,
            adapters=tuple(adapters),
            picture=PICTURE if find_spec("matplotlib") else None,
            seconds=seconds | {"total": round(time.monotonic() - started, 2)},
        )
        if result.picture:
            from .show import draw

            draw(result, views, test.labels, folder / PICTURE)
        text = json.dumps(result.to_dict() | {"directory": "."}, indent=2)
        (folder / REPORT).write_text(text + "\n", "utf-8")
    return result


def learn_adapter(
    folder: Path, data: Digits, name: str, *, epochs: int, seed: int, progress: Progress
) -> Bundle:
    """Train an adapter of the base for one change of the images, and write its bundle."""
    from ..bundle.bundle import Bundle
    from ..train.settings import TrainSettings
    from ..train.task import TrainingTask
    from ..train.train import train_adapter
    from . import digits

    base = _load(folder / BASE)
    base.config._name_or_path = BASE  # a bundle names its base: not by a path of this machine
    collator = digits.collator(seed, digits.CHANGES[name])
    task = TrainingTask(base, data.rows(), data_collator=collator)
    # Found by experiment. The scaling is PEFT's default; at the paper's for vision transformers,
    # 300, the learning rate would be half of it (0.2 to 0.3 there).
    settings = TrainSettings(
        n_frequency=64, scaling=150.0, learning_rate=0.15, layer_rates="same",
        target_modules=TARGETS, epochs=epochs, batch_size=digits.BATCH, warmup=0.15,
        schedule="cosine", average=0.0, seed=seed, device="cpu", eval_share=0.0, eval_every=10**6,
    )  # fmt: skip

    def report(_what: str, done: int, total: int) -> None:
        progress(f"training the adapter {name}", done, total)

    path = folder / f"{name}.fourierft.safetensors"
    with tempfile.TemporaryDirectory(dir=folder) as work:
        train_adapter(task, Path(work) / path.name, settings, picture=False, progress=report)
        os.replace(Path(work) / path.name, path)
    return Bundle.load(path)


def ship(folder: Path, bundle: Bundle, name: str, test: Digits) -> tuple[dict[str, Any], Any]:
    """Merge a bundle, export it in both modes, and prove all of it on the test images."""
    import numpy as np
    import onnxruntime

    from ..adapt.attach import attach
    from ..merge.merge import merge_checkpoint
    from ..onnx_graph.trace.pretrained import export_pretrained
    from ..proof.validate import validate

    base, merged = folder / BASE, folder / f"merged-{name}"
    merge_checkpoint(base, [bundle], merged)
    files = [folder / f"{name}.{mode}.onnx" for mode in MODES]
    for file, mode in zip(files, MODES, strict=True):
        export_pretrained(base, [bundle], file, mode=mode)
    inputs = {"pixel_values": test.images.numpy()}
    proof = validate(base=base, bundle=bundle, merged=merged, onnx=files, inputs=inputs)
    proof.raise_for_failure()
    onnx_accuracy = {}
    for file in files:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        seen = session.run(["logits"], inputs)[0].argmax(-1)
        onnx_accuracy[file.name] = float(np.mean(seen == test.labels.numpy()))
    before = _predict(_load(base), test)
    after = _predict(attach(_load(base), bundle, name), test)
    pairs = [
        (pair.right, pair.outputs[0].difference)
        for pair in proof.comparisons
        if pair.left == "torch" and pair.expect == "equal"
    ]
    found = {
        "name": name,
        "coefficients": sum(spectrum.size for spectrum in bundle.spectra.values()),
        "accuracy_before": float((before == test.labels).double().mean()),
        "accuracy_after": float((after == test.labels).double().mean()),
        "accuracy_onnx": onnx_accuracy,
        "bundle": f"{name}.fourierft.safetensors",
        "bundle_bytes": (folder / f"{name}.fourierft.safetensors").stat().st_size,
        "merged": merged.name,
        "onnx_bytes": {file.name: file.stat().st_size for file in files},
        "max_abs": {right.removeprefix("onnx:"): d.max_abs for right, d in pairs if d},
        "logits_scale": max((d.scale for _, d in pairs if d), default=0.0),
    }
    return found, (test.images, before, after)


def _load(directory: Path) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(directory).eval()


def _predict(model: Any, test: Digits) -> Any:
    import torch

    with torch.no_grad():
        return model(pixel_values=test.images).logits.argmax(-1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, with global generators left as they were."""
    import torch

    from ..models.load import quiet_transformers

    threads, state = torch.get_num_threads(), random.getstate()
    torch.set_num_threads(1)
    try:
        with quiet_transformers():
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(state)
