"""An adapter's part of one layer: a spectrum, and the positions of its coefficients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bundle.spec import AdapterSpec
from ..spectral import torch_ops
from ..types import Entries


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is enabled on the tensor's device."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _without_layers(spec: AdapterSpec) -> AdapterSpec:
    """What the layers of an adapter share, as a spec that can be copied and pickled."""
    return replace(spec, layers=(), peft_config=dict(spec.peft_config))


class LayerAdapter(nn.Module):
    """One adapter's part of one layer: its spectrum and the positions of its coefficients.

    Args:
        spectrum: (n,) float tensor; becomes the learnable parameter.
        entries: (n, 2) int64, the positions (u, v).
        shape: (out_features, in_features) of delta_W.
        entry_rule: "small", "r64" or "explicit".
        origin: the adapter's spec, of which what its layers share is kept.
        trainable: whether the spectrum learns while the adapter is active.

    Attributes:
        entries: buffer (n, 2) int64 on the spectrum's device. It is not part of the state dict,
            since it follows from the seed, and it is rebuilt when the module leaves the meta
            device.
    """

    entries: Tensor

    def __init__(
        self,
        spectrum: Tensor,
        entries: Entries,
        shape: tuple[int, int],
        *,
        entry_rule: str,
        origin: AdapterSpec,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(spectrum, requires_grad=False)
        self.host_entries = entries
        self.shape = shape
        self.entry_rule = entry_rule
        self.origin = _without_layers(origin)
        self.trainable = trainable
        self.register_buffer("entries", None, persistent=False)
        self._place_entries()

    @property
    def n_frequency(self) -> int:
        """Number of coefficients."""
        return self.spectrum.shape[0]

    def _place_entries(self) -> None:
        self.entries = torch.tensor(
            self.host_entries, dtype=torch.int64, device=self.spectrum.device
        )

    def _apply(self, fn: Any, recurse: bool = True) -> LayerAdapter:
        """Move or cast as any module; entries that come off the meta device are made afresh."""
        was_meta = self.entries.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.spectrum.is_meta:
            self._place_entries()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module; entries follow where a spectrum is assigned rather than copied."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.entries.device != self.spectrum.device:
            self._place_entries()

    @torch.no_grad()
    def replace_values(
        self, spectrum: Tensor, entries: Entries, entry_rule: str, origin: AdapterSpec
    ) -> None:
        """Take other values (n,) and positions (n, 2); the parameter stays the same object."""
        if self.trainable:
            self.spectrum.copy_(spectrum)
        else:
            self.spectrum.data = spectrum.to(self.spectrum.device)
        if entries.tobytes() != self.host_entries.tobytes():
            self.host_entries = entries
            self._place_entries()
        self.entry_rule, self.origin = entry_rule, _without_layers(origin)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """delta_W (M, N), or a frozen weight plus it, in float32 or better, whatever autocast."""
        with self._without_autocast():
            return torch_ops.delta_weight(
                self.spectrum, self.entries, self.shape, self.origin.scaling, weight
            )

    def token_delta(self, x: Tensor) -> Tensor:
        """The product x delta_W^T (..., M) without delta_W; float32 or better, then x's dtype."""
        with self._without_autocast():
            return torch_ops.token_delta(
                x, self.spectrum, self.entries, self.shape, self.origin.scaling
            )

    def _without_autocast(self) -> AbstractContextManager[object]:
        if autocast_is_on(self.spectrum):
            return torch.autocast(self.spectrum.device.type, enabled=False)
        return nullcontext()  # entering the other takes 0.1 ms

    def extra_repr(self) -> str:
        """n, seed and scaling."""
        origin = self.origin
        return f"n_frequency={self.n_frequency}, seed={origin.seed}, scaling={origin.scaling}"
