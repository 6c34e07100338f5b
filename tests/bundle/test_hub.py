"""Hub ids in place of paths, and `push`, against a small server that answers as the Hub does.

Each verb runs in a process of its own, since huggingface_hub reads its settings while it is
imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import fourierft_export as ff
from fourierft_export.files.hub import parse_hub_id

COMMIT = "a" * 40


class Hub:
    """Repositories by id, each file name -> bytes; and the requests made."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.address = ""
        self.tokens: set[str | None] = set()

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", r) for r in self.requests)
        return {one[1] for one in found if one}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def note(self) -> str:
            hub.requests.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            return self.path

        def missing(self) -> None:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not found")

        def do_GET(self) -> None:
            path = self.note()
            if found := re.match(r"/api/models/([^/]+/[^/]+)/revision/([^/?]+)", path):
                files, revision = hub.files.get(found[1]), found[2]
                if files is None:
                    return self.missing()
                if revision not in ("main", "v1", COMMIT):
                    return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                names = [{"rfilename": name} for name in files]
                body = {"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": names}
                return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
            if found := re.match(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+", path):
                files = hub.files.get(found[1], {})
                rows = [
                    {"type": "file", "path": n, "size": len(d), "oid": "0" * 40}
                    for n, d in files.items()
                ]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            return self.send_file(path)

        do_HEAD = do_GET  # noqa: N815

        def send_file(self, path: str) -> None:
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            data = hub.files.get(found[1], {}).get(found[2]) if found else None
            if data is None:
                self.missing()
                return
            tag = hashlib.sha256(data).hexdigest()
            self.answer(
                200,
                b"" if self.command == "HEAD" else data,
                ETag=f'"{tag}"',
                X_Repo_Commit=COMMIT,
                Content_Length=str(len(data)),
            )

        def do_POST(self) -> None:
            path = self.note()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if path == "/api/repos/create":
                fields = json.loads(body)
                name = f"{fields.get('organization') or 'user'}/{fields['name']}"
                hub.files.setdefault(name, {})
                reply: Any = {"url": f"{hub.address}/{name}", "name": name}
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                reply = {
                    "files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]
                }
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/", path):
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        data = base64.b64decode(value["content"])
                        hub.files[found[1]][value["path"]] = data
                url = f"{hub.address}/{found[1]}/commit/{COMMIT}"
                reply = {"success": True, "commitOid": COMMIT, "commitUrl": url}
            else:
                reply = {}
            self.answer(200, json.dumps(reply).encode(), Content_Type="application/json")

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run_online(hub: Hub, tmp_path: Path) -> Run:
    """`run_online(*words, offline=False)`: a verb with --json, with the server as the Hub."""

    def run(*words: object, offline: bool = False) -> tuple[int, dict[str, Any]]:
        settings = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_secret",
        }
        command = [sys.executable, "-m", "fourierft_export", *map(str, words), "--json"]
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        done = subprocess.run(
            command, env={**os.environ, **settings}, cwd=work, capture_output=True, check=False
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done.returncode, json.loads(done.stdout)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_base_and_an_adapter_by_their_ids(
    hub: Hub, run_online: Run, tiny_base: Any, tiny_adapter: Any, tmp_path: Path
) -> None:
    base, adapter = tiny_base("bert-cls"), tiny_adapter("bert-cls", target_modules=["query"])
    more = {"pytorch_model.bin": b"no", "onnx/model.safetensors": b"no", "README.md": b"no"}
    hub.files["user/base"] = files_of(base) | more
    inside = {f"sub/{name}": data for name, data in files_of(adapter).items()}
    hub.files["user/adapter"] = inside | {"other.safetensors": b"no"}
    code, packed = run_online("pack", "user/adapter:sub", "--base", "user/base@v1", "-o", "a")
    assert code == 0, packed
    assert hub.fetched() == {
        "config.json", "model.safetensors", "sub/adapter_config.json",
        "sub/adapter_model.safetensors",
    }  # fmt: skip
    assert hub.tokens == {"Bearer hf_secret"}
    wanted = ff.from_peft(adapter, base)
    assert ff.Bundle.load(tmp_path / "work/a").sha256 == wanted.sha256
    # What is in the cache needs no network.
    before = len(hub.requests)
    words = ["merge", "--base", "user/base@v1", "--bundle", "user/adapter:sub", "-o", "m"]
    code, merged = run_online(*words, offline=True)
    assert (code, len(hub.requests)) == (0, before), merged
    ff.merge_checkpoint(base, wanted, tmp_path / "here")
    for name in ("model.safetensors", "config.json"):
        ours, theirs = (folder / name for folder in (tmp_path / "work/m", tmp_path / "here"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_push_and_use(
    hub: Hub, run_online: Run, tiny_base: Any, tiny_bundle: Any, tmp_path: Path
) -> None:
    path = tiny_bundle("bert-cls", target_modules=["query"])
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"best": {"accuracy": 0.98765}}))
    code, pushed = run_online("push", path, "user/sst2", "--metrics", metrics, "--private")
    assert code == 0, (pushed, hub.requests)
    assert pushed["url"] == f"{hub.address}/user/sst2/commit/{COMMIT}"
    files = hub.files["user/sst2"]
    assert files["adapter.fourierft.safetensors"] == path.read_bytes()
    card = files["README.md"].decode()
    bundle = ff.Bundle.load(path)
    for words in (bundle.sha256, "| accuracy | 0.9877 |", "pipeline_tag: text-classification",
                  "--bundle user/sst2", "`classifier.weight`", "32 x 32", "SEQ_CLS"):  # fmt: skip
        assert words in card
    base = tiny_base("bert-cls")
    code, merged = run_online("merge", "--base", base, "--bundle", "user/sst2", "-o", "m")
    assert code == 0, merged
    code, facts = run_online("inspect", "user/sst2")
    assert facts["inspect"]["sha256"] == bundle.sha256
    assert str(base.parent) not in card  # where the base lay is nobody's business
    assert run_online("push", path, "no-repository")[0] == 2
    hub.address = "http://127.0.0.1:9"  # nothing answers there
    code, shown = run_online("push", path, "user/sst2")
    assert (code, shown["error"]["kind"]) == (6, "file-access")


def test_errors_are_clear_and_paths_need_no_network(
    hub: Hub, run_online: Run, tiny_base: Any, tiny_bundle: Any, tmp_path: Path
) -> None:
    bundle, base = tiny_bundle("bert-cls", target_modules=["query"]), tiny_base("bert-cls")
    hub.files["user/empty"] = {"README.md": b"x"}
    hub.files["user/two"] = {f"{n}.fourierft.safetensors": bundle.read_bytes() for n in "ab"}
    for source, words in (
        ("user/none", "not on the Hub"),
        ("user/empty@v2", "not on the Hub"),
        ("user/empty", "one of adapter_config.json, "),
        ("user/two", "2 bundles"),
        ("user/two:c.fourierft.safetensors", "c.fourierft.safetensors in the repository"),
    ):
        code, shown = run_online("inspect", source)
        assert (code, shown["error"]["kind"]) == (6, "file-access")
        assert words in shown["error"]["found"] + shown["error"]["expected"]
    assert run_online("inspect", "user/two:b.fourierft.safetensors")[0] == 0
    code, shown = run_online("inspect", "user/never-seen", offline=True)
    assert (code, shown["error"]["code"]) == (6, 6)
    # Paths, right or wrong, ask nobody.
    hub.requests.clear()
    (tmp_path / "work/user").mkdir()
    assert run_online("merge", "--base", base, "--bundle", bundle, "-o", "m")[0] == 0
    for wrong in ("user/none", "./other/none", "none", tmp_path / "none"):
        assert run_online("inspect", wrong)[0] == 6
    assert hub.requests == []


def test_ids() -> None:
    assert parse_hub_id("user/my.repo-1@refs/pr/1:a/b") == ("user/my.repo-1", "refs/pr/1", "a/b")
    assert parse_hub_id("user/repo") == ("user/repo", None, "")
    for text in ("user", "a/b/c", "/user/repo", "./user", "../repo", "user/repo:../x", "user/", ""):
        assert parse_hub_id(text) is None
