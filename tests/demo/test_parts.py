"""The demo's parts: the images, the model, the training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from fourierft_export.demo import digits, learn, steps, vit


def test_split_holds_every_image_once() -> None:
    training, test = digits.load(5)
    assert len(test.labels) == digits.TEST_IMAGES
    images = torch.cat([training.images, test.images]).flatten(1).numpy() * 16
    rows = np.column_stack([images, torch.cat([training.labels, test.labels]).numpy()])
    data, labels = load_digits(return_X_y=True)
    expected = np.column_stack([data, labels])
    order = lambda a: a[np.lexsort(a.T)]  # noqa: E731
    np.testing.assert_array_equal(order(rows), order(expected))


def test_split_follows_the_seed() -> None:
    first, again, other = (digits.load(seed)[1].images for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_shifts_as_numpy_has_them() -> None:
    images = digits.load(0)[1].images[:20]
    np.testing.assert_array_equal(digits.inverted(images), 1 - images.numpy())
    np.testing.assert_array_equal(digits.rotated(images), np.rot90(images.numpy(), axes=(1, 2)))
    assert digits.upright(images) is images


def test_nudged_images_are_moved_by_a_pixel_at_most() -> None:
    images = digits.load(0)[1].images[:200]
    generator = torch.Generator().manual_seed(0)
    moved = digits.nudged(images, 0.3, generator).numpy()
    padded = np.pad(images.numpy(), ((0, 0), (1, 1), (1, 1)))
    ways = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    assert all(any(np.array_equal(m, way[i]) for way in ways) for i, m in enumerate(moved))
    changed = np.mean(
        [not np.array_equal(m, i) for m, i in zip(moved, images.numpy(), strict=True)]
    )
    assert 0.15 < changed < 0.4  # 0.3 * 8/9 expected
    assert torch.equal(digits.nudged(images, 0.0, generator), images)


def test_attention_as_torch_has_it() -> None:
    torch.manual_seed(0)
    attention = vit.Attention(vit.ViTConfig(hidden_size=24, num_attention_heads=3))
    x = torch.randn(2, 5, 24)
    split = (
        layer(x).view(2, 5, 3, 8).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).reshape(2, 5, 24)
    torch.testing.assert_close(attention(x), attention.output(mixed))


def test_every_patch_has_its_place() -> None:
    """A pixel changed in patch (row, column) changes what the model embeds there, and only that."""
    torch.manual_seed(0)
    model = vit.DigitViT(vit.ViTConfig())
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    blank, dotted = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    dotted[0, 5, 2] = 1.0  # patch row 2, column 1; inside the patch: row 1, column 0
    model(blank)
    model(dotted)
    difference = (seen[1] - seen[0])[0]
    assert difference.abs().sum(1).nonzero().flatten().tolist() == [2 * 4 + 1]
    torch.testing.assert_close(difference[9], model.embed.weight[:, 2], atol=1e-6, rtol=1e-5)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = vit.ViTConfig(hidden_size=16, num_hidden_layers=2, intermediate_size=24)
    model = vit.DigitViT(config).eval()
    vit.save(model, tmp_path / "base")
    again = vit.load(tmp_path / "base")
    images = torch.rand(3, 8, 8)
    assert again.config == config
    assert torch.equal(again(images), model(images))
    fields = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    assert fields["model_type"] == vit.MODEL_TYPE
    assert fields["hidden_size"] == 16


def test_loading_wants_every_tensor(tmp_path: Path) -> None:
    vit.save(vit.DigitViT(vit.ViTConfig(num_hidden_layers=1)), tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text("utf-8").replace('layers": 1', 'layers": 2'), "utf-8")
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1\."):
        vit.load(tmp_path / "base")


def quiet(_done: int, _total: int) -> None:
    pass


def test_training_follows_the_seed_and_leaves_the_base() -> None:
    training, _ = digits.load(0)
    few = digits.Split(training.images[:192], training.labels[:192])
    made = []
    for seed in (1, 1, 2):
        model = steps.pretrain(few, epochs=1, seed=seed, progress=quiet)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        bundle = steps.learn_adapter(model, few, "rotated", epochs=2, seed=seed, progress=quiet)
        images = few.images[:8]
        fresh = vit.DigitViT(model.config)
        fresh.load_state_dict(before)
        assert torch.equal(model(images), fresh.eval()(images))  # the adapter is on it, but idle
        made.append(bundle.to_bytes())
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_training_lowers_the_loss_of_what_learns_only() -> None:
    training, _ = digits.load(0)
    few = digits.Split(training.images[:256], training.labels[:256])
    torch.manual_seed(0)
    model = vit.DigitViT(vit.ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    model.embed.requires_grad_(False)
    frozen = model.embed.weight.clone()

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(few.images), few.labels))

    before, threads = loss(), torch.get_num_threads()
    steps_told: list[tuple[int, int]] = []
    learn.train(
        model,
        few,
        digits.upright,
        epochs=12,
        lr=1e-2,
        weight_decay=0.0,
        seed=0,
        progress=lambda *step: steps_told.append(step),
    )
    assert loss() < 0.8 * before
    assert torch.equal(model.embed.weight, frozen)
    assert not model.training
    assert torch.get_num_threads() == threads
    assert steps_told == [(epoch, 12) for epoch in range(13)]
