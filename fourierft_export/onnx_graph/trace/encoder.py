"""The encoder of a sequence-to-sequence model, as a model of its own with the same paths."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...adapt.tree import base_modules
from ...errors import UsageError


class EncoderView(nn.Module):
    """Runs a model's encoder alone.

    The encoder is shared with the model and keeps its module path, so that an adapter's layers have
    the names they have in the whole model; what is outside the encoder is not there.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at the encoder of `model`, which stays as it is.

        Args:
            model: a transformers model with `get_encoder`.

        Raises:
            UsageError: it has no encoder.
        """
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
