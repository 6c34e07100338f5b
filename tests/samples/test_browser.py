"""The page of samples/browser in headless Chromium: its logits are those of PyTorch."""

from __future__ import annotations

import functools
import http.server
import json
import re
import runpy
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import fourierft_export as ff

SAMPLE = Path(__file__).resolve().parents[2] / "samples/browser"
CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), "chromium")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Serves the test's folder; yields the address of its root."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_words: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.browser
@pytest.mark.timeout(900)
def test_logits_in_the_browser_are_pytorchs(tmp_path: Path, address: str) -> None:
    from transformers import ViTForImageClassification

    demo, site = tmp_path / "demo", tmp_path / "site"
    ff_demo = runpy.run_path(str(SAMPLE / "build.py"))
    ff_demo["command"]("demo", "-o", demo)
    ff_demo["main"](site, demo)
    images = (load_digits().data[:20] / 16).astype(np.float32)
    (site / "check.json").write_text(json.dumps(images.tolist()), "utf-8")
    query = "/site/index.html?check&tenant=rotated"
    page = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--timeout=300000",
         "--virtual-time-budget=300000", "--dump-dom", f"{address}{query}"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = json.loads(re.findall(r'id="check"[^>]*>([^<]+)<', page)[0])
    assert set(found) == {"upright", "inverted", "rotated"}
    assert re.search(r"Swap: 10\.\d KB in \d+ ms", page)
    for tenant, logits in found.items():
        model = ViTForImageClassification.from_pretrained(demo / "base").eval()
        if tenant != "upright":
            ff.attach(model, demo / f"{tenant}.fourierft.safetensors", tenant)
        with torch.no_grad():
            want = model(pixel_values=torch.from_numpy(images).reshape(-1, 1, 8, 8)).logits.numpy()
        np.testing.assert_allclose(np.reshape(logits, want.shape), want, rtol=0, atol=1e-5)


def test_the_readme_names_the_pinned_version() -> None:
    pinned = json.loads((SAMPLE / "package.json").read_text("utf-8"))["dependencies"]
    assert f"onnxruntime-web {pinned['onnxruntime-web']}" in (SAMPLE / "README.md").read_text(
        "utf-8"
    )
