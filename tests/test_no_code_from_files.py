"""No file that somebody else made can run code: nothing unpickles or evaluates what it reads."""

from __future__ import annotations

import ast
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fourierft_export as ff
from fourierft_export.errors import BadInputError
from tests.test_layering import SOURCE
from tests.train.test_run import interrupted, settings
from tests.train.toy import small_task

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
# The call, and the argument without which it would unpickle.
SAFE_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def find_dangers(source: str) -> list[str]:
    """The calls and imports of a module that could run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            error_only = [alias.name for alias in node.names] == ["UnpicklingError"]
            modules = [] if node.level or error_only else [node.module or ""]
        else:
            modules = []
        found += [one for one in modules if one.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN_CALLS or (name.startswith("os.") and last in FORBIDDEN_CALLS):
            found.append(name)
        elif name in ("numpy.load", *SAFE_WITH):
            argument, value = SAFE_WITH[name.replace("numpy.", "np.")]
            found += [] if given.get(argument) == str(value) else [name]
        elif given.get("trust_remote_code", "False") != "False":
            found.append(f"{name}(trust_remote_code)")
        elif given.get("allow_pickle", "False") != "False":
            found.append(f"{name}(allow_pickle)")
        elif given.get("shell", "False") != "False":
            found.append(f"{name}(shell)")
    return found


def test_nothing_in_the_package_could_run_code_from_a_file() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = {
        file.relative_to(SOURCE).as_posix(): dangers
        for file in files
        if (dangers := find_dangers(file.read_text("utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "numpy.load(path)",
        "def f():\n    return eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_what_could_is_found(source: str) -> None:
    assert len(find_dangers(source)) == 1
    assert not find_dangers("torch.load(path, weights_only=True); model.eval(); re.compile(text)")


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.touch, (self.made,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_to_resume_from_cannot_run_code(name: str, tmp_path: Path) -> None:
    out, made, settled = tmp_path / "a", tmp_path / "made", settings()
    with pytest.raises(KeyboardInterrupt):
        ff.train_adapter(interrupted(small_task(), 6, signal.SIGINT), out, settled, picture=False)
    (file,) = tmp_path.glob(f"a.train/checkpoint-*/{name}")
    torch.save(Hostile(made), file)
    torch.load(file, weights_only=False)
    assert made.exists()  # the file is one that would
    made.unlink()
    with pytest.raises(BadInputError, match="could run code"):
        ff.train_adapter(small_task(), out, settled, resume=True, picture=False)
    assert not made.exists()
    file.write_bytes(pickle.dumps(Hostile(made)))
    with pytest.raises(BadInputError, match=name):
        ff.train_adapter(small_task(), out, settled, resume=True, picture=False)
    assert not made.exists()
