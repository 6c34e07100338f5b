"""Parts and forms of a transformers model as models of their own, with the same module paths."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ...adapt.modules import base_modules
from ...errors import UsageError
from ...models.example_inputs import BATCH_AXIS, SEQUENCE_AXIS, example_inputs

PAST_AXIS, TOTAL_AXIS = "past_sequence", "total_sequence"

Past = list[tuple[Tensor, Tensor]]


class CachedModel(nn.Module):
    """A causal model that takes its cache as pairs of tensors and returns the longer ones.

    A step then costs one token's work whatever came before it. Names are those of optimum's
    exports, which ONNX Runtime's users and transformers.js know: past_key_values.N.key and .value,
    present.N.key and .value, each (batch, key-value heads, positions, head size).
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap `model`, which must keep one growing pair of keys and values per layer."""
        super().__init__()
        self.config: Any = getattr(model, "config", None)
        # Hidden from torch: as a module it would be a second path to the same weights.
        self._model = (model,)
        self._modules = model._modules
        self._parameters = model._parameters
        self._buffers = model._buffers
        self.positions = "position_ids" in inspect.signature(model.forward).parameters
        self.past = _empty_past(model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Past,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of every layer, those given included.

        Token ids and positions are (batch, sequence), the mask (batch, past + sequence).
        """
        from transformers import DynamicCache

        options = {} if position_ids is None else {"position_ids": position_ids}
        output = self._model[0](
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=DynamicCache(past_key_values),
            use_cache=True,
            return_dict=True,
            **options,
        )
        layers = output.past_key_values.layers
        return (output.logits, *(tensor for one in layers for tensor in (one.keys, one.values)))

    def input_names(self) -> list[str]:
        """The graph's inputs, in the order of `example`."""
        texts = ["input_ids", "attention_mask", *(["position_ids"] if self.positions else [])]
        return [*texts, *_names("past_key_values", len(self.past))]

    def output_names(self) -> list[str]:
        """The graph's outputs: logits, and what the cache becomes."""
        return ["logits", *_names("present", len(self.past))]

    def example(self, *, past: int = 5) -> dict[str, Any]:
        """Keyword arguments to trace with: two rows, some tokens after `past` earlier ones."""
        given = example_inputs(self._model[0], length=8)
        ids, mask = given["input_ids"], given["attention_mask"]
        batch, length = ids.shape
        seen = torch.ones(batch, past, dtype=mask.dtype)
        positions = torch.arange(past, past + length).expand(batch, length).contiguous()
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.cat([seen, mask], dim=1),
            **({"position_ids": positions} if self.positions else {}),
        }
        random = torch.Generator().manual_seed(0)
        inputs["past_key_values"] = [
            tuple(
                torch.randn(batch, t.shape[1], past, t.shape[3], generator=random).to(t)
                for t in pair
            )
            for pair in self.past
        ]
        return inputs

    def axes(self) -> dict[str, Any]:
        """The symbolic axes of `example`'s inputs: batch, sequence, past and total length."""
        new = {0: BATCH_AXIS, 1: SEQUENCE_AXIS}
        past = {0: BATCH_AXIS, 2: PAST_AXIS}
        return {
            "input_ids": new,
            "attention_mask": {0: BATCH_AXIS, 1: TOTAL_AXIS},
            **({"position_ids": dict(new)} if self.positions else {}),
            "past_key_values": [(dict(past), dict(past)) for _ in self.past],
        }


def _names(stem: str, layers: int) -> list[str]:
    return [f"{stem}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def _empty_past(model: nn.Module) -> Past:
    """Keys and values before the first token, (1, heads, 0, head size), from one token's run."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    parameters = inspect.signature(model.forward).parameters
    layers = None
    if "past_key_values" in parameters:
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.int64)
            cache = model(input_ids=ids, use_cache=True, return_dict=True).get("past_key_values")
        layers = cache.layers if isinstance(cache, DynamicCache) else None
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers or ()})
        raise UsageError(
            f"cache of {type(model).__name__}",
            expected="a model with one growing pair of keys and values per layer",
            found=", ".join(kinds) or "no such cache",
            remedy="export without the cache",
        )
    return [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in layers]


class EncoderView(nn.Module):
    """Runs a model's encoder alone.

    The encoder is shared with the model and keeps its module path, so that an adapter's layers have
    the names they have in the whole model; what is outside the encoder is not there.
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap the encoder of a transformers model, which is not changed."""
        super().__init__()
        get_encoder = getattr(model, "get_encoder", None)
        encoder = get_encoder() if callable(get_encoder) else None
        path = next((path for path, module in base_modules(model) if module is encoder), None)
        if encoder is None or not path:
            raise UsageError(
                f"encoder of {type(model).__name__}",
                expected="a sequence-to-sequence model",
                found="no encoder within it",
                remedy="name another task with --task (task=...)",
            )
        self.config = getattr(model, "config", None)
        # Hidden from torch: as a module it would be a second path to the same weights.
        self._encoder = (encoder,)
        *above, name = path.split(".")
        holder: nn.Module = self
        for segment in above:
            holder.add_module(segment, nn.Module())
            holder = holder.get_submodule(segment)
        holder.add_module(name, encoder)

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
        """The encoder's outputs by name; both arguments are int64 (batch, sequence)."""
        return self._encoder[0](input_ids=input_ids, attention_mask=attention_mask)
