"""`FourierLinear`: a linear layer plus the changes that any number of adapters make to it.

The base layer is kept as it is, as a child; delta_W is added on the way through, so that taking
the adapters off gives back the very same module. What an adapter brings to the layer is one small
module in one mapping by adapter name, and `active` says which of them count now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..spectral.cost import choose_form
from ..spectral.entries import current_rule, spectral_entries
from ..types import Entries
from .adapter import AdapterOrigin, LayerAdapter
from .beside import check_answer, warn_if_gradients_stop
from .linear import float_weight, is_conv1d, is_linear, layer_device, layer_shape, stored_weight
from .mixed import MixedTensor
from .saved import AdaptedModule

if TYPE_CHECKING:
    from .rows import Routing


class FourierLinear(nn.Module):
    """y = base(x) + sum over active adapters of x delta_W^T (arXiv 2405.03003, equations 2 to 4).

    Args:
        base_layer: `nn.Linear`; transformers' `Conv1D`, which stores its weight as (in, out); or
            any module with `in_features` and `out_features`, such as a quantised layer: its
            output is taken as it is, and x delta_W^T is added in float32.

    Attributes:
        base_layer: the layer as it was (an `AdaptedModule` around it where adapters bring biases).
        adapters: adapter name -> `LayerAdapter`.
        active: names of the adapters that count, of those that this layer has.
        fused_weight: W + delta_W as `fuse` left it, or None.
        routing: the `route` blocks around the layer; None if there never was one.

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
                expected="a linear layer, or a module with integer in_features and out_features",
                found=type(linear).__name__,
            )
        self.fan_in_fan_out = is_conv1d(linear)
        self.out_features, self.in_features = layer_shape(linear)
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self._gradient_tried = False
        self.register_buffer("fused_weight", None, persistent=False)
        self.routing: Routing | None = None
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

        Within `route`, where each row has its own, it is a stand-in that refuses to be used.

        Raises:
            UsageError: an adapter is active and the base has no plain float weight to add to.
        """
        if self.routing is not None and self.routing.now is not None:
            mixed: Tensor = self.routing.now.weight(self)
            return mixed
        return self.effective_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        bias = getattr(self.base_layer, "bias", None)
        if callable(bias) and not isinstance(bias, Tensor):  # torch's own quantised layers
            bias = bias()
        return cast(Tensor, bias) if isinstance(bias, Tensor | MixedTensor) else None

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
            spectrum.detach().clone().to(layer_device(self.linear)),
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
        if not self.active:
            weight = getattr(self.linear, "weight", None)
            return weight if isinstance(weight, Tensor) else stored_weight(self.linear)
        weight = stored_weight(self.linear)
        upright = weight.T if self.fan_in_fan_out else weight
        if len(self.active) == 1 and not weight.requires_grad:
            total = self.adapter(self.active[0]).merged_weight(upright)
        else:
            delta = self.delta_weight()
            total = upright if delta is None else upright.to(_wide(upright, delta)) + delta
        return (total.T if self.fan_in_fan_out else total).to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, by whichever form costs less for this call (`spectral.cost`).

        For the backward pass the token form holds x (where a spectrum learns) and nothing else;
        the dense form holds W + delta_W besides, 4 M N bytes in float32, if x needs a gradient.
        The cost model takes the dense form where rows are many and the layer is small, so x is
        the larger part there, too. Under bfloat16 or float16 the dense form holds a float32 copy
        of x and delta_W.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features), of the dtype that the base layer gives.
        """
        if self.routing is not None and (rows := self.routing.current(self)) is not None:
            routed: Tensor = rows.linear(self, x)
            return routed
        if self.fused_weight is not None:
            return self._apply_weight(x, self.fused_weight)
        if not self.active:
            result: Tensor = self.base_layer(x)
            return result
        dense = self._form(x) == "dense"
        if dense and self._adds_up_exactly(x):
            return self._apply_weight(x, self.effective_weight())
        result = self.base_output(x)
        dtype = result.dtype
        if not dense:
            for name in self.active:
                result = result + self.adapter(name).token_delta(x)
            return result.to(dtype)
        delta = self.delta_weight()
        if delta is None:
            return result
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(delta.dtype)
        return (result + F.linear(x, delta)).to(dtype)

    def base_output(self, x: Tensor) -> Tensor:
        """The base layer's answer, checked where the layer is not one of the two known types.

        Raises:
            UsageError: it is not one float tensor (..., out_features).
        """
        result: Tensor = self.base_layer(x)
        if float_weight(self.linear) is None:
            check_answer(self.linear, result, self.out_features)
            learns = torch.is_grad_enabled() and x.requires_grad
            if learns and not self._gradient_tried and not torch.compiler.is_compiling():
                self._gradient_tried = True
                warn_if_gradients_stop(self.base_layer, x)
        return result

    def _form(self, x: Tensor) -> str:
        """The form to use, token or dense; a graph exported for any number of rows gets dense."""
        if torch.compiler.is_exporting():
            return "dense"
        adapters = [self.adapter(name) for name in self.active]
        learns = torch.is_grad_enabled() and any(a.spectrum.requires_grad for a in adapters)
        n_frequency = sum(a.n_frequency for a in adapters)
        rows = x.numel() // self.in_features
        return choose_form(rows, self.shape, n_frequency, training=learns)

    def _apply_weight(self, x: Tensor, stored: Tensor) -> Tensor:
        # A deliberate call of the function: the layer itself would use its own weight.
        return F.linear(x, stored.T if self.fan_in_fan_out else stored, self.bias)

    def _adds_up_exactly(self, x: Tensor) -> bool:
        """Whether one product with W + delta_W does: never where W + delta_W would be rounded."""
        linear = self.linear
        weight = float_weight(linear)
        if weight is None:
            return False
        plain = is_conv1d(linear) or type(linear) in _PLAIN_LINEAR
        hooked = bool(linear._forward_hooks or linear._forward_pre_hooks)
        exact = weight.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
        return plain and exact and not hooked and not torch.is_autocast_enabled(x.device.type)


_PLAIN_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _wide(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
