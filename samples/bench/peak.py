"""Print by how many MiB the peak of this process grows when one 4096 x 4096 weight is merged."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parent.parent.parent)]

import torch  # noqa: E402 - what follows is found through the line above
from peers import SCALING, SEED, linear, peft_layer  # noqa: E402

from fourierft_export.spectral import torch_ops  # noqa: E402
from fourierft_export.spectral.entries import spectral_entries  # noqa: E402


def peak_mib(reset: bool = False) -> float:
    """Peak memory of this process since the last reset, as Linux counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10


def main(side: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(2)
    for size in (256, 4096):  # the small one loads whatever is loaded on first use
        base = linear(size, size, dtype)
        spectrum = torch.randn(1000)
        entries = torch.from_numpy(spectral_entries(SEED, (size, size), 1000).copy())
        # PEFT's layer draws a whole permutation when it is built; that is not the merge.
        layer = peft_layer(base, 1000, spectrum) if side == "peer" else None
        before = peak_mib(reset=True)
        if layer is not None:
            layer.merge()
        else:
            torch_ops.merge_delta_weights(
                [base.weight.data], [spectrum], entries, SCALING, in_place=True
            )
    print(peak_mib() - before)


if __name__ == "__main__":
    main(sys.argv[1], getattr(torch, sys.argv[2]))
