"""A task of another kind: a small vision transformer learns to read rotated digits from few images.

    python samples/quality/digits.py [--rows N] [--steps N]

The methods of run.py on its query and value layers, nothing else learns; each chooses its rate
among four on images held out (seed 0), then trains with seeds 10 to 14 and is scored on 360 test
images. Prints one line for each method. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import PEER_SETTINGS, Cell, train_ours, train_peer
from methods import METHODS, TARGETS
from table import spread

import fourierft_export as ff
from fourierft_export.demo import digits

sys.path.append(str(Path(__file__).parents[1] / "training"))
from digits_task import Reader

LORA_RATES = (0.004, 0.008, 0.016, 0.032)  # higher than for text: at 0.008 it hardly learns
SHOWN = {
    "LoRA r=8 (PEFT)": replace(METHODS["lora8"], rates=LORA_RATES),
    "LoRA r=1 (PEFT)": replace(METHODS["lora1"], rates=LORA_RATES),
    "FourierFT n=1000 (PEFT)": METHODS["peft"],
    "FourierFT n=1000 (this toolkit, defaults)": METHODS["ours"],
    "FourierFT n=128 (this toolkit)": replace(METHODS["ours"], settings={"n_frequency": 128}),
}
BATCH_SIZE = 32


def train_and_score(
    base: Any, cell: Cell, learnt: digits.Digits, scored: digits.Digits, steps: int
) -> tuple[float, int]:
    """Accuracy in %, and the number of parameters that learn."""
    task = ff.TrainingTask(Reader(deepcopy(base)), learnt.rows())
    settings = ff.TrainSettings(
        steps=steps,
        batch_size=BATCH_SIZE,
        seed=cell.seed,
        device="cpu",
        eval_share=0.0,
        target_modules=TARGETS,
        **METHODS[cell.method].settings,
        **(PEER_SETTINGS if METHODS[cell.method].put else {}),
    )
    train = train_peer if METHODS[cell.method].put else train_ours
    found = train(task, cell, settings)
    with torch.no_grad():
        logits = task.model.eval()(scored.images, scored.labels)["logits"]
    return 100 * float((logits.argmax(-1) == scored.labels).float().mean()), found["parameters"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200, help="training images")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (part.changed("rotated") for part in digits.load(seed=0))
    base = digits.pretrain(digits.load(seed=0)[0], epochs=15, seed=0, progress=lambda *_: None)
    learnt, held_out = (
        digits.Digits(train.images[part], train.labels[part])
        for part in (slice(asked.rows), slice(asked.rows, None))
    )
    for title, method in SHOWN.items():
        METHODS[title] = method
        cell = Cell("digits", title, "search", 0, None)
        rates = {
            rate: train_and_score(base, replace(cell, rate=rate), learnt, held_out, asked.steps)[0]
            for rate in method.rates
            if rate is not None
        }
        rate = max(rates, key=rates.__getitem__, default=None)
        final = replace(cell, part="final", rate=rate)
        results = [
            train_and_score(base, replace(final, seed=seed), learnt, test, asked.steps)
            for seed in range(10, 15)
        ]
        scores = [score for score, _ in results]
        print(f"{title}: {spread(scores)}, {results[0][1]:,} parameters, rate {rate}", flush=True)


if __name__ == "__main__":
    main()
