"""Put an adapter into IN.onnx by one side, in a process of its own; print seconds and peak MiB."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parent.parent.parent)]


def peak_mib() -> float:
    """Peak memory of this process, as Linux counts it."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) / 2**10


def ours(source: str, adapter: str, out: str) -> None:
    from fourierft_export.bundle.bundle import Bundle
    from fourierft_export.onnx_graph.apply import apply_onnx

    apply_onnx(source, Bundle.load(adapter), out)


def peer(source: str, adapter: str, out: str) -> None:
    """onnx.load, the same eight sums, onnx.save."""
    import onnx
    from onnx import numpy_helper

    from fourierft_export.bundle.bundle import Bundle
    from fourierft_export.spectral.delta import Term, add_delta_weight
    from fourierft_export.spectral.entries import spectral_entries

    bundle = Bundle.load(adapter)
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        layer = tensor.name.removesuffix(".weight")
        if layer in bundle.spectra:
            weight = numpy_helper.to_array(tensor)
            spectrum = bundle.spectra[layer]
            entries = spectral_entries(bundle.spec.entry_seed, weight.shape, len(spectrum))
            term = Term(spectrum, entries, float(bundle.spec.scaling))
            tensor.raw_data = add_delta_weight(weight, [term]).tobytes()
    Path(out).unlink(missing_ok=True)
    onnx.save_model(model, out, save_as_external_data=True, location=f"{Path(out).name}.data")


def main(side: str, source: str, adapter: str, out: str) -> None:
    import onnx  # noqa: F401 - not what is measured
    import onnx_ir  # noqa: F401

    start = time.perf_counter()
    {"ours": ours, "peer": peer}[side](source, adapter, out)
    print(time.perf_counter() - start, peak_mib())


if __name__ == "__main__":
    main(*sys.argv[1:])
