"""The public names: each exists, loads on first use, and is typed and documented."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fourierft_export as ff

PUBLIC = """
AdapterSession Bundle BundleCallback FourierFTConfig FourierLinear Pool TrainSettings TrainingTask
activate active_adapters adapter_names apply_onnx attach capture combine detach disabled errors
export_onnx export_pretrained from_paper from_peft fuse inject merge_checkpoint parameter_groups
push recover_bundle recover_onnx replace restore route save_bundles suggest to_lora to_peft
train_adapter trainable_parameters unload validate verify_merged
""".split()  # noqa: SIM905
CALLABLES = [name for name in PUBLIC if name != "errors"]


def test_all_lists_the_public_names_sorted() -> None:
    assert ff.__all__ == PUBLIC == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(ff))


@pytest.mark.parametrize("name", CALLABLES)
def test_name_loads_and_is_documented(name: str) -> None:
    value = getattr(ff, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__module__.startswith("fourierft_export.")
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith(".")
    if name != "TrainSettings":  # its fields are options: `train --help` describes them
        assert "Args:" in text or "Attributes:" in text


EXAMPLES = (
    "AdapterSession",
    "Bundle",
    "FourierFTConfig",
    "Pool",
    "apply_onnx",
    "attach",
    "capture",
    "export_onnx",
    "fuse",
    "inject",
    "merge_checkpoint",
    "route",
    "to_lora",
    "to_peft",
    "validate",
)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_in_the_docstring_runs(name: str) -> None:
    value = getattr(ff, name)
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", {}, name, None, 0)
    assert examples.examples
    printed: list[str] = []
    result = doctest.DocTestRunner().run(examples, out=printed.append)
    assert result.failed == 0, "".join(printed)


def test_type_checkers_see_the_same_homes_as_the_loader() -> None:
    tree = ast.parse(Path(inspect.getfile(ff)).read_text("utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    seen = {
        alias.name: node.module.removeprefix("fourierft_export.")
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == ff._HOMES
    assert sorted([*seen, "errors"]) == PUBLIC


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = ff.no_such_name


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ff.__version__)
    assert version("fourierft-export") == ff.__version__


def test_a_missing_extra_is_named() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import fourierft_export as ff\n"
        "try:\n    ff.inject\n"
        "except ff.errors.MissingExtraError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "fourierft_export.inject: expected the package torch" in run.stdout
    assert "pip install 'fourierft-export[torch]'" in run.stdout
