"""`FourierLinear`: a linear layer plus the changes that any number of adapters make to it.

The base layer is kept unchanged, as a child, and delta_W is added in the forward pass, so that
detaching the adapters gives back the very same module. Each adapter's part of the layer is one
small module in one mapping by adapter name; `active` names those in use.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bundle.spec import AdapterSpec
from ..errors import UsageError
from ..spectral.cost import choose_form
from ..spectral.entries import current_rule, spectral_entries
from ..spectral.torch_kernels import precision
from ..types import Entries
from .base_linear import (
    check_output,
    float_weight,
    has_hooks,
    is_bare,
    is_conv1d,
    is_linear,
    layer_device,
    layer_shape,
    stored_weight,
)
from .layer_adapter import LayerAdapter, autocast_is_on
from .routing.apply import PerRowTensor, add_row_deltas
from .routing.current_rows import OpenBlocks, current_rows, rows_here
from .saved_modules import AdaptedModule, link_versions, module_in_use, unwrap


class FourierLinear(nn.Module):
    """A linear layer with adapters: y = base(x) + sum over active adapters of x delta_W^T.

    These are equations 2 to 4 of arXiv 2405.03003.

    Args:
        base_layer: `nn.Linear`; transformers' `Conv1D`, which stores its weight as (in, out); or
            any module with `in_features` and `out_features`, such as a quantised layer: its
            output is kept, and x delta_W^T is added in float32.

    Attributes:
        base_layer: the layer as it was (an `AdaptedModule` around it where adapters have biases).
        adapters: adapter name -> `LayerAdapter`.
        active: names of the adapters that are in use, of those that this layer has.
        kept_weight: the base's weight while the layer is fused: its own place holds W + delta_W.
        transposed: the base layer stores its weight as (in, out).

    Raises:
        UsageError: `base_layer` is of another type.
    """

    fourierft_wraps = "base_layer"
    kept_weight: nn.Parameter | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        linear = module_in_use(base_layer)
        if not is_linear(linear):
            raise UsageError(
                "FourierLinear",
                expected="a linear layer, or a module with integer in_features and out_features",
                found=type(linear).__name__,
            )
        self.transposed = is_conv1d(linear)
        self.out_features, self.in_features = layer_shape(linear)
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.blocks = OpenBlocks()
        self.register_parameter("kept_weight", None)
        self._register_state_dict_hook(_put_kept_weight)  # type: ignore[no-untyped-call]
        self.train(base_layer.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features): the shape of delta_W."""
        return self.out_features, self.in_features

    @property
    def linear(self) -> nn.Module:
        """The plain layer in use: the original, or the active adapter's version of it."""
        return module_in_use(self.base_layer)

    @property
    def weight(self) -> Tensor:
        """W plus the delta_W of the active adapters, in the base's layout, computed when read.

        torch reads the weights of some layers and never calls them: the output projection of
        `nn.MultiheadAttention`, and all of `nn.TransformerEncoderLayer` without gradients. Within
        `route`, where each row has its own, it is a stand-in that refuses to be used.
        """
        rows = rows_here(self) if self.blocks.count else None
        if rows is None:
            return self.effective_weight()
        weight: Any = self.base_layer.weight
        return cast(Tensor, PerRowTensor(weight, rows.where) if any(rows.names) else weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias in use."""
        bias = getattr(self.base_layer, "bias", None)
        if callable(bias) and not isinstance(bias, Tensor):  # torch's own quantised layers
            bias = bias()
        return cast(Tensor, bias) if isinstance(bias, Tensor | PerRowTensor) else None

    @property
    def is_fused(self) -> bool:
        """Whether the base layer holds W + delta_W for the time being."""
        return self.kept_weight is not None

    def exchange_weight(self, weight: nn.Parameter, *, fuse: bool) -> nn.Parameter:
        """Put another weight into the base layer and return the one that was there.

        To `fuse` the layer give W + delta_W, and what was there becomes `kept_weight`.
        """
        parameters = unwrap(self)._parameters
        before = cast(nn.Parameter, parameters["weight"])
        parameters["weight"] = weight
        self.kept_weight = before if fuse else None
        if isinstance(self.base_layer, AdaptedModule):
            link_versions(self.base_layer)
        return before

    def adapter(self, name: str) -> LayerAdapter:
        """The layer's part of adapter `name`; KeyError if it has none."""
        return cast(LayerAdapter, self.adapters[name])

    def add_adapter(
        self,
        name: str,
        spectrum: Tensor,
        origin: AdapterSpec,
        entries: Entries | None = None,
        entry_rule: str | None = None,
        *,
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
        """The active adapters' delta_W (M, N) added up, float32 or float64; None without any."""
        total: Tensor | None = None
        for name in self.active:
            delta = self.adapter(name).delta_weight()
            total = delta if total is None else total + delta
        return total

    def effective_weight(self) -> Tensor:
        """W + delta_W in the base's layout and dtype, added in at least float32, rounded once."""
        if self.is_fused or not self.active:
            weight = getattr(self.linear, "weight", None)
            return weight if isinstance(weight, Tensor) else stored_weight(self.linear)
        weight = stored_weight(self.linear)
        upright = weight.T if self.transposed else weight
        if len(self.active) == 1 and not weight.requires_grad:
            total = self.adapter(self.active[0]).delta_weight(upright)
        else:
            delta = self.delta_weight()
            total = upright if delta is None else upright.to(precision(upright, delta)) + delta
        return (total.T if self.transposed else total).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer, by whichever form costs less for this call (`spectral.cost`).

        For the backward pass the token form holds x (where a spectrum learns) and nothing else;
        the dense form holds W + delta_W besides, 4 M N bytes in float32, if x needs a gradient.
        Under bfloat16 or float16 the dense form holds a float32 copy of x and delta_W.

        Args:
            x: (..., in_features).
            args, kwargs: passed on to the base layer.

        Returns:
            (..., out_features), of the dtype that the base layer gives.
        """
        if self.blocks.may_apply and (rows := current_rows(self, self.blocks)) is not None:
            output = self._base_output(x, args, kwargs)
            routed: Tensor = add_row_deltas(output, x, self.adapters, rows)
            return routed
        if not self.active or self.is_fused:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        dense = self._form(x) == "dense"
        if dense and not args and not kwargs and self._is_one_product(x):
            weight = self.effective_weight()
            return F.linear(x, weight.T if self.transposed else weight, self.bias)
        result = self._base_output(x, args, kwargs)
        dtype = result.dtype
        if not dense:
            for name in self.active:
                result = result + self.adapter(name).token_delta(x)
            return result.to(dtype)
        delta = cast(Tensor, self.delta_weight())
        if not autocast_is_on(x):
            x = x.to(delta.dtype)
        return (result + F.linear(x, delta)).to(dtype)

    def _base_output(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The base layer's output, checked where the layer is not one of the two known types."""
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if float_weight(self.linear) is None:
            check_output(self.linear, result, self.out_features)
        return result

    def _form(self, x: Tensor) -> str:
        """The form to use, token or dense; a graph exported for any number of rows gets dense."""
        if torch.compiler.is_exporting():
            return "dense"
        adapters = [self.adapter(name) for name in self.active]
        learns = torch.is_grad_enabled() and any(a.spectrum.requires_grad for a in adapters)
        n_frequency = sum(a.n_frequency for a in adapters)
        rows = x.numel() // self.in_features
        remember = not torch.compiler.is_compiling()
        return choose_form(rows, self.shape, n_frequency, training=learns, remember=remember)

    def _is_one_product(self, x: Tensor) -> bool:
        """Whether one product with W + delta_W gives the same: never where the sum is rounded."""
        linear = self.linear
        weight = float_weight(linear)
        if weight is None or not is_bare(linear):
            return False
        if self.base_layer is not linear and has_hooks(self.base_layer):
            return False
        exact = weight.dtype in (torch.float32, torch.float64) and x.dtype == weight.dtype
        return exact and not autocast_is_on(x)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write nothing: `kept_weight` is written under the base layer's name by a hook."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load as any module, but not while fused: what is loaded would be lost at `restore`."""
        if self.is_fused:
            raise UsageError(
                "load_state_dict", found="a model that is fused", remedy="call restore first"
            )
        super()._load_from_state_dict(*args, **kwargs)


def _put_kept_weight(layer: FourierLinear, state: Any, prefix: str, _: Any) -> None:
    """State dict hook: a fused layer saves the base's weight, not W + delta_W."""
    if layer.kept_weight is not None:
        wrapped = isinstance(layer.base_layer, AdaptedModule)
        inner = "base_layer.original" if wrapped else "base_layer"
        state[f"{prefix}{inner}.weight"] = layer.kept_weight.detach()
