"""The methods that are compared: how each is put on a model, and the rates it is searched over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from fourierft_export import TrainingTask

N_FREQUENCY = 1000
TARGETS = ["query", "value", "q_proj", "v_proj"]  # the last two: of the vision transformer


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: in the table.
        rates: peak learning rates to choose among, on rows held out; (None,) for no search.
        put: model -> model with the method on it, everything else frozen; None for this toolkit's
            own `train_adapter` with its defaults.
        is_head_rate: the rate searched is the head's, since nothing else learns.
        rates_of: the method whose rates are taken, found without dropout, instead of a search.
        dropout: train with the base's dropout on, as a stock Trainer does.
        settings: of `train_adapter`, where the toolkit's defaults are not what is compared.
    """

    title: str
    rates: tuple[float | None, ...]
    put: Callable[[TrainingTask], nn.Module] | None = None
    is_head_rate: bool = False
    rates_of: str | None = None
    dropout: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def head_only(task: TrainingTask) -> nn.Module:
    """The task's head learns."""
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(any(head in name for head in task.modules_to_save))
    return task.model


def lora(task: TrainingTask, rank: int) -> nn.Module:
    """PEFT's LoRA with alpha twice the rank, no dropout of its own."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=_task_type(task),
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=TARGETS,
    )
    return get_peft_model(task.model, config)


def peft_fourierft(task: TrainingTask) -> nn.Module:
    """PEFT's FourierFT as PEFT starts it: scaling 150, normal spectra."""
    from peft import FourierFTConfig, get_peft_model

    config = FourierFTConfig(
        task_type=_task_type(task), n_frequency=N_FREQUENCY, target_modules=TARGETS
    )
    return get_peft_model(task.model, config)


def _task_type(task: TrainingTask) -> str | None:
    """With it, PEFT trains the head, too."""
    return "SEQ_CLS" if task.modules_to_save else None


# Every method chooses among four rates. The head's rate is the same wherever something besides the
# head learns.
LORA_RATES, PEFT_RATES = (0.001, 0.002, 0.004, 0.008), (0.03, 0.06, 0.12, 0.25)
LORA_8, LORA_1 = partial(lora, rank=8), partial(lora, rank=1)
METHODS = {
    "head": Method("head only", (0.003, 0.01, 0.03, 0.1), head_only, is_head_rate=True),
    "lora8": Method("LoRA r=8 (PEFT)", LORA_RATES, LORA_8),
    "lora1": Method("LoRA r=1 (PEFT)", LORA_RATES, LORA_1),
    "peft": Method("FourierFT n=1000 (PEFT)", PEFT_RATES, peft_fourierft),
    "ours": Method("FourierFT (this toolkit, defaults)", (None,)),
    "ours-500": Method("FourierFT n=500 (this toolkit)", (None,), settings={"n_frequency": 500}),
    "ours-biases": Method(
        "FourierFT n=640 and biases (this toolkit)",
        (None,),
        settings={"n_frequency": 640, "bias": "fourier_only"},
    ),
    "lora8-dropout": Method(
        "LoRA r=8 (PEFT), dropout", (None,), LORA_8, rates_of="lora8", dropout=True
    ),
    "lora1-dropout": Method(
        "LoRA r=1 (PEFT), dropout", (None,), LORA_1, rates_of="lora1", dropout=True
    ),
    "peft-dropout": Method(
        "FourierFT n=1000 (PEFT), dropout", (None,), peft_fourierft, rates_of="peft", dropout=True
    ),
}
