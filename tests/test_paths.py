"""Every public function that reads a bundle takes an object, a path or a PEFT directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fourierft_export as ff

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
FORMS: dict[str, Callable[[Path, Path], Any]] = {
    "path": lambda bundle, _: bundle,
    "text": lambda bundle, _: str(bundle),
    "object": lambda bundle, _: ff.Bundle.load(bundle),
    "directory": lambda _, adapter: adapter,
    "directory as text": lambda _, adapter: str(adapter),
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Make, tiny_bundle: Make) -> Path:
    """A folder with the tiny Llama's graph, plain (its adapter counts 0) and swappable."""
    folder = tmp_path_factory.mktemp("graphs")
    base, bundle = tiny_base("llama"), tiny_bundle("llama", **TARGETS)
    ff.export_pretrained(base, bundle, folder / "plain.onnx", weights=[0.0])
    ff.export_pretrained(base, {"x": bundle}, folder / "swap.onnx", mode="swappable")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(
    form: str,
    graphs: Path,
    tiny_base: Make,
    tiny_adapter: Make,
    tiny_bundle: Make,
    tiny_model: Callable[[str], Any],
    tmp_path: Path,
) -> None:
    base, file = tiny_base("llama"), tiny_bundle("llama", **TARGETS)
    given = FORMS[form](file, tiny_adapter("llama", **TARGETS))
    wanted = ff.Bundle.load(file)

    model = ff.attach(tiny_model("llama"), given)
    assert ff.replace(model, given) is model
    ff.to_peft(given, tmp_path / "peft")
    assert ff.from_peft(tmp_path / "peft", base).to_bytes() == wanted.to_bytes()
    merged = tmp_path / "merged"
    assert len(ff.merge_checkpoint(base, given, merged).layers) == len(wanted.layers)
    assert ff.recover_bundle(base, merged, like=given)[0].spec.layers == wanted.spec.layers
    assert ff.validate(base=base, bundle=given, merged=merged, samples=4).ok
    for number, bundles in enumerate((given, [given], {"mine": given})):
        out = tmp_path / f"{number}.onnx"
        report = ff.apply_onnx(graphs / "plain.onnx", bundles, out, base=base)
        assert len(report.layers) == len(wanted.layers)
    session = ff.AdapterSession(graphs / "swap.onnx")
    session.load("mine", given)
    ids = {name: np.ones((1, 4), np.int64) for name in session.inputs}
    mine, own = session.run(ids, adapter="mine"), session.run(ids, adapter=None)
    assert any((mine[name] != own[name]).any() for name in session.outputs)


def test_what_is_neither_a_bundle_nor_a_path_is_refused(graphs: Path, tiny_base: Make) -> None:
    base, out = tiny_base("llama"), graphs / "never"
    session = ff.AdapterSession(graphs / "swap.onnx")
    calls: list[Callable[[Any], object]] = [
        lambda wrong: ff.merge_checkpoint(base, [wrong], out),
        lambda wrong: ff.export_pretrained(base, [wrong], out),
        lambda wrong: ff.apply_onnx(graphs / "plain.onnx", {"a": wrong}, out),
        lambda wrong: ff.to_peft(wrong, out),
        lambda wrong: ff.validate(base=base, bundle=wrong),
        lambda wrong: ff.recover_bundle(base, base, like=wrong),
        lambda wrong: session.load("a", wrong),
    ]
    for call in calls:
        with pytest.raises(ff.errors.UsageError, match="a bundle, or the path of a bundle"):
            call(5)
        with pytest.raises(ff.errors.FileAccessError, match="nothing there"):
            call(graphs / "missing.safetensors")
