"""`FourierLinear`: a linear layer plus the changes that any number of adapters make to it.

The base layer is kept as it is, as a child; delta_W is added on the way through, so that taking
the adapters off gives back the very same module. What an adapter brings to the layer is one small
module in one mapping by adapter name, and `active` says which of them count now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..spectral import torch_ops
from ..spectral.entries import current_rule, spectral_entries
from .linear import is_conv1d, is_linear, layer_shape, stored_weight
from .saved import AdaptedModule

Entries = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AdapterOrigin:
    """What all layers of one adapter have in common.

    Attributes:
        seed: random_loc_seed as its author wrote it.
        scaling: multiplies delta_W.
        task_type: PEFT's task type, or None.
        base_model: name or path of the base, or None.
        peft_config: the adapter_config.json it came from; empty if it did not come from PEFT.
    """

    seed: int
    scaling: int | float
    task_type: str | None = None
    base_model: str | None = None
    peft_config: dict[str, Any] = field(default_factory=dict)


class LayerAdapter(nn.Module):
    """One adapter's share of one layer: its spectrum and where that sits.

    Args:
        spectrum: (n,) float tensor; becomes the learnable parameter.
        entries: (n, 2) int64, the positions (u, v).
        shape: (out_features, in_features) of delta_W.
        entry_rule: "small", "r64" or "explicit".
        origin: what the adapter's layers share.
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
        origin: AdapterOrigin,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(spectrum, requires_grad=False)
        self.host_entries = entries
        self.shape = shape
        self.entry_rule = entry_rule
        self.origin = origin
        self.trainable = trainable
        placed = torch.tensor(entries, dtype=torch.int64, device=spectrum.device)
        self.register_buffer("entries", placed, persistent=False)

    @property
    def n_frequency(self) -> int:
        """Number of coefficients."""
        return self.spectrum.shape[0]

    def _apply(self, fn: Any, recurse: bool = True) -> LayerAdapter:
        """Move or cast as any module; entries that come off the meta device are made afresh."""
        was_meta = self.entries.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.spectrum.is_meta:
            self.entries = torch.tensor(self.host_entries, device=self.spectrum.device)
        return self

    def delta_weight(self) -> Tensor:
        """delta_W (M, N) in the spectrum's precision, at least float32, whatever autocast says."""
        with torch.autocast(self.spectrum.device.type, enabled=False):
            return torch_ops.delta_weight(
                _at_least_float32(self.spectrum), self.entries, self.shape, self.origin.scaling
            )

    def extra_repr(self) -> str:
        """n, seed and scaling."""
        origin = self.origin
        return f"n_frequency={self.n_frequency}, seed={origin.seed}, scaling={origin.scaling}"


class FourierLinear(nn.Module):
    """y = base(x) + sum over active adapters of x delta_W^T (arXiv 2405.03003, equations 2 to 4).

    Args:
        base_layer: `nn.Linear`, or transformers' `Conv1D`, which stores its weight as (in, out).

    Attributes:
        base_layer: the layer as it was (an `AdaptedModule` around it where adapters bring biases).
        adapters: adapter name -> `LayerAdapter`.
        active: names of the adapters that count, of those that this layer has.
        fused_weight: W + delta_W as `fuse` left it, or None.

    Raises:
        UsageError: `base_layer` is of another type.
    """

    fused_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        linear = base_layer.chosen if isinstance(base_layer, AdaptedModule) else base_layer
        if not is_linear(linear):
            raise UsageError(
                "FourierLinear",
                expected="an nn.Linear, or the Conv1D of transformers",
                found=type(linear).__name__,
            )
        self.fan_in_fan_out = is_conv1d(linear)
        self.out_features, self.in_features = layer_shape(linear)
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.register_buffer("fused_weight", None, persistent=False)
        self.train(base_layer.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features): the shape of delta_W."""
        return self.out_features, self.in_features

    @property
    def linear(self) -> nn.Module:
        """The plain layer in use: the original, or the active adapter's version of it."""
        layer = self.base_layer
        return layer.chosen if isinstance(layer, AdaptedModule) else layer

    @property
    def weight(self) -> Tensor:
        """The weight that the layer stands for, active adapters included, in the base's layout.

        It is computed when it is read. torch reads the weights of some layers and never calls
        them: the output projection of `nn.MultiheadAttention`, and all of
        `nn.TransformerEncoderLayer` when no gradients are asked for.
        """
        return self.effective_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        bias = self.linear.bias
        return bias if isinstance(bias, Tensor) else None

    def adapter(self, name: str) -> LayerAdapter:
        """The layer's share of adapter `name`; KeyError if it has none."""
        module = self.adapters[name]
        if not isinstance(module, LayerAdapter):
            raise TypeError(f"{name}: {type(module).__name__}")
        return module

    def add_adapter(
        self,
        name: str,
        spectrum: Tensor,
        origin: AdapterOrigin,
        *,
        entries: Entries | None = None,
        entry_rule: str | None = None,
        trainable: bool = True,
    ) -> None:
        """Add an adapter; it is not active yet.

        Args:
            name: not in use yet, without dots.
            spectrum: (n,) float tensor, n at most out_features * in_features; it is copied to the
                base weight's device.
            origin: seed, scaling and whatever else the adapter's layers share.
            entries: (n, 2) int64; by default those that `origin.seed` gives under `entry_rule`.
            entry_rule: by default the one current torch follows for this shape.
            trainable: whether the spectrum learns while active.

        Raises:
            UsageError: the name is taken, or n does not fit the layer.
        """
        if name in self.adapters:
            raise UsageError(f"adapter {name!r}", found="a layer that has it already")
        rule = entry_rule or current_rule(self.shape)
        if entries is None:
            entries = spectral_entries(origin.seed, self.shape, spectrum.shape[0], rule)
        self.adapters[name] = LayerAdapter(
            spectrum.detach().clone().to(stored_weight(self.linear).device),
            entries,
            self.shape,
            entry_rule=rule,
            origin=origin,
            trainable=trainable,
        ).train(self.training)

    def delta_weight(self) -> Tensor | None:
        """Sum of the active adapters' delta_W (M, N), at least float32; None if none is active."""
        total: Tensor | None = None
        for name in self.active:
            delta = self.adapter(name).delta_weight()
            total = delta if total is None else total + delta
        return total

    def effective_weight(self) -> Tensor:
        """W + delta_W in the base's layout and dtype, added in at least float32, rounded once."""
        if self.fused_weight is not None:
            return self.fused_weight
        weight = stored_weight(self.linear)
        delta = self.delta_weight()
        if delta is None:
            return weight
        if self.fan_in_fan_out:
            delta = delta.T
        exact = torch.promote_types(torch.promote_types(weight.dtype, delta.dtype), torch.float32)
        return (weight.to(exact) + delta).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features), of the dtype that the base layer gives.
        """
        if self.fused_weight is not None:
            return self._apply_weight(x, self.fused_weight)
        if not self.active:
            result: Tensor = self.base_layer(x)
            return result
        if self._adds_up_exactly(x):
            return self._apply_weight(x, self.effective_weight())
        result = self.base_layer(x)
        delta = self.delta_weight()
        if delta is None:
            return result
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(delta.dtype)
        return (result + F.linear(x, delta)).to(result.dtype)

    def _apply_weight(self, x: Tensor, stored: Tensor) -> Tensor:
        # A deliberate call of the function: the layer itself would use its own weight.
        return F.linear(x, stored.T if self.fan_in_fan_out else stored, self.bias)

    def _adds_up_exactly(self, x: Tensor) -> bool:
        """Whether one product with W + delta_W does: never where W + delta_W would be rounded."""
        linear = self.linear
        weight = stored_weight(linear)
        plain = is_conv1d(linear) or type(linear) in _PLAIN_LINEAR
        hooked = bool(linear._forward_hooks or linear._forward_pre_hooks)
        exact = weight.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
        return plain and exact and not hooked and not torch.is_autocast_enabled(x.device.type)


_PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
