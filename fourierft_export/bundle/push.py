"""Uploads a bundle to the Hugging Face Hub, with a model card made from its spec."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import PurePath

from ..errors import FileAccessError, UsageError, first_line, missing_extra
from ..files.hub import hub_failures, parse_hub_id
from .bundle import SUFFIX, Bundle
from .describe import describe_bundle
from .peft import BundleSource, open_bundle

_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
}
BUNDLE_NAME = f"adapter{SUFFIX}"


def model_card(bundle: Bundle, repo: str, metrics: Mapping[str, float] | None = None) -> str:
    """Writes the README.md of a bundle's repository, with metrics as training measured them."""
    facts = describe_bundle(bundle)
    base = bundle.spec.base_model
    names = base is not None and parse_hub_id(base) is not None
    head = ["tags:", "- fourierft", "- fourierft-export"]
    head += [f"base_model: {json.dumps(base)}"] if names else []
    pipeline = _PIPELINES.get(bundle.spec.task_type or "")
    head += [f"pipeline_tag: {pipeline}"] if pipeline else []
    rows = {
        # Of a local path only the last name: the rest is the trainer's machine.
        "base model": f"`{base if names else PurePath(base).name}`" if base else "not named",
        "task": bundle.spec.task_type or "not named",
        "layers": f"{facts['layers']}",
        "coefficients": f"{facts['coefficients']:,} ({facts['bytes']:,} bytes as a file)",
        "seed, scaling": f"{bundle.spec.seed}, {bundle.spec.scaling}",
        "saved tensors": ", ".join(f"`{name}`" for name in bundle.saved) or "none",
        "base identified by hashes": "yes" if bundle.is_bound else "no, the bundle is unbound",
        "SHA-256 of the content": f"`{bundle.sha256}`",
    }
    layers = [
        f"| `{template}` | {group['n_frequency']} | "
        f"{' x '.join(map(str, group['shape'])) if group['shape'] else 'unknown'} |"
        for group in facts["groups"]
        for template in group["layers"]
    ]
    scores = [f"| {name} | {value:.4g} |" for name, value in (metrics or {}).items()]
    model = base if names else "BASE"
    return "\n".join(
        [
            "---", *head, "---",
            f"# {repo.partition('/')[2]}",
            "A FourierFT adapter ([arXiv 2405.03003](https://arxiv.org/abs/2405.03003)): a few "
            "coefficients of the spectrum of each weight change, in one checked file.",
            "",
            "| | |", "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            "| layers | n_frequency | shape |", "|---|---|---|",
            *layers,
            *(["", "| metric | value |", "|---|---|", *scores] if scores else []),
            "",
            "## How to use it",
            "```bash",
            "pip install 'fourierft-export[all]'",
            f"fourierft-export merge --base {model} --bundle {repo} -o merged",
            f"fourierft-export export --base {model} --bundle {repo} --mode merged -o model.onnx",
            f"fourierft-export unpack {repo} -o peft-adapter      # for PEFT",
            "```",
            "",
        ]
    )  # fmt: skip


def push(
    bundle: BundleSource,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    metrics: Mapping[str, float] | None = None,
    message: str = "Upload a FourierFT adapter",
) -> str:
    """Uploads a bundle to a repository of the Hugging Face Hub, with a model card.

    The repository is made if it is not there. The bundle becomes `adapter.fourierft.safetensors`,
    so that `USER/REPO` names it wherever a bundle is named, and the card README.md, in one commit.

    Args:
        bundle: a `Bundle`, or the path of one.
        repo: USER/REPO.
        private: make a private repository.
        revision: branch to commit to; by default the main one.
        metrics: name -> value for the card, as training measured them.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        UsageError: `repo` is no such id.
        MissingExtraError: huggingface_hub is not installed.
        FileAccessError: the Hub refuses, or cannot be reached.
    """
    found = parse_hub_id(repo)
    if found is None or found.revision or found.inside:
        expected = "the id of a repository, USER/REPO"
        raise UsageError("push", expected=expected, found=repr(os.fspath(repo)))
    opened = open_bundle(bundle, bind=True)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
    except ImportError:
        raise missing_extra("huggingface_hub", "hf", "push") from None
    card = model_card(opened, repo, metrics).encode()
    files = {BUNDLE_NAME: opened.to_bytes(), "README.md": card}
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except hub_failures() as error:
        reason = first_line(error)
        raise FileAccessError(
            repo,
            expected="a repository on the Hugging Face Hub that may be written",
            found=reason,
            remedy="check the name, the network and the token (hf auth login)",
        ) from error
    return str(commit.commit_url)
