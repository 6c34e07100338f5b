"""One side of merge-llama in a process of its own: merge_child.py peft|timed BASE ADAPTER OUT.

Both print their peak memory in MB. `timed` is the toolkit's merge with clocks in it: it also prints
the seconds that entries and delta_W took, without adding and rounding.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def peak() -> float:
    """Of this program: what the system counts for a child includes who started it."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024 / 1e6


def peft(base: str, adapter: str, out: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    print(peak())


def timed(base: str, bundle: str, out: str) -> None:
    from fourierft_export.bundle.bundle import Bundle
    from fourierft_export.merge import rounding
    from fourierft_export.merge.merge import merge_checkpoint
    from fourierft_export.spectral.thread_pool import default_threads

    spent = {"entries": 0.0, "blocks": 0.0, "put": 0.0}
    lock = threading.Lock()

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                with lock:
                    spent[name] += time.perf_counter() - start

        return call

    each_block = rounding.each_block

    def blocks(stored: Any, terms: Any, put: Any, *rest: Any) -> None:
        each_block(stored, terms, clocked("put", put), *rest)

    rounding.each_block = clocked("blocks", blocks)  # type: ignore[assignment]
    Bundle.entries = clocked("entries", Bundle.entries)  # type: ignore[method-assign]
    merge_checkpoint(base, bundle, out)
    print(peak(), spent["entries"] + spent["blocks"] - spent["put"] / default_threads())


if __name__ == "__main__":
    {"peft": peft, "timed": timed}[sys.argv[1]](*sys.argv[2:])
