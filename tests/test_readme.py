"""The README's examples run: every fenced block that follows a `<!-- test -->` line.

They run in order in one folder, where each may use what the ones before it wrote. There `minilm/`
is a small model with MiniLM's tokenizer, `adapter/` a PEFT adapter of it, and `train.tsv` and
`dev.tsv` are rows. All run in this process, so that torch starts once: lines of bash as the command
line reads them.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import FourierFTConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from fourierft_export.cli.main import run

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^<!-- test -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.timeout(900)
def test_examples_run(
    minilm_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = README.read_text("utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("<!-- test -->")
    shutil.copytree(minilm_dir, tmp_path / "minilm")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig.from_pretrained(minilm_dir, **sizes, intermediate_size=96)
    BertModel(config).save_pretrained(tmp_path / "minilm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "minilm")
    fields = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    fourier = FourierFTConfig(**fields, n_frequency=200, scaling=50.0)
    get_peft_model(model, fourier).save_pretrained(tmp_path / "adapter")
    for name in ("train.tsv", "dev.tsv"):
        lines = (data_dir / "text/sst2" / name).read_text("utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:65]), "utf-8")
    monkeypatch.chdir(tmp_path)
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
            continue
        assert language == "bash"
        for line in code.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "fourierft-export"
            assert run(words) == 0, (line, capsys.readouterr().err)
    assert "</html>" in Path("report.html").read_text("utf-8")
