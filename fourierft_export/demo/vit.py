"""A small vision transformer for 8 x 8 grey images, written plainly.

Query, key and value are separate `nn.Linear` layers, as in BERT or Llama, so that adapters target
them by name. Nothing here knows of adapters.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

MODEL_TYPE = "fourierft-demo-vit"


@dataclass(frozen=True)
class ViTConfig:
    """Shape of the model; `config.json` holds the same fields.

    Attributes:
        image_size: side of the square images, in pixels.
        patch_size: side of the square patches, in pixels; divides `image_size`.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: divides `hidden_size`.
        intermediate_size: width of the MLP.
        num_labels: number of classes.
    """

    image_size: int = 8
    patch_size: int = 2
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 192
    num_labels: int = 10


class Attention(nn.Module):
    """Multi-head self-attention over (batch, tokens, hidden)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, hidden) to the same shape."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        result: Tensor = self.output(mixed)
        return result


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, hidden) to the same shape."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


class DigitViT(nn.Module):
    """Grey images to class logits."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = config.patch_size
        side = config.image_size // config.patch_size
        self.embed = nn.Linear(config.patch_size**2, config.hidden_size)
        # As large as the embedded patches: with the usual 0.02 so few images never teach the model
        # where a patch is.
        self.position = nn.Parameter(0.5 * torch.randn(side * side, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            pixel_values: (batch, image_size, image_size) float32 in 0..1.

        Returns:
            (batch, num_labels) float32.
        """
        p = self.patch
        rows = pixel_values.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # (b, side, p, side, p)
        patches = rows.transpose(2, 3).flatten(3).flatten(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(self.norm(x).mean(1))
        return logits


def save(model: DigitViT, directory: Path) -> None:
    """Write a checkpoint folder: `config.json` and `model.safetensors`, as a hub has them."""
    directory.mkdir(exist_ok=True)
    config = {"model_type": MODEL_TYPE, "architectures": ["DigitViT"], **asdict(model.config)}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> DigitViT:
    """The model of a checkpoint folder, in eval mode; every tensor must be there, and no other."""
    fields = json.loads((directory / "config.json").read_text("utf-8"))
    sizes = {key: value for key, value in fields.items() if key in ViTConfig.__dataclass_fields__}
    with torch.device("meta"):  # so that no random weights are drawn
        model = DigitViT(ViTConfig(**sizes))
    model.load_state_dict(load_file(directory / "model.safetensors"), assign=True)
    return model.eval()
