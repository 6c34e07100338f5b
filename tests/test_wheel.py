"""The wheel works where only the core dependencies are installed.

The dependencies are linked from this environment, found through the wheel's own metadata, so the
test needs no index: what the metadata does not name is not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def call(*argv: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(a) for a in argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: building in place would leave files there."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fourierft_export", source / "fourierft_export", ignore=ignore)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    call(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    return path


def core_dependencies(metadata: PathDistribution) -> set[str]:
    """Names of the distributions that the wheel's metadata asks for without any extra."""
    found: set[str] = set()
    waiting = list(metadata.requires or [])
    while waiting:
        requirement = Requirement(waiting.pop())
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in found:
            found.add(requirement.name)
            waiting += distribution(requirement.name).requires or []
    return found


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment with the wheel, its core dependencies and pip."""
    home = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "venv", cwd=home)
    scripts = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(call(python, "-c", where, cwd=home).strip())
    call(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=home)
    (metadata,) = site.glob("fourierft_export-*.dist-info")
    for name in core_dependencies(PathDistribution(metadata)):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution(name).locate_file(top))
    return scripts


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fourierft_export").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {"fourierft_export/py.typed", "fourierft_export/bundle/FORMAT.md"} <= names


def test_no_extra_leaks_in(scripts: Path, tmp_path: Path) -> None:
    script = "import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    names = ["torch", "onnxruntime", "transformers", "sklearn", "peft", "matplotlib", "pytest"]
    assert call(scripts / "python", "-c", script.format(names=names), cwd=tmp_path) == "[]\n"


def test_pack_and_inspect(scripts: Path, stories_adapter: Path, tmp_path: Path) -> None:
    program = scripts / "fourierft-export"
    bundle = tmp_path / "a.fourierft.safetensors"
    call(program, "pack", stories_adapter, "-o", bundle, cwd=tmp_path)
    report = call(scripts / "python", "-m", "fourierft_export", "inspect", bundle, cwd=tmp_path)
    assert "q_proj" in report
    assert json.loads(call(program, "inspect", bundle, "--json", cwd=tmp_path))["ok"] is True


def test_a_missing_extra_is_named(
    scripts: Path, stories_adapter: Path, stories260k: Path, tmp_path: Path
) -> None:
    adapter = ["--base", stories260k, "--bundle", stories_adapter]
    argv = ["export", *adapter, "--mode", "merged", "-o", "a.onnx"]
    done = subprocess.run(
        [str(scripts / "fourierft-export"), *map(str, argv)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "pip install 'fourierft-export[" in done.stderr
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_the_lowest_versions_in_ci_are_those_that_the_package_claims() -> None:
    """`.ci/lowest` installs and tests constraints-lowest.txt."""
    lines = (ROOT / "samples" / "constraints-lowest.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name: next(iter(pin.specifier)).version for pin in pins}
    toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["ort"]]
    claims = [Requirement(text) for text in texts]
    tests = re.findall(r"tests/\S+\.py", (ROOT / ".ci" / "lowest").read_text("utf-8"))
    assert tests and not [name for name in tests if not (ROOT / name).is_file()]
    for claim in (one for one in claims if one.marker is None):
        lowest = next(iter(claim.specifier)).version
        assert f"{pinned[claim.name]}.".startswith(f"{lowest}."), claim.name
