"""Which files of a base folder a merge copies, and which it leaves out.

Everything that is not weights is copied. Weights in other formats still hold the base, and a
loader that prefers them would silently serve the base: they are stale, and left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from ..errors import FileAccessError
from ..files import strict_json
from ..files.safe_paths import check_link
from ..files.safetensors_reader import open_regular, read_exactly, read_file

MANIFEST = "manifest.json"
STALE_SUFFIXES = (
    ".safetensors", ".bin", ".h5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".onnx.data",
    ".onnx_adapter", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml", ".ot",
    ".tflite", ".mlmodel", ".index.json", ".data-00000-of-00001",
)  # fmt: skip
STALE_FOLDERS = ("onnx", "openvino", "coreml", "tf_model", "flax_model")
# An adapter_config.json in a model's folder makes transformers load that adapter on top.
STALE_NAMES = ("adapter_config.json", "tf_model.h5", MANIFEST)
PRIVATE_FOLDERS = (".git", ".cache", ".ipynb_checkpoints", "__pycache__")
BLOCK = 8 << 20


def sort_files(
    directory: Path, weights: Iterable[Path] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide the files of a folder, but for `weights`, in those to copy and those that are stale.

    They are paths relative to the folder, with "/".
    """
    own_weights = {path.name for path in weights}
    modules = _module_folders(directory)
    copied: list[str] = []
    stale: list[str] = []
    for path in sorted(_walk(directory), key=str):
        if len(path.parts) > 1 or path.name not in own_weights:
            is_stale = path.parts[0] not in modules and _is_stale(path)
            (stale if is_stale else copied).append(str(path))
    return tuple(copied), tuple(stale)


def measure_file(directory: Path, name: str, *, allow_links: bool = False) -> int:
    """Return the size of a file of a folder in bytes; an error if it may not or cannot be read."""
    path = check_link(directory / name, directory, allow_links=allow_links)
    with open(open_regular(path), "rb") as file:
        return os.fstat(file.fileno()).st_size


def read_blocks(directory: Path, name: str, *, allow_links: bool = False) -> Iterator[bytes]:
    """Yield the content of a file of a folder, in pieces."""
    path = check_link(directory / name, directory, allow_links=allow_links)
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for at in range(0, size, BLOCK):
            yield read_exactly(file.fileno(), at, min(at + BLOCK, size), path)


def hash_file(directory: Path, name: str, *, allow_links: bool = False) -> tuple[str, int]:
    """Return the sha256 of a file of a folder, in hex, and its size in bytes."""
    digest, size = hashlib.sha256(), 0
    for block in read_blocks(directory, name, allow_links=allow_links):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def _is_stale(path: PurePosixPath) -> bool:
    name = path.name.lower()
    folders = path.parts[:-1]
    in_stale_folder = any(part in STALE_FOLDERS or part.endswith(".mlpackage") for part in folders)
    return name.endswith(STALE_SUFFIXES) or name in STALE_NAMES or in_stale_folder


def _module_folders(directory: Path) -> set[str]:
    """Find the folders of a sentence-transformers pipeline: their weights are not stale."""
    path = directory / "modules.json"
    if not path.is_file():
        return set()
    modules = strict_json.loads(read_file(path, 1 << 20), os.fspath(path))
    entries = modules if isinstance(modules, list) else []
    paths = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return {part for p in paths if isinstance(p, str) for part in PurePosixPath(p).parts[:1]}


def _walk(directory: Path) -> Iterator[PurePosixPath]:
    """Yield every file below a folder; a linked folder counts as a file, and is not entered."""

    def fail(error: OSError) -> None:
        where, found = error.filename or directory, error.strerror or str(error)
        raise FileAccessError(where, expected="a readable folder", found=found)

    for folder, subfolders, files in os.walk(directory, onerror=fail):
        at = Path(folder)
        subfolders[:] = [s for s in subfolders if s not in PRIVATE_FOLDERS]
        linked = [s for s in subfolders if (at / s).is_symlink()]
        for name in [*files, *linked]:
            yield PurePosixPath((at / name).relative_to(directory).as_posix())
