"""Hub ids in place of paths: USER/REPO[@REVISION][:SUBFOLDER] on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import FileAccessError, first_line

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_NOT_OF_MODELS = ("adapter_*", "consolidated*")  # adapters beside it, and the weights once more
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "*.fourierft.safetensors",
    "*.fourierft.pool",
)
_BUNDLES = ADAPTER_FILES[2:]
_NAME = r"[A-Za-z0-9_][\w.-]*"
_ID = re.compile(
    rf"(?P<repo>{_NAME}/{_NAME})(@(?P<revision>[\w./-]+))?(:(?P<inside>[^\\:@]+))?", re.ASCII
)


class HubId(NamedTuple):
    """A repository, its revision (None: the main branch), and a folder or file in it ("")."""

    repo: str
    revision: str | None
    inside: str


def parse_hub_id(text: str) -> HubId | None:
    """The Hub id that a text is; None for other texts."""
    found = _ID.fullmatch(text)
    inside = (found["inside"] or "").strip("/") if found else ""
    if found is None or ".." in inside.split("/"):
        return None
    return HubId(found["repo"], found["revision"], inside)


def _absent_hub_id(source: str | os.PathLike[str]) -> HubId | None:
    """The Hub id that a text is; None for paths, and for texts whose first folder is here."""
    if not isinstance(source, str) or os.path.lexists(source.split("/")[0] or "/"):
        return None
    return parse_hub_id(source)


def local_model(
    source: str | os.PathLike[str], *, old_names: bool = False
) -> str | os.PathLike[str]:
    """The folder of a model; one of the Hub is fetched into its cache: weights, JSON, tokenizer.

    Args:
        source: a path or a Hub id.
        old_names: also take a name without a user for an id, as `gpt2`.
    """
    hub_id = _absent_hub_id(source)
    if old_names and isinstance(source, str) and not os.path.lexists(source):
        hub_id = hub_id or (HubId(source, None, "") if re.fullmatch(_NAME, source) else None)
    if hub_id is None:
        return source
    return _fetch(hub_id, MODEL_FILES, _NOT_OF_MODELS)


def local_adapter(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The folder of a PEFT adapter, or the file of a bundle or pool; likewise fetched."""
    hub_id = _absent_hub_id(source)
    if hub_id is None:
        return source
    path = _fetch(hub_id, ADAPTER_FILES)
    if path.is_file() or (path / ADAPTER_FILES[0]).exists():
        return path
    bundles = sorted(file for pattern in _BUNDLES for file in path.glob(pattern))
    if len(bundles) == 1:
        return bundles[0]
    raise FileAccessError(
        str(source),
        expected="a repository with a PEFT adapter or a bundle",
        found=f"{len(bundles)} bundles" if bundles else "neither",
        remedy=f"name a file or a folder in it: {hub_id.repo}:NAME",
        offenders=[file.name for file in bundles],
    )


def hub_failures() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a bad name, a refusal, or no network."""
    from huggingface_hub.errors import HfHubHTTPError

    # A failed connection is an error of the HTTP client, whose root HfHubHTTPError inherits.
    roots = tuple(root for root in HfHubHTTPError.__mro__ if root.__name__ == "HTTPError")
    return (*roots, HfHubHTTPError, OSError, ValueError)


def _fetch(hub_id: HubId, files: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """Fetches files of one folder of a repository into the Hub's cache; what is there stays.

    huggingface_hub decides where the cache is, whether the network may be used (HF_HUB_OFFLINE),
    and with which token.
    """
    repo, revision, inside = hub_id
    name = repo + (f"@{revision}" if revision else "") + (f":{inside}" if inside else "")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise FileAccessError(
            name,
            expected="a path",
            found="nothing there",
            remedy="for a Hub id, run: pip install 'fourierft-export[hf]'",
        ) from None

    if not sys.stderr.isatty():
        disable_progress_bars()
    root = f"{inside}/" if inside else ""
    is_file = inside.endswith((".safetensors", ".pool"))
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[inside] if is_file else [root + pattern for pattern in files],
            ignore_patterns=[f"{root}*/*", *(root + pattern for pattern in ignored)],
        )
    except hub_failures() as error:
        reason = first_line(error)
        raise FileAccessError(
            name,
            expected="a path, or the id of a repository on the Hugging Face Hub",
            found=f"no such path, and not on the Hub: {reason}",
            remedy="check the name, the network (HF_HUB_OFFLINE uses the cache) and the token "
            "(hf auth login)",
        ) from error
    path = Path(folder, inside)
    if not path.exists():
        wanted = inside or f"one of {', '.join(files)}"
        remedy = "check the repository on the Hub; USER/REPO:FOLDER names a folder in it"
        raise FileAccessError(
            name, expected=f"{wanted} in the repository", found="none", remedy=remedy
        )
    return path
