"""route-*: eight rows through eight adapters in one batch, against one merged adapter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from bar_layer import minilm
from harness import Row, check_close, in_turn, within
from torch import Tensor, nn

import fourierft_export as ff

ROWS, TOKENS, N_FREQUENCY = 8, 64, 1000


@torch.no_grad()
def route(name: str, seeds: int, bar: float) -> Iterator[Row]:
    """MiniLM-L6, query and value adapted: opening the block is part of the time."""
    model = minilm()
    names = [f"tenant{i}" for i in range(ROWS)]
    for i, tenant in enumerate(names):
        config = ff.FourierFTConfig(
            n_frequency=N_FREQUENCY, target_modules=["query", "value"], random_loc_seed=i % seeds
        )
        ff.inject(model, config, tenant)
    merged = ff.fuse(ff.attach(minilm(), ff.capture(model, names[0])))
    ids = torch.randint(1000, 30000, (ROWS, TOKENS))

    def routed(block: nn.Module, ids: Tensor) -> Tensor:
        with ff.route(block, names):
            return block(input_ids=ids).logits

    def plain(block: nn.Module, ids: Tensor) -> Tensor:
        return block(input_ids=ids).logits

    check_close(name, routed(model, ids)[0], plain(merged, ids)[0], 1e-4)
    ours, one = in_turn(partial(routed, model, ids), partial(plain, merged, ids), seconds=10)
    case = f"{ROWS} adapters, {seeds} seed{'s' * (seeds > 1)}, {ROWS} x {TOKENS}"
    yield within(name, case, ours, one, bar, "one adapter, merged")


BARS = {
    "route-one-seed": partial(route, "route-one-seed", 1, 1.6),
    "route-seeds": partial(route, "route-seeds", ROWS, 2.5),
}
