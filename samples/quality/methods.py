"""The methods that are compared: how each is put on a model, and the rates it is searched over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from fourierft_export import TrainingTask

N_FREQUENCY = 1000
TARGETS = ["query", "value"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        title: in the table.
        rates: peak learning rates to choose among, on rows held out; (None,) for no search.
        put: model -> model with the method on it, everything else frozen; None for this toolkit's
            own `train_adapter`.
        is_head_rate: the rate searched is the head's, since nothing else learns.
    """

    title: str
    rates: tuple[float | None, ...]
    put: Callable[[TrainingTask], nn.Module] | None = None
    is_head_rate: bool = False


def head_only(task: TrainingTask) -> nn.Module:
    """The task's head learns."""
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(any(head in name for head in task.modules_to_save))
    return task.model


def lora(task: TrainingTask) -> nn.Module:
    """PEFT's LoRA of rank 8, alpha 16, no dropout."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS
    )
    return get_peft_model(task.model, config)


def peft_fourierft(task: TrainingTask) -> nn.Module:
    """PEFT's FourierFT as PEFT starts it: scaling 150, normal spectra."""
    from peft import FourierFTConfig, get_peft_model

    config = FourierFTConfig(task_type="SEQ_CLS", n_frequency=N_FREQUENCY, target_modules=TARGETS)
    return get_peft_model(task.model, config)


# Every method chooses among four rates. The head's rate is the same wherever something besides the
# head learns.
METHODS = {
    "head": Method("head only", (0.003, 0.01, 0.03, 0.1), head_only, is_head_rate=True),
    "lora": Method("LoRA r=8 (PEFT)", (0.001, 0.002, 0.004, 0.008), lora),
    "peft": Method("FourierFT n=1000 (PEFT)", (0.03, 0.06, 0.12, 0.25), peft_fourierft),
    "ours": Method("FourierFT n=1000 (this toolkit, defaults)", (None,)),
    "ours-searched": Method(
        "FourierFT n=1000 (this toolkit, rate searched)", (0.05, 0.1, 0.2, 0.3)
    ),
}
