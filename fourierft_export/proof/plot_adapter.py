"""Draws an adapter: its coefficients, norms by layer, entries and delta_W."""

from __future__ import annotations

import io

import numpy as np

from ..bundle.bundle import Bundle
from ..errors import extra_of
from ..spectral.delta import reference_delta
from .diff import delta_norm

MOST_LAYERS, MOST_VALUES = 60, 2**24
"""A picture names so many layers, and draws no larger delta_W."""


def draw_bundle(bundle: Bundle) -> bytes:
    """Draws a bundle as a PNG picture; an unbound one, which has no shapes, as its spectrum."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise extra_of(error, "a picture of the adapter") or error from error

    figure = Figure(figsize=(12, 8), layout="constrained")
    axes = figure.subplots(2, 2).ravel() if bundle.is_bound else [figure.subplots()]
    spectra = [array.astype(np.float64) for array in bundle.spectra.values()]
    axes[0].hist(np.concatenate(spectra), bins=60)
    axes[0].set(title="Coefficients", xlabel="value", ylabel="count")
    if bundle.is_bound:
        layers = bundle.layers[:MOST_LAYERS]
        names = [layer.name[-40:] for layer in layers]
        axes[1].barh(range(len(names)), [delta_norm(bundle, layer) for layer in layers])
        axes[1].set_yticks(range(len(names)), names, fontsize=7 if len(names) <= 24 else 5)
        axes[1].invert_yaxis()
        axes[1].set(title="Norm of delta_W by layer")
        layer = bundle.layers[0]
        assert layer.shape is not None  # noqa: S101 - a bound bundle has shapes
        entries = np.asarray(bundle.entries(layer.name))
        axes[2].hist2d(entries[:, 1], entries[:, 0], bins=40)
        axes[2].set(title=f"Entries of {layer.name[-50:]}", xlabel="column", ylabel="row")
        if layer.shape[0] * layer.shape[1] <= MOST_VALUES:
            delta = reference_delta(
                bundle.spectra[layer.name], entries, layer.shape, float(bundle.spec.scaling)
            )
            image = axes[3].imshow(delta, aspect="auto", cmap="RdBu")
            figure.colorbar(image, ax=axes[3])
        axes[3].set(title=f"delta_W of {layer.name[-50:]}", xlabel="input", ylabel="output")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    return picture.getvalue()
